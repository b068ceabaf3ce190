"""``inspect``: what a student or a bundle is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result, percent
from phreg_deploy.cli.options import (
    output_options,
)
from phreg_deploy.errors import PhregError
from phreg_deploy.json_files import read_json
from phreg_deploy.student_record import read_record


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@output_options
def inspect(path: Path, as_json: bool, quiet: bool) -> None:
    """Print what a student's folder or a BUNDLE is, and verify a bundle's hashes.

    \b
    Example:
      phreg-deploy inspect student.bundle
    """
    from phreg_deploy.bundle.bundle import Bundle, is_bundle

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
    from phreg_deploy.runtime.backends.instructions import advice

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
