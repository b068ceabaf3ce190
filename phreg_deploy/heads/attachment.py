"""Fold heads into a bundle's graph: the new bundle serves label maps, logits or depth beside the features or alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.heads import ServedHead
from phreg_deploy.bundle.manifest import GRAPH, REFERENCE, Manifest
from phreg_deploy.bundle.writing import write_manifest, write_npz, write_onnx_metadata
from phreg_deploy.errors import PhregError
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.heads.answers import head_answer
from phreg_deploy.heads.head import Head
from phreg_deploy.heads.text_head import TextHead, check_space
from phreg_deploy.layers import DEPTH, LABELS, NORM, SEGMENTATION
from phreg_deploy.onnx_graph.heads import append_head
from phreg_deploy.onnx_graph.wiring import keep_outputs


def attach_heads(
    bundle: Bundle,
    heads: Mapping[str, Head | TextHead],
    output: Path,
    *,
    upsample: str | None,
    stride: int,
    labels: bool,
    only_head: bool,
    force: bool,
) -> Bundle:
    """Write the bundle with heads; arguments and errors as of ``phreg_deploy.heads.attach``."""
    bundle.verify()
    manifest = bundle.manifest
    served = [_serve(name, head, upsample, stride, labels) for name, head in heads.items()]
    for spec, head in zip(served, heads.values()):
        _check(manifest, spec, head)
    taken = [spec.output for spec in (*manifest.heads, *served)]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise PhregError(f"attach: the output {twice} would be there twice; name each head: --head NAME=HEAD.")
    # Weights beside the graph stay where they are.
    graph = onnx.load(bundle.graph, load_external_data=False)
    for spec, head in zip(served, heads.values()):
        append_head(
            graph,
            spec,
            head.weight,
            head.bias,
            inputs=head.inputs,
            patch=manifest.model.patch,
            bins=head.bins,
            depth_range=head.depth_range,
            rule=head.rule if isinstance(head, TextHead) else None,
        )
    outputs = {value.name: value for value in graph.graph.output}
    shapes = {
        spec.output: {
            "dtype": spec.dtype,
            "shape": [side.dim_value or side.dim_param for side in outputs[spec.output].type.tensor_type.shape.dim],
        }
        for spec in served
    }
    manifest = replace(
        manifest,
        heads=(*manifest.heads, *served),
        outputs={**manifest.outputs, **shapes},
        versions={**manifest.versions, "onnx": onnx.__version__},
    )
    if only_head:
        manifest = _heads_alone(manifest)
        keep_outputs(graph, manifest.outputs)
    write_onnx_metadata(graph, manifest)
    with atomic_folder(output, force, [bundle.folder]) as folder:
        for name in manifest.required():
            if name not in (GRAPH, REFERENCE):
                shutil.copyfile(bundle.folder / name, folder / name)
        (folder / GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
        # By its path: weights beside the graph are looked for there.
        onnx.checker.check_model(str(folder / GRAPH))
        exam = _exam(bundle, list(zip(served, heads.values())), {"image", *manifest.outputs})
        write_npz(folder / REFERENCE, exam)
        write_manifest(folder, manifest)
    return Bundle.read(output)


def _serve(name: str, head: Head | TextHead, upsample: str | None, stride: int, labels: bool) -> ServedHead:
    kind = DEPTH if head.task == DEPTH else LABELS if labels else SEGMENTATION
    return ServedHead(
        name, kind, upsample, stride if upsample else None, head.layers, head.classes, head.colours, head.ignore
    )


def _check(manifest: Manifest, served: ServedHead, head: Head | TextHead) -> None:
    """Raise ``PhregError`` unless the bundle serves what the head reads."""
    served.cells(manifest.model.patch)
    if isinstance(head, TextHead):
        check_space(manifest, head, "attach")
    missing = [name for name in head.inputs if name not in manifest.outputs]
    if missing:
        layers = ",".join(str(layer) for layer in head.layers or ())
        raise PhregError(
            f"attach: the head reads {missing[0]}, which the bundle does not serve. Export it with --layers {layers}."
        )
    width = sum(manifest.channels(name) for name in head.inputs)
    if width != head.width:
        raise PhregError(
            f"attach: the head reads {head.width} channels, but {' and '.join(head.inputs)} of the bundle have "
            f"{width}; expected a head that was trained on this model's features."
        )


def _heads_alone(manifest: Manifest) -> Manifest:
    """Drop the outputs that are no head's, but the token norms, and the layers that no head reads."""
    kept = [NORM, *(head.output for head in manifest.heads)]
    read = {layer for head in manifest.heads for layer in head.layers or ()}
    layers = None if manifest.layers is None or not read else replace(manifest.layers, blocks=tuple(sorted(read)))
    return replace(manifest, only_heads=True, layers=layers, outputs={name: manifest.outputs[name] for name in kept})


def _exam(bundle: Bundle, heads: list[tuple[ServedHead, Head | TextHead]], tensors: set[str]) -> dict[str, np.ndarray]:
    """Return ``tensors`` of the bundle's exam with the heads' answers to its features, computed by numpy."""
    exam: dict[str, np.ndarray] = {}
    for case, arrays in enumerate(bundle.cases()):
        answers = {spec.output: head_answer(spec, head, arrays, arrays["image"]) for spec, head in heads}
        arrays = {**arrays, **answers}
        exam.update({f"{case}/{name}": value for name, value in arrays.items() if name in tensors})
    return exam
