"""Checkpoints, students, heads and names that run something, lead out, or never end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reliability.hostile import files
from benchmarks.reliability.hostile.case import ENDLESS, Case, Place
from benchmarks.reliability.subjects import HERE

TINY = "vit_tiny_patch16_224"
LINEAR = {"w": {"dtype": "F32", "shape": [5, 48], "data_offsets": [0, 960]}}
MANY = {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}

CHECKPOINTS: dict[str, Callable[[Place], Path]] = {
    "pickle that runs": lambda p: files.pickled(p.inputs / "w.pth", p.marker, zipped=False),
    "pickle that runs, zipped": lambda p: files.pickled(p.inputs / "w.pt", p.marker, zipped=True),
    "pickle that runs, as .bin": lambda p: files.pickled(p.inputs / "w.bin", p.marker, zipped=False),
    "pickle in the name of safetensors": lambda p: files.pickled(p.inputs / "w.safetensors", p.marker, zipped=False),
    "2.5 GB of zeros, squeezed": lambda p: files.squeezed_checkpoint(p.inputs / "w.pth", 2560),
    "table of 16 exabytes": lambda p: files.safetensors(p.inputs / "w.safetensors", {}, 2**64 - 1),
    "table of 100 MB": lambda p: files.safetensors(p.inputs / "w.safetensors", {"x" * (100 << 20): 0}),
    "table with 100,000 tensors": lambda p: files.safetensors(p.inputs / "w.safetensors", MANY),
    "tensor of a terabyte": lambda p: files.safetensors(
        p.inputs / "w.safetensors", {"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    ),
    "offsets below 0": lambda p: files.safetensors(
        p.inputs / "w.safetensors", {"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}
    ),
    **{kind: (lambda p, k=kind: files.endless(p.inputs / "w.safetensors", k)) for kind in ENDLESS},  # type: ignore[misc]
    **{f"{kind}, .pth": (lambda p, k=kind: files.endless(p.inputs / "w.pth", k)) for kind in ENDLESS},  # type: ignore[misc]
}


def model_cases() -> dict[str, Case]:
    """Checkpoints and students."""
    cases = {f"checkpoint, {name}": Case("models", partial(_checkpoint, w)) for name, w in CHECKPOINTS.items()}
    for name in ("config.json", "model.safetensors", "phreg.json"):
        for kind in ENDLESS:
            harmless = name == "phreg.json"
            cases[f"student, {name}, {kind}"] = Case("models", partial(_endless_student, name, kind), harmless)
    for change in ({"depth": 10**6}, {"embed_dim": 3 * 2**20}, {"img_size": 2**20}, {"reg_tokens": 10**9}):
        cases[f"student, {change}"] = Case("models", partial(_student, {"model_args": change}))
    file = {"file": "../../evil.pth", "url": "", "hf_hub_id": "", "custom_load": True}
    cases["student, weights elsewhere"] = Case("models", partial(_student, {"pretrained_cfg": file}), harmless=True)
    cases["student, config nested 100,000 deep"] = Case("models", _nested)
    return cases


def head_cases() -> dict[str, Case]:
    """Heads for `attach`."""
    cases = {f"head, {name}": Case("heads", partial(_attach, w)) for name, w in CHECKPOINTS.items()}
    for name in ("head.json", "head.safetensors"):
        for kind in ENDLESS:
            cases[f"head, {name}, {kind}"] = Case("heads", partial(_head, {}, (name, kind)))
    cases["head, 100,000 classes"] = Case("heads", partial(_head, {"classes": ["x"] * 100_000}, None))
    cases["head, names that lead out"] = Case(
        "heads", partial(_head, {"classes": ["../../x"] * 5}, None), harmless=True
    )
    cases["head, nested 100,000 deep"] = Case("heads", _nested_head)
    return cases


def name_cases() -> dict[str, Case]:
    """Names of the hub, for every command that takes one."""
    names = (
        "../../etc",
        "a/..",
        "a/b/c",
        "a/b@../../x",
        "a/b@" + "x" * 10_000,
        "a" * 10_000,
        "a/b\n",
        "a/b\x1b[2J",
        "",
        "@",
    )
    readers: dict[str, Callable[[Place, str], Sequence[object]]] = {
        "check": lambda _, name: ["check", name, *HERE],
        "export": lambda p, name: ["export", name, "-o", p.output],
        "inspect": lambda _, name: ["inspect", name],
        "push": lambda p, name: ["push", p.subjects.student, name.removeprefix("hf-hub:"), "--dry-run"],
    }
    return {
        f"{command}, hf-hub:{name[:12]!r} ({len(name)})": Case("names", partial(_name, read, f"hf-hub:{name}"))
        for command, read in readers.items()
        for name in names
    }


def _name(read: Callable[[Place, str], Sequence[object]], name: str, place: Place) -> Sequence[object]:
    return read(place, name)


def _checkpoint(write: Callable[[Place], Path], place: Place) -> Sequence[object]:
    return ["artifacts", TINY, "--checkpoint", write(place), "--images", place.subjects.photos, "--quiet", "--json"]


def _attach(write: Callable[[Place], Path], place: Place) -> Sequence[object]:
    return ["attach", place.subjects.bundle, "--head", write(place), "-o", place.output, "--quiet", "--json"]


def _copy(place: Place, source: Path) -> Path:
    return Path(shutil.copytree(source, place.inputs / "copy"))


def _endless_student(name: str, kind: str, place: Place) -> Sequence[object]:
    return ["export", files.endless(_copy(place, place.subjects.student) / name, kind).parent, "-o", place.output]


def _student(change: dict[str, Any], place: Place) -> Sequence[object]:
    files.pickled(place.root / "evil.pth", place.marker, zipped=False)
    path = _copy(place, place.subjects.student) / "config.json"
    config = json.loads(path.read_text())
    for key, values in change.items():
        config[key] = {**config.get(key, {}), **values}
    path.write_text(json.dumps(config))
    return ["export", path.parent, "-o", place.output, "--quiet"]


def _nested(place: Place) -> Sequence[object]:
    path = _copy(place, place.subjects.student) / "config.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    return ["export", path.parent, "-o", place.output]


def _head(facts: dict[str, Any], endless: tuple[str, str] | None, place: Place) -> Sequence[object]:
    folder = place.inputs / "head"
    folder.mkdir()
    known = {"task": "segmentation", "classes": list("abcde"), "colours": None, "layers": None, "width": 48}
    known |= {"ignore": None, "bins": None, "depth_range": None, "trained_on": {}}
    document = {"format": 1, "normalisation": {"kind": "folded"}, **known, **facts}
    (folder / "head.json").write_text(json.dumps(document))
    files.safetensors(folder / "head.safetensors", LINEAR, data=bytes(960))
    if endless:
        files.endless(folder / endless[0], endless[1])
    return ["attach", place.subjects.bundle, "--head", folder, "-o", place.output, "--quiet", "--json"]


def _nested_head(place: Place) -> Sequence[object]:
    command = _head({}, None, place)
    (place.inputs / "head" / "head.json").write_text("[" * 100_000)
    return command
