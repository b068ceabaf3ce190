"""Rows of ``inspect``: the facts of a bundle's manifest and of a student's record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phreg_deploy.cli.console import percent

if TYPE_CHECKING:
    from phreg_deploy.bundle.bundle import Bundle

Rows = list[list[str]]


def bundle_rows(bundle: Bundle) -> Rows:
    """What a bundle serves, where its model comes from, and its files."""
    folder, manifest = bundle.folder, bundle.manifest
    model, preprocess = manifest.model, manifest.preprocess.to_json()
    sizes = {name: f"{(folder / name).stat().st_size / 2**20:.1f} MB" for name in manifest.files}
    warning = [["WARNING", "random weights: for timing only"]] if manifest.random_weights else []
    parameters = f"{model.parameters / 1e6:.1f} M parameters"
    precision = f"{manifest.precision}, opset {manifest.opset}"
    return [
        ["model", f"{model.architecture}, {parameters}, {model.registers} registers"],
        ["serves", f"{manifest.sizes}, batch {manifest.batches}, {precision}"],
        ["inputs", _tensors(manifest.inputs)],
        ["outputs", _tensors(manifest.outputs)],
        *([f"classes of {head.output}", ", ".join(head.classes)] for head in manifest.heads if head.classes),
        ["preprocessing", ", ".join(f"{name} {value}" for name, value in preprocess.items())],
        *source_rows(manifest.source, "exported weights"),
        ["stayed in float32", ", ".join(manifest.float_parts) or "everything"],
        ["files, hashes verified", ", ".join(f"{name} {size}" for name, size in sizes.items())],
        *(_quantisation_rows(manifest.quantisation) if manifest.quantisation else []),
        *warning,
    ]


def student_rows(record: dict[str, Any]) -> Rows:
    """How a student was distilled, and what it scored."""
    recipe, images, scores = record["recipe"], record["images"], record["scores"]
    training = f"{recipe['epochs']} epochs, {record['registers']} registers, seed {record['seed']}"
    held_out = len(images["held_out"])
    neurons = ", ".join(
        f"block {neuron['block']} unit {neuron['unit']}{' (not moved)' if neuron.get('left') else ''}"
        for neuron in record["register_neurons"]
    )
    rows = [
        *source_rows(record["source"], "its weights"),
        ["recipe", f"{recipe['name']}, {training}"],
        ["register neurons", neurons or "none"],
        ["images", f"{images['trained']} trained on, {held_out} held out, {images['skipped']} skipped"],
    ]
    if "missing" in scores:
        return [*rows, ["scores", f"missing: {scores['missing']}"]]
    models = ("base", "student")
    rates = {model: percent(scores[model]["norm_outliers"]["rate"]) for model in models}
    rows += [[f"norm-outlier rate, {model}", rate] for model, rate in rates.items()]
    return rows + [[f"cosine to denoised target, {m}", f"{scores[m]['fidelity']['mean']:.4f}"] for m in models]


def source_rows(source: dict[str, Any], whose: str) -> Rows:
    """The base model, the licence of its weights, and where they are published.

    ``whose``: what the hash is of, as the name of a row. A bundle has that of what was exported.
    """
    licence = (source["license"] or "not stated by timm") if "license" in source else "not recorded"
    hub = source.get("hf_hub_id")
    places = [f"Hugging Face hub {hub}" if hub else None, source.get("url")]
    return [
        ["base model", source["model"]],
        [whose, f"sha256 {source['weights_sha256'][:16]}…"],
        ["licence of the base's weights", licence],
        ["published at", ", ".join(place for place in places if place) or "not stated by timm"],
    ]


def _tensors(tensors: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tensor['dtype']} {tensor['shape']}" for name, tensor in tensors.items())


def _quantisation_rows(facts: dict[str, Any]) -> Rows:
    from phreg_deploy.runtime.backends.instructions import advice

    fidelity, count = facts["fidelity"], facts["images"]["report"]["count"]
    similarity = f"patch cosine {fidelity['cosine_mean']:.5f}, 1st percentile {fidelity['cosine_p1']:.5f}"
    float_share = f"{percent(facts['float_macs'])} of the linear MACs in float"
    note = advice(facts["mode"]) if facts["target"] == "cpu" else None
    return [
        ["8 bits", f"{facts['mode']} for {facts['target']}; {float_share}"],
        ["agreement with FP32", f"{similarity}, on {count} images that took part in no choice"],
        *(["MISSED", line] for line in facts["missed"]),
        *([["note", note]] if note else []),
    ]
