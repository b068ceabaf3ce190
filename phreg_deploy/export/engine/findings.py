"""Judge what the inspector shows of an engine: it is as expected, it is not, or it cannot be told.

NVIDIA's developer guide: "TensorRT may decide not to fuse an MHA graph into a single kernel based on performance
evaluation", and the names of kernels differ between versions. So a census alone does not refuse an engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.export.engine.inspection import Census
from phreg_deploy.readout import FINAL
from phreg_deploy.spec import Stored

# Head widths that TensorRT's fused attention takes: above the first, up to the second, in steps of 8.
HEAD_WIDTHS = (8, 256)
# Tokens from which on ``calibrate`` writes FP8 into attention; with fewer it stays in FP16.
FP8_TOKENS = 32
YES, NO, UNKNOWN = "yes", "no", "cannot tell"


@dataclass(frozen=True)
class Finding(Stored):
    """``subject``: "fused attention", "FP8 attention" or "8-bit layers". ``verdict``: "yes", "no" or "cannot tell"."""

    subject: str
    verdict: str
    sentence: str


def judge_census(census: Census, manifest: Manifest, eight_bit: list[str]) -> list[Finding]:
    """Judge an engine's layers.

    Args:
        eight_bit: the linear layers that the bundle wants in 8 bits.

    Returns:
        a finding for each subject that the bundle has expectations of.
    """
    expected = expected_attentions(manifest)
    found = []
    if expected:
        found.append(_fused_attention(census, expected))
        if manifest.precision == "fp8" and _tokens(manifest) >= FP8_TOKENS:
            found.append(_fp8_attention(census, expected))
    if eight_bit:
        found.append(_eight_bit_layers(census, eight_bit))
    return found


def expected_attentions(manifest: Manifest) -> int:
    """Return how many attentions TensorRT can fuse; it fuses none in FP32."""
    width = manifest.model.width // manifest.model.heads
    if manifest.precision == "fp32" or not HEAD_WIDTHS[0] < width <= HEAD_WIDTHS[1] or width % 8:
        return 0
    in_float = {part.split("/")[0] for part in manifest.float_parts if ".attn/" in part}
    # The last block of a readout has no attention of queries to keys.
    return manifest.model.depth - (manifest.readout.name != FINAL) - len(in_float)


def _tokens(manifest: Manifest) -> int:
    """Return the tokens of the smallest image, without class token and registers."""
    patch = manifest.model.patch
    return min((height // patch[0]) * (width // patch[1]) for height, width in manifest.sizes.sizes)


def _fused_attention(census: Census, expected: int) -> Finding:
    fused = len(census.fused_attention) + census.unnamed_fused
    verdict = YES if fused >= expected else NO if census.unfused_attention else UNKNOWN
    sentence = f"{min(fused, expected)} of {expected} attentions are fused"
    if verdict == UNKNOWN:
        sentence += ", and TensorRT's inspector does not show how the others run"
    return Finding("fused attention", verdict, sentence)


def _fp8_attention(census: Census, expected: int) -> Finding:
    read, fused = len(census.fp8_attention) + census.unnamed_fp8, len(census.fused_attention) + census.unnamed_fused
    verdict = YES if read >= expected else NO if read < fused or census.unfused_attention else UNKNOWN
    sentence = f"{min(read, expected)} of {expected} attentions read FP8"
    if verdict == UNKNOWN:
        sentence += ", and TensorRT's inspector does not show what the others read"
    return Finding("FP8 attention", verdict, sentence)


def _eight_bit_layers(census: Census, eight_bit: list[str]) -> Finding:
    in_float = [name for name in eight_bit if name in census.float_linear]
    unseen = [name for name in eight_bit if name not in census.eight_bit and name not in in_float]
    total = len(eight_bit)
    if in_float:
        sentence = (
            f"{len(in_float)} of {total} linear layers that were meant to run in 8 bits run in float, e.g. "
            f"{in_float[0]}"
        )
        return Finding("8-bit layers", NO, sentence)
    if unseen:
        sentence = f"TensorRT's inspector does not show the types of {len(unseen)} of {total} 8-bit linear layers"
        return Finding("8-bit layers", UNKNOWN, f"{sentence}, e.g. {unseen[0]}")
    return Finding("8-bit layers", YES, f"{total} of {total} linear layers run in 8 bits")
