"""The reference for a bundle's answers: a PyTorch model's, and what its heads serve, computed in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.heads import JOINT_BILATERAL, ServedHead
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.heads.head import Head
from phreg_deploy.heads.text_head import TextHead
from phreg_deploy.images.upsampling import joint_bilateral, upsample
from phreg_deploy.layers import ATTENTION, DEPTH, SEGMENTATION, Layers

Outputs = dict[str, np.ndarray]
# Images -> a bundle's outputs by name.
Answers = Callable[[np.ndarray], Outputs]


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


def answers_of(model: Any, manifests: Sequence[Manifest]) -> Answers:
    """Return a PyTorch model's answers to images, uint8 ``(B, H, W, 3)``: every output that a bundle has without heads.

    Args:
        model: of ``load_model``. manifests: of the bundles, which have one preprocessing.
    """
    from phreg_deploy.models.answers import model_answers

    served = [manifest.layers for manifest in manifests if manifest.layers is not None]
    blocks = sorted({block for layers in served for block in layers.blocks})
    layers = Layers(tuple(blocks), served[0].norm) if served else None
    attention = any(ATTENTION in manifest.outputs for manifest in manifests)
    return model_answers(model, manifests[0].preprocess, layers=layers, attention=attention)


def with_heads(answers: Answers, bundle: Bundle) -> Answers:
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
