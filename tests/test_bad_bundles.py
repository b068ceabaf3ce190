"""Bundles that are missing, damaged, changed or too new, and wrong arguments beside a bundle, are refused."""

import sys

import pytest

from tests.bundle_changes import edit_graph, edit_manifest, first_half, misname_operator, write_hashes
from tests.cli_helpers import leftovers

READERS = {
    "check": lambda w, bundle: ["check", bundle],
    "profile": lambda w, bundle: ["profile", bundle, "--seconds", "0.1"],
    "extract": lambda w, bundle: ["extract", bundle, w.photos, "-o", w.out],
    "artifacts": lambda w, bundle: ["artifacts", bundle, "--images", w.photos, "--limit", "2"],
    "inspect": lambda w, bundle: ["inspect", bundle],
}


def copy_changed(name="bundle", **files):
    """Return a function that copies a bundle with changed files."""
    return lambda w: w.copy(name, **files)


# Name -> the bundle, and fragments of the message of every reader.
BUNDLES = {
    "no folder": (lambda w: w.tmp / "none", ["none", "there is nothing"]),
    "a file": (lambda w: w.photos / "frame-01.jpg", ["frame-01.jpg", "there is a file"]),
    "newer format": (
        copy_changed(manifest=edit_manifest(format=5)),
        ["got format 5", "at most 4", "Upgrade phreg-deploy"],
    ),
    "no format": (copy_changed(manifest=edit_manifest(format=None)), ["manifest.json", "no format number"]),
    "manifest empty": (copy_changed(manifest=b""), ["manifest.json", "not valid JSON"]),
    "manifest truncated": (
        copy_changed(manifest=first_half),
        ["manifest.json", "not valid JSON", "export the bundle again"],
    ),
    "manifest not text": (copy_changed(manifest=b"\xff\xfe\x80"), ["manifest.json", "not valid JSON"]),
    "manifest a list": (copy_changed(manifest=b"[]"), ["manifest.json", "damaged or not ours"]),
    "key missing": (copy_changed(manifest=edit_manifest(sizes=None)), ["manifest.json", "['sizes']"]),
    "key of calibration missing": (
        copy_changed(manifest=edit_manifest(quantisation=None)),
        ["manifest.json", "['quantisation']"],
    ),
    "key unknown": (copy_changed(manifest=edit_manifest(colour=1)), ["manifest.json", "['colour']"]),
    "model no object": (copy_changed(manifest=edit_manifest(model=3)), ["manifest.json", "ModelSpec", "int"]),
    "sizes malformed": (
        copy_changed(manifest=edit_manifest(sizes={"mode": "fixed", "sizes": [64]})),
        ["manifest.json", "sizes"],
    ),
    "precision unknown": (copy_changed(manifest=edit_manifest(precision="int3")), ["manifest.json", "int3"]),
    "files no object": (copy_changed(manifest=edit_manifest(files=7)), ["manifest.json", "files"]),
    "graph changed": (
        copy_changed(model=lambda b: b[:-1] + b"?"),
        ["model.onnx", "another sha256", "changed or damaged"],
    ),
    "graph truncated": (copy_changed(model=first_half), ["model.onnx", "another sha256"]),
    "graph empty": (copy_changed(model=b""), ["model.onnx", "another sha256"]),
    "graph missing": (copy_changed(model=None), ["lacks model.onnx", "export the bundle again"]),
    "reference truncated": (copy_changed(reference=first_half), ["reference.npz", "another sha256"]),
    "reference missing": (copy_changed(reference=None), ["lacks reference.npz"]),
    "positions changed": (copy_changed("wide_bundle", pos_embed=first_half), ["pos_embed.npy", "another sha256"]),
}
# Name -> the command, and fragments of its message.
OTHERS = {
    "check: a student": (lambda w: ["check", w.student], ["no manifest.json", "run `phreg-deploy export` on it first"]),
    "inspect: an empty folder": (lambda w: ["inspect", w.tmp], ["neither manifest.json nor config.json"]),
    "inspect: config damaged": (lambda w: ["inspect", w.copy("student", config=b"{")], ["copy-of-student", "damaged"]),
    "inspect: config a list": (lambda w: ["inspect", w.copy("student", config=b"[]")], ["config.json", "damaged"]),
    "inspect: record damaged": (lambda w: ["inspect", w.copy("student", phreg=first_half)], ["damaged"]),
    "inspect: record without scores": (
        lambda w: ["inspect", w.copy("student", phreg=b'{"format": 1}')],
        ["phreg.json", "damaged"],
    ),
    "inspect: newer record": (
        lambda w: ["inspect", w.copy("student", phreg=edit_manifest(format=2))],
        ["format 2", "at most 1"],
    ),
    "check: reference of noise": (
        lambda w: ["check", write_hashes(w.copy("bundle", reference=b"noise"))],
        ["reference.npz", "cannot be read"],
    ),
    "check: reference truncated": (
        lambda w: ["check", write_hashes(w.copy("bundle", reference=first_half))],
        ["reference.npz", "cannot be read"],
    ),
    "check: reference empty": (
        lambda w: ["check", write_hashes(w.copy("bundle", reference=b""))],
        ["reference.npz", "cannot be read"],
    ),
    "extract: graph of noise": (
        lambda w: READERS["extract"](w, write_hashes(w.copy("bundle", model=b"noise"))),
        ["model.onnx", "cannot be read", "no ONNX file"],
    ),
    "extract: graph with an unknown operator": (
        lambda w: READERS["extract"](w, write_hashes(w.copy("bundle", model=edit_graph(misname_operator)))),
        ["ONNX Runtime", "cannot load", "model.onnx"],
    ),
    "extract: positions truncated": (
        lambda w: READERS["extract"](w, write_hashes(w.copy("wide_bundle", pos_embed=first_half))),
        ["pos_embed.npy", "cannot be read"],
    ),
    "check: reference without images": (
        lambda w: ["check", w.bundle, "--reference", w.student],
        ["--reference needs --images"],
    ),
    "check: base without images": (lambda w: ["check", w.bundle, "--base", w.base], ["--base", "--images"]),
    "check: reference missing": (
        lambda w: ["check", w.bundle, "--images", w.photos, "--reference", "local-dir:gone"],
        ["local-dir:gone names no folder"],
    ),
    "check: images missing": (lambda w: ["check", w.bundle, "--images", w.tmp / "none"], ["there is nothing"]),
    "check: report nowhere": (
        lambda w: ["check", w.bundle, "--report", w.tmp / "no" / "r.html"],
        ["no folder", "create it first"],
    ),
    "check: no limit": (lambda w: ["check", w.bundle, "--limit", "0"], ["--limit", "x>=1"]),
    "check: no thread": (lambda w: ["check", w.bundle, "--threads", "0"], ["--threads"]),
    "check: unknown backend": (
        lambda w: ["check", w.bundle, "--backend", "tflite"],
        ["'tflite'", "auto, onnxruntime-cpu"],
    ),
    "extract: size not served": (
        lambda w: [*READERS["extract"](w, w.bundle), "--image-size", "72"],
        ["72x72", "expected 64x64"],
    ),
    "extract: size out of range": (
        lambda w: [*READERS["extract"](w, w.wide_bundle), "--image-size", "48x104"],
        ["48x104", "48x48 to 96x96"],
    ),
    "extract: size not a multiple": (
        lambda w: [*READERS["extract"](w, w.wide_bundle), "--image-size", "60"],
        ["60x60"],
    ),
    "extract: image missing": (
        lambda w: ["extract", w.bundle, w.tmp / "x.jpg", "-o", w.out],
        ["there is no file", "x.jpg"],
    ),
    "extract: an address": (
        lambda w: ["extract", w.bundle, "https://example.org/a.jpg", "-o", w.out],
        ["got the URL https://example.org/a.jpg"],
    ),
    "extract: outputs unknown": (
        lambda w: [*READERS["extract"](w, w.bundle), "--outputs", "features,deep"],
        ["'features,deep'", "cls, token_norm"],
    ),
    "extract: resume and force": (
        lambda w: [*READERS["extract"](w, w.bundle), "--resume", "--force"],
        ["--resume and --force", "one of them"],
    ),
    "extract: text for an image": (
        lambda w: ["extract", w.bundle, w.odd_images / "text.jpg", "-o", w.out],
        ["text.jpg", "not an image"],
    ),
    "extract: empty folder": (lambda w: ["extract", w.bundle, w.tmp, "-o", w.out], ["holds no image"]),
    "extract: no image named": (lambda w: ["extract", w.bundle, "-o", w.out], ["Missing argument", "IMAGES"]),
    "artifacts: checkpoint with a bundle": (
        lambda w: ["artifacts", w.bundle, "--images", w.photos, "--checkpoint", w.checkpoint],
        ["--checkpoint goes with a timm name"],
    ),
    "artifacts: size not served": (lambda w: [*READERS["artifacts"](w, w.bundle), "--image-size", "72"], ["72x72"]),
    "artifacts: picture nowhere": (
        lambda w: [*READERS["artifacts"](w, w.bundle), "--picture", w.tmp / "no" / "p.png"],
        ["p.png"],
    ),
    "profile: batch not served": (
        lambda w: [*READERS["profile"](w, w.bundle), "--batch", "2"],
        ["got 2 images", "--batch 1:1:2"],
    ),
    "profile: batch of words": (lambda w: [*READERS["profile"](w, w.bundle), "--batch", "1,b"], ["'1,b'", "1,4,8"]),
    "profile: frame of words": (
        lambda w: [*READERS["profile"](w, w.bundle), "--frame", "1080p"],
        ["'1080p'", "HEIGHTxWIDTH"],
    ),
    "profile: frame too large": (
        lambda w: [*READERS["profile"](w, w.bundle), "--frame", "99999x10"],
        ["99999x10", "16384"],
    ),
    "profile: no time": (lambda w: ["profile", w.bundle, "--seconds", "0"], ["--seconds"]),
    "profile: baseline missing": (
        lambda w: [*READERS["profile"](w, w.bundle), "--baseline", w.tmp / "b.json"],
        ["b.json", "cannot be read"],
    ),
    "profile: baseline a folder": (
        lambda w: [*READERS["profile"](w, w.bundle), "--baseline", w.tmp],
        ["cannot be read"],
    ),
}


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize("reader", READERS)
def test_a_bad_bundle_is_refused_by_every_reader(world, run_cli, reader, name):
    make, fragments = BUNDLES[name]
    command = READERS[reader](world, make(world))
    if reader in ("artifacts", "inspect") and name in ("no folder", "a file"):
        # ``artifacts`` and ``inspect`` also take a model, so their messages name both.
        fragments = fragments[:1]
    run_cli(*command, "--json").refused(2, *fragments)
    assert not world.out.exists()
    assert leftovers(world.tmp) == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_mistake_beside_a_bundle_is_exit_code_2(world, run_cli, name):
    make, fragments = OTHERS[name]
    run_cli(*make(world), "--json").refused(2, *fragments)
    assert not world.out.exists()
    assert leftovers(world.tmp) == []


@pytest.mark.parametrize(("backend", "extra"), [("onnxruntime-cuda", "gpu"), ("tensorrt", "trt")])
@pytest.mark.parametrize("reader", ["check", "profile", "extract", "artifacts"])
def test_a_missing_backend_is_exit_code_4(world, run_cli, monkeypatch, reader, backend, extra):
    for module in ("tensorrt", "tensorrt_lean"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    command = READERS[reader](world, world.bundle)
    run_cli(*command, "--backend", backend, "--json").refused(4, f"phreg-deploy[{extra}]")
    assert not world.out.exists()
