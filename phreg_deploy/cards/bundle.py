"""Write the model card of a bundle from its manifest."""

from __future__ import annotations

from typing import Any

from phreg_deploy.cards.metadata import PLACE, TASK, front_matter, licence_sentence, origin, results, table

LOAD = """## Load it

```bash
pip install "phreg-deploy[cpu,hub]"
```

```python
from phreg_deploy.runtime import FeatureExtractor

extractor = FeatureExtractor.load("{place}")
dense = extractor("photo.jpg")
{read}
```

PyTorch is not needed. `phreg-deploy check {place}` compares this machine's answers with the exam that the bundle
carries.
"""
FEATURES = "dense.features  # (B, Hp, Wp, C) float32"
ANSWERS = "dense.heads  # the heads' answers, by output"


def bundle_card(manifest: dict[str, Any]) -> str:
    """Return the card of a bundle; ``manifest``: the content of ``manifest.json``."""
    source, facts = manifest["source"], manifest["quantisation"]
    model, precision, base = manifest["model"], manifest["precision"], str(source["model"])
    title = f"{base}, {precision} bundle"
    metadata = {
        **origin(source, "quantized" if facts else "finetune"),
        "library_name": "phreg-deploy",
        "pipeline_tag": TASK,
        "tags": ["phreg-deploy", "onnx", "register-tokens", "dense-features", "vision-transformer"],
        "model-index": facts and _results(title, facts),
    }
    made = f" after `phreg-deploy distill --recipe {source['distilled']}`" if source.get("distilled") else ""
    what = "Answers of heads on dense features" if manifest.get("only_heads") else "Dense features"
    intro = f"{what} of `{base}`{made}, with {model['registers']} register tokens, as ONNX in {precision}."
    if manifest["random_weights"]:
        intro += " **Its weights are random: it is for timing only.**"
    parts = [
        f"# {title}\n\n{intro}\n",
        LOAD.format(place=PLACE, read=ANSWERS if manifest.get("only_heads") else FEATURES),
        f"## What it serves\n\n{_facts(manifest)}\n",
        f"## Licence\n\n{licence_sentence(source)}\n",
    ]
    return front_matter(metadata) + "\n" + "\n".join(parts)


def _results(title: str, facts: dict[str, Any]) -> list[dict[str, Any]] | None:
    fidelity, count = facts["fidelity"], facts["images"]["report"]["count"]
    figures = {
        "patch_cosine": ("cosine per patch token to FP32, mean", fidelity["cosine_mean"]),
        "patch_cosine_p1": ("cosine per patch token to FP32, 1st percentile", fidelity["cosine_p1"]),
    }
    return results(title, f"{count} photographs that took part in no choice", figures)


def _facts(manifest: dict[str, Any]) -> str:
    model, sizes, batches, facts = (manifest[key] for key in ("model", "sizes", "batches", "quantisation"))
    shown = ", ".join(f"{height} x {width}" for height, width in sizes["sizes"])
    outputs = ", ".join(f"`{name}` {tensor['dtype']}" for name, tensor in sorted(manifest["outputs"].items()))
    rows = [
        ["model", f"`{model['architecture']}`, {model['parameters'] / 1e6:.1f} M parameters, width {model['width']}"],
        ["image size", shown if sizes["mode"] != "range" else f"{shown} (least, preferred, most)"],
        ["batch", f"{batches['lowest']} to {batches['highest']}"],
        ["outputs", outputs],
        ["weights", f"sha256 `{manifest['source']['weights_sha256']}`"],
        ["versions", ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items()))],
    ]
    if facts:
        fidelity = facts["fidelity"]
        cosine = f"{fidelity['cosine_mean']:.5f}, 1st percentile {fidelity['cosine_p1']:.5f}"
        rows.insert(1, ["8 bits", f"{facts['mode']} for {facts['target']}; cosine per patch token to FP32 {cosine}"])
    return table(["", ""], rows)
