"""Judge every Vision Transformer of timm by its name and its structure, and write the table of ``docs/families.md``.

    python -m benchmarks.families

No weights are loaded: models are built without memory (on torch's device "meta"). A test compares the page, and exports
small models of the kinds with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from phreg_deploy.export.rotary import describe_rotary
from phreg_deploy.models.families import MODULES, OTHERS, refused_model, refused_name
from phreg_deploy.models.loading import model_spec

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- families -->\n", "<!-- end -->"
# Parts of names, in the order in which they are looked for, and the family that they stand for.
FAMILIES = (
    ("dinov3", "DINOv3"),
    ("dinov2", "DINOv2"),
    ("lingbot", "LingBot-Vision"),
    ("sapiens2", "Sapiens2"),
    ("vit_pe_", "Perception Encoder"),
    ("rope_mixed", "RoPE-ViT, mixed"),
    ("_rope_", "RoPE-ViT"),
    ("eva02", "EVA02"),
    ("eva_", "EVA"),
    ("aimv2", "AIMv2"),
    ("beit3", "BEiT-3"),
    ("deit3", "DeiT-III"),
    ("deit", "DeiT"),
    ("siglip", "SigLIP, SigLIP 2"),
    ("clip", "CLIP"),
    ("radio", "C-RADIO"),
    ("tips", "TIPS"),
    ("flexivit", "FlexiViT"),
    ("intern", "InternViT"),
)


@dataclass(frozen=True)
class Verdict:
    """What is said of one timm name. ``reason``: why it is refused, None if it is supported."""

    name: str
    family: str
    positions: str
    registers: int
    reason: str | None


def names() -> list[str]:
    """Every timm name of a module that this project speaks of."""
    known = {*MODULES, *(module for module in OTHERS if not module.startswith("swin"))}
    return [name for name in timm.list_models() if _module(name) in known]


def judge(name: str) -> Verdict:
    """Judge one name as ``load_model`` does: by the name alone where that is enough, else by the model's structure."""
    reason = refused_name(name)
    if reason is not None:
        return Verdict(name, _family(name), "", 0, reason)
    # Blocks of one model are alike, except for those of Sapiens2, which share keys in the middle only.
    depth = {} if "sapiens2" in name else {"depth": 1}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **depth)
    reason = refused_model(model)
    if reason is not None:
        return Verdict(name, _family(name), "", 0, reason)
    rotary = describe_rotary(model)
    kinds = [] if model.pos_embed is None else ["learned"]
    kinds += [] if rotary is None else [f"rotary ({rotary[0].kind})"]
    return Verdict(name, _family(name), ", ".join(kinds) or "none", model_spec(model).registers, None)


def survey() -> Iterator[Verdict]:
    """Judge every name."""
    return (judge(name) for name in names())


def render(verdicts: list[Verdict]) -> str:
    """The page's two tables."""
    supported: dict[tuple[str, str, int], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.reason is None:
            supported.setdefault((verdict.family, verdict.positions, verdict.registers), []).append(verdict.name)
        else:
            refused.setdefault(verdict.reason, []).append(verdict.name)
    count = sum(map(len, supported.values()))
    lines = [
        f"timm {timm.__version__}: {count} of {len(verdicts)} names are supported.",
        "",
        "| family | position embedding | registers of its own | names |",
        "|---|---|---|---|",
        *(f"| {f} | {p} | {r} | {_code(found)} |" for (f, p, r), found in sorted(supported.items())),
        "",
        "| refused | because |",
        "|---|---|",
        *(f"| {_code(found)} | {reason} |" for reason, found in sorted(refused.items())),
    ]
    return "\n".join(lines) + "\n"


def page(text: str, table: str) -> str:
    """The page with its tables replaced."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table + END + rest.partition(END)[2]


def _module(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1]


def _family(name: str) -> str:
    return next((family for part, family in FAMILIES if part in name), "ViT (AugReg, DINO, MAE, ...)")


def _code(found: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in found)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), render(list(survey()))))
