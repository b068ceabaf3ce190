"""The parity gates of each precision: what is compared, and the bar.

Every bar was measured on real weights, with a margin (``benchmarks/gates.json``: ViT-Tiny and DeiT-Tiny, 224 px and
480x640, ONNX Runtime and OpenVINO, 112 photographs). The margin covers differences between runtimes and processors: in
8 bits a value near a rounding boundary rounds the other way, and single tokens of DeiT-Tiny whose norm grows from block
to block then differ strongly. A garbage token has a cosine near 0, which ``cosine_min`` still finds.
"""

from __future__ import annotations

# "cosine_*": of each patch token, at least. "cls_cosine": of the worst image, at least. "relative_l2" of the features,
# "norm_bias" (median of the token norms) and "norm_difference" (worst token): relative, at most. "outlier_points":
# change of the norm-outlier rate in percentage points, at most. "neighbours": share of patches whose nearest patch is
# the same, at least. "head_change": share of places whose class changes, or mean relative difference of depth, of the
# worst head, at most; it finds a head that is wired wrong, which changes most places. Where two classes are nearly
# equal, any runtime changes some.
GATES: dict[str, dict[str, float]] = {
    "fp32": {
        "cosine_p1": 0.99999, "cosine_min": 0.9999, "cls_cosine": 0.99999, "relative_l2": 1e-3, "norm_bias": 1e-3,
        "norm_difference": 5e-3, "outlier_points": 0.0,
        "head_change": 0.01,
    },
    "fp16": {
        "cosine_p1": 0.999, "cosine_min": 0.95, "cls_cosine": 0.999, "relative_l2": 0.01, "norm_bias": 3e-3,
        "norm_difference": 0.15, "outlier_points": 0.05,
        "head_change": 0.03,
    },
    "bf16": {
        "cosine_p1": 0.999, "cosine_min": 0.3, "cls_cosine": 0.998, "relative_l2": 0.08, "norm_bias": 0.01,
        "norm_difference": 1.0, "outlier_points": 0.05,
        "head_change": 0.1,
    },
    "int8": {
        "cosine_p1": 0.99, "cosine_min": 0.3, "cls_cosine": 0.85, "relative_l2": 0.2, "norm_bias": 0.03,
        "norm_difference": 2.0, "outlier_points": 0.1, "neighbours": 0.75,
        "head_change": 0.1,
    },
    "fp8": {
        "cosine_p1": 0.99, "cosine_min": 0.3, "cls_cosine": 0.85, "relative_l2": 0.25, "norm_bias": 0.03,
        "norm_difference": 2.0, "outlier_points": 0.1, "neighbours": 0.75,
        "head_change": 0.1,
    },
}  # fmt: skip
# Bars for the bundle's own exam, which holds PyTorch's answers or, in 8 bits, those of the 8-bit graph in ONNX Runtime.
# Two runtimes round one 8-bit graph differently, and each rounding changes others. FP32 and FP16 use the bars above.
EXAM: dict[str, dict[str, float]] = {
    "bf16": {
        "cosine_p1": 0.997, "cosine_min": 0.97, "cls_cosine": 0.999, "relative_l2": 0.06, "norm_bias": 0.01,
        "norm_difference": 0.3, "outlier_points": 0.05,
        "head_change": 0.1,
    },
    "int8": {
        "cosine_p1": 0.97, "cosine_min": 0.93, "cls_cosine": 0.99, "relative_l2": 0.2, "norm_bias": 0.03,
        "norm_difference": 0.25, "outlier_points": 0.1,
        "head_change": 0.1,
    },
    "fp8": {
        "cosine_p1": 0.95, "cosine_min": 0.85, "cls_cosine": 0.98, "relative_l2": 0.3, "norm_bias": 0.03,
        "norm_difference": 0.4, "outlier_points": 0.1,
        "head_change": 0.1,
    },
}  # fmt: skip
# Bars for the runtime that wrote the answers, on another processor: between AVX2 and AVX512-VNNI the 1st percentile was
# .995.
AGAIN: dict[str, float] = {
    "cosine_p1": 0.99, "cosine_min": 0.97, "cls_cosine": 0.995, "relative_l2": 0.1, "norm_bias": 0.01,
    "norm_difference": 0.1, "outlier_points": 0.1,
    "head_change": 0.1,
}  # fmt: skip
# Bars of bundles that serve heads alone. There the classes stand in for the cosines, and the exam's random images may
# have few of them, so that a fault changes few places. Between PyTorch, ONNX Runtime and OpenVINO at most 1 of 10,560
# places changed on each of 8 frames of CamVid (ViT-Tiny and DeiT-Tiny, random heads of 12 classes, FP32).
HEADS_ALONE: dict[str, dict[str, float]] = {"fp32": {"head_change": 0.001}}

SENTENCES = {
    "bad_values": "{figure} NaN or infinite values, expected none",
    "cosine_p1": "1st-percentile patch cosine {figure:.7f}, expected at least {bar}",
    "cosine_min": "smallest patch cosine {figure:.7f}, expected at least {bar}",
    "cls_cosine": "smallest class token cosine {figure:.7f}, expected at least {bar}",
    "relative_l2": "features differ by {figure:.4g} in relative L2, expected at most {bar}",
    "norm_bias": "token norms are off by {figure:.4g} in the median, expected at most {bar}",
    "norm_difference": "a token norm differs by {figure:.4g} of its value, expected at most {bar}",
    "outlier_points": "norm-outlier rate changed by {figure:.4f} points, expected at most {bar}",
    "head_change": "a head's answers change at {figure:.4f} of the places, expected at most {bar}",
    "neighbours": "nearest neighbours of {figure:.4f} of the patches agree, expected at least {bar}",
}
AT_LEAST = {"cosine_p1", "cosine_min", "cls_cosine", "neighbours"}


def exam_bars(precision: str, again: bool = False) -> dict[str, float]:
    """Return the bars for a bundle's own exam.

    Args:
        again: the answers are compared with those of the same runtime; this matters in 8 bits only.
    """
    if again and precision in ("int8", "fp8"):
        return AGAIN
    return EXAM.get(precision, GATES[precision])
