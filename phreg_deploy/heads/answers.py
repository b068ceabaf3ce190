"""Compute in numpy what heads in a bundle's graph serve: the reference for its exam and for ``check``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.heads import JOINT_BILATERAL, ServedHead
from phreg_deploy.heads.head import Head
from phreg_deploy.heads.text_head import TextHead
from phreg_deploy.images.upsampling import joint_bilateral, upsample
from phreg_deploy.layers import DEPTH, SEGMENTATION

Outputs = dict[str, np.ndarray]


def head_answer(
    served: ServedHead, head: Head | TextHead, outputs: Mapping[str, np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Return the output of one head, see ``ServedHead``.

    Args:
        outputs: a bundle's outputs by name, of which the head reads features. images: uint8 RGB ``(B, H, W, 3)``.
    """
    features = head.select({name: outputs[name].astype(np.float32, copy=False) for name in head.inputs})
    logits = head.logits(features)
    if served.stride is not None:
        logits = _enlarge(served.upsampling, logits, images, served.stride)
    return logits if served.kind == SEGMENTATION else head.decide(logits)


def attached_heads(bundle: Bundle) -> list[tuple[ServedHead, Head | TextHead]]:
    """Read a bundle's heads from its graph; needs onnx."""
    if not bundle.manifest.heads:
        return []
    import onnx

    from phreg_deploy.onnx_graph.heads import read_head

    graph = onnx.load(bundle.graph, load_external_data=False)
    heads: list[tuple[ServedHead, Head | TextHead]] = []
    for served in bundle.manifest.heads:
        task = DEPTH if served.kind == DEPTH else SEGMENTATION
        facts = read_head(graph, served)
        rule = facts.pop("rule")
        if rule is not None:
            heads.append((served, TextHead(facts["weight"], facts["bias"], rule, served.classes)))
            continue
        head = Head(
            **facts,
            task=task,
            layers=served.layers,
            classes=served.classes,
            colours=served.colours,
            ignore=served.ignore,
        )
        heads.append((served, head))
    return heads


def with_heads(answers: Callable[[np.ndarray], Outputs], bundle: Bundle) -> Callable[[np.ndarray], Outputs]:
    """Add the outputs of a bundle's heads to what ``answers`` computes for images, uint8 ``(B, H, W, 3)``."""
    heads = attached_heads(bundle)

    def answer(images: np.ndarray) -> Outputs:
        outputs = answers(images)
        return outputs | {served.output: head_answer(served, head, outputs, images) for served, head in heads}

    return answer


def _enlarge(method: str | None, logits: np.ndarray, images: np.ndarray, stride: int) -> np.ndarray:
    if method == JOINT_BILATERAL:
        return joint_bilateral(logits, images, stride)
    return upsample(logits, (images.shape[1] // stride, images.shape[2] // stride))
