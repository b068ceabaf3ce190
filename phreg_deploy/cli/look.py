"""``artifacts``, ``inspect`` and ``doctor``: looking without changing anything."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import check_device, check_file, check_model
from phreg_deploy.cli.options import (
    Number,
    Result,
    backend_option,
    checkpoint_option,
    device_option,
    images_option,
    output_options,
    percent,
)
from phreg_deploy.documents import read_json
from phreg_deploy.errors import PhregError
from phreg_deploy.extras import DISTILL, require
from phreg_deploy.photographs import list_images
from phreg_deploy.record import read_record
from phreg_deploy.spec import parse_size


@click.command()
@click.argument("model")
@images_option(True, "Folder of images to score on.")
@checkpoint_option
@click.option("--image-size", help="e.g. 518 or 480x640; by default the model's or the bundle's own.")
@click.option(
    "--limit",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Images at most, in the order of their names.",
)
@click.option(
    "--median",
    type=Number(0, min_open=True),
    help="The base model's median norm; by default a student's or bundle's record, else the model's own.",
)
@click.option("--picture", type=click.Path(path_type=Path), help="Write a PNG of the first image's features and norms.")
@device_option
@backend_option
@output_options
def artifacts(model: str, images: Path, picture: Path | None, as_json: bool, quiet: bool, **asked: Any) -> None:
    """Score the artifacts in the dense features of MODEL: a timm name, a student's folder or a bundle.

    \b
    Examples:
      phreg-deploy artifacts vit_small_patch14_dinov2.lvd142m --images photos/ --picture before.png
      phreg-deploy artifacts student --images photos/
      phreg-deploy artifacts student.bundle --images photos/
    """
    from phreg_deploy.bundle import is_bundle
    from phreg_deploy.verify.scoring import score_bundle, score_model

    result = Result(as_json, quiet)
    if asked["image_size"]:
        parse_size(asked["image_size"])
    check_device(asked["device"])
    if picture is not None:
        check_file(picture, "picture")
    if is_bundle(model):
        if asked["checkpoint"] is not None:
            raise PhregError(f"artifacts: --checkpoint goes with a timm name, but {model} is a bundle.")
        if asked["device"] != "auto":
            raise PhregError("artifacts: --device goes with a PyTorch model; a bundle runs where --backend says.")
    else:
        check_model(model, asked["checkpoint"])
        if asked["backend"] != "auto":
            raise PhregError(f"artifacts: --backend goes with a bundle, but {model} is none; it runs in PyTorch.")
    list_images(images)
    if not is_bundle(model):
        require("`phreg-deploy artifacts` of a PyTorch model", distill=DISTILL)
    document, sheet = (score_bundle if is_bundle(model) else score_model)(
        model, images=images, progress=result.progress, **asked
    )
    outliers, shift = document["norm_outliers"], document["shift_incoherence"]
    rows = [
        ["norm-outlier rate", percent(outliers["rate"])],
        ["    high / low", f"{percent(outliers['upper'])} / {percent(outliers['lower'])}"],
        ["largest norm / median", outliers["largest"]],
        ["median norm measured against", outliers["median"]],
        ["shift incoherence", percent(shift["rate"])],
        [
            "    1 - cosine, percentiles 50 / 90 / 95 / 99",
            " / ".join(f"{shift[p]:.3f}" for p in ("p50", "p90", "p95", "p99")),
        ],
    ]
    result.table(f"Artifacts of {model} on {document['images']} images", ["score", "value"], rows)
    if document.get("blocks"):
        rows = [[str(i), b["median"], b["largest"], percent(b["rate"])] for i, b in enumerate(document["blocks"])]
        result.table(
            "Block by block, over patch tokens", ["block", "median norm", "largest / median", "above 2x"], rows
        )
    if picture is not None:
        from phreg_deploy.whole import write_whole

        data = io.BytesIO()
        sheet.save(data, format="PNG")
        write_whole(picture, data.getvalue())
        result.say(f"Wrote {picture}.")
    result.json(document)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@output_options
def inspect(path: Path, as_json: bool, quiet: bool) -> None:
    """Print what a student's folder or a BUNDLE is, and verify a bundle's hashes.

    \b
    Example:
      phreg-deploy inspect student.bundle
    """
    from phreg_deploy.bundle import Bundle, is_bundle

    result = Result(as_json, quiet)
    if is_bundle(path):
        bundle = Bundle.read(path)
        bundle.verify()
        facts = bundle.manifest.to_json()
        size = {name: f"{(path / name).stat().st_size / 2**20:.1f} MB" for name in facts["files"]}
        rows = [
            [
                "model",
                f"{facts['model']['architecture']}, {facts['model']['parameters'] / 1e6:.1f} M parameters, {facts['model']['registers']} registers",
            ],
            [
                "serves",
                f"{bundle.manifest.sizes}, batch {bundle.manifest.batches}, {bundle.manifest.precision}, opset {bundle.manifest.opset}",
            ],
            ["inputs", ", ".join(f"{k} {v['dtype']} {v['shape']}" for k, v in facts["inputs"].items())],
            ["outputs", ", ".join(f"{k} {v['dtype']} {v['shape']}" for k, v in facts["outputs"].items())],
            ["preprocessing", ", ".join(f"{k} {v}" for k, v in facts["preprocess"].items())],
            *_origin(facts["source"]),
            ["stayed in float32", ", ".join(facts["float_parts"]) or "everything"],
            ["files, hashes verified", ", ".join(f"{k} {v}" for k, v in size.items())],
        ]
        if bundle.manifest.quantisation:
            rows += _eight_bits(bundle.manifest.quantisation)
        if bundle.manifest.random_weights:
            rows.append(["WARNING", "random weights: for timing only"])
        result.table(f"Bundle {path}", ["", ""], rows)
        result.json({"kind": "bundle", **facts})
        return
    _inspect_student(path, result)


def _eight_bits(facts: dict[str, Any]) -> list[list[str]]:
    from phreg_deploy.runtime.instructions import advice

    fidelity, count = facts["fidelity"], facts["images"]["report"]["count"]
    rows = [
        [
            "8 bits",
            f"{facts['mode']} for {facts['target']}; {percent(facts['float_macs'])} of the linear MACs in float",
        ],
        [
            "agreement with FP32",
            f"patch cosine {fidelity['cosine_mean']:.5f}, 1st percentile {fidelity['cosine_p1']:.5f}, on {count} images that took part in no choice",
        ],
    ]
    rows += [["MISSED", line] for line in facts["missed"]]
    return rows + [["note", line] for line in (advice(facts["mode"]),) if line and facts["target"] == "cpu"]


def _inspect_student(path: Path, result: Result) -> None:
    if not os.path.isfile(path / "config.json"):
        found = (
            "nothing"
            if not os.path.exists(path)
            else "a file"
            if os.path.isfile(path)
            else "a folder with neither manifest.json nor config.json"
        )
        raise PhregError(f"inspect: got {path}, where there is {found}; expected a student's folder or a bundle.")
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise PhregError(
            f"inspect: {path / 'config.json'} is damaged ({error}); copy or distil the student again."
        ) from None
    if not isinstance(config, dict):
        raise PhregError(f"inspect: {path / 'config.json'} is damaged (no object); copy or distil the student again.")
    record = read_record(path)
    rows = [["architecture", str(config.get("architecture"))], ["arguments", json.dumps(config.get("model_args", {}))]]
    if record:
        try:
            rows += _story(record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise PhregError(
                f"inspect: {path / 'phreg.json'} is damaged ({type(error).__name__}: {error}); copy or distil the student again."
            ) from None
    result.table(f"Student {path}" if record else f"timm model {path}", ["", ""], rows)
    result.json({"kind": "student" if record else "timm", "config": config, "record": record})


def _origin(source: dict[str, Any]) -> list[list[str]]:
    """The base model, the licence of its weights, and where they are published."""
    license_ = (source["license"] or "not stated by timm") if "license" in source else "not recorded"
    places = [source.get("hf_hub_id") and f"Hugging Face hub {source['hf_hub_id']}", source.get("url")]
    return [
        ["base model", f"{source['model']}, weights {source['weights_sha256'][:16]}…"],
        ["license of its weights", license_],
        ["published at", ", ".join(place for place in places if place) or "not stated by timm"],
    ]


def _story(record: dict[str, Any]) -> list[list[str]]:
    scores = record["scores"]
    models = () if "missing" in scores else ("base", "student")
    return [
        *_origin(record["source"]),
        [
            "recipe",
            f"{record['recipe']['name']}, {record['recipe']['epochs']} epochs, {record['registers']} registers, seed {record['seed']}",
        ],
        [
            "register neurons",
            ", ".join(
                f"block {n['block']} unit {n['unit']}{' (not moved)' if n.get('left') else ''}"
                for n in record["register_neurons"]
            )
            or "none",
        ],
        [
            "images",
            f"{record['images']['trained']} trained on, {len(record['images']['held_out'])} held out, {record['images']['skipped']} skipped",
        ],
        *([["scores", f"missing: {scores['missing']}"]] if not models else []),
        *([f"norm-outlier rate, {m}", percent(scores[m]["norm_outliers"]["rate"])] for m in models),
        *([f"cosine to denoised target, {m}", f"{scores[m]['fidelity']['mean']:.4f}"] for m in models),
    ]


@click.command()
@output_options
def doctor(as_json: bool, quiet: bool) -> None:
    """Say what this machine can run, and the line that mends each thing that is missing.

    \b
    Example:
      phreg-deploy doctor
    """
    from phreg_deploy.runtime.diagnosis import diagnose

    result = Result(as_json, quiet)
    findings = diagnose()
    result.table(
        "What this machine can run",
        ["part", "state", "for", "what to do"],
        [[f.part, f.state, f.purpose, f.mend or ""] for f in findings],
    )
    result.json({"findings": [f.to_json() for f in findings], "commands": {f.part: f.usable for f in findings}})
