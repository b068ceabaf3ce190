"""Export a supported timm ViT: load, fold, trace, make the exam, narrow to FP16 or BF16, write the bundle."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# isort: off
import phreg_deploy.export.needs  # noqa: F401  (first: it names whichever of the next three are missing)
import onnx
import timm
import torch

# isort: on
import numpy as np

from phreg_deploy import __version__
from phreg_deploy.arguments import check_model
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import GRAPH, POSITIONS, REFERENCE, ROTARY, WEIGHTS, Manifest
from phreg_deploy.bundle.validity import check_extent, check_table
from phreg_deploy.bundle.writing import write_manifest, write_npz, write_onnx_metadata
from phreg_deploy.errors import PhregError
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.export.exam import at_size, make_exam
from phreg_deploy.export.folding import patch_positions
from phreg_deploy.export.rotary import describe_rotary, rotary_tables
from phreg_deploy.export.trace import OPSET, Traced, trace
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.images.photographs import list_images, read_fitted
from phreg_deploy.layers import Layers, parse_layers
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import load_model, model_preprocess, model_spec
from phreg_deploy.models.origin import find_origin, unknown_origin
from phreg_deploy.models.readouts import with_readout
from phreg_deploy.models.weights import weights_digest
from phreg_deploy.onnx_graph.external import fits, write_graph
from phreg_deploy.onnx_graph.mixed_precision import islands, narrow
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.readout import PLAIN, Readout
from phreg_deploy.spec import Batches, Preprocess, Sizes
from phreg_deploy.student_record import model_path, read_record, recorded, recorded_median, recorded_readout

# Photographs, beside the exam's images, that the ranges for FP16 are measured on, at most.
MOST_PHOTOGRAPHS = 16


@dataclass(frozen=True)
class ExportRequest:
    """What to export, see ``phreg_deploy.export.export``."""

    model: str
    checkpoint: Path | None = None
    precision: str = "fp32"
    image_size: str | None = None
    batch: str = "1"
    crop: str = "squash"
    random_weights: bool = False
    images: Path | None = None
    keep: tuple[str, ...] = ()
    layers: str | None = None
    layer_norm: bool = True
    attention: bool = False
    readout: Readout = PLAIN


@dataclass(frozen=True)
class _Source:
    """The model and what the bundle says of it. ``recipe``, ``norm_median``: of a student's record, else None."""

    model: ViT
    preprocess: Preprocess
    sizes: Sizes
    batches: Batches
    recipe: str | None
    norm_median: float | None
    layers: Layers | None
    attention: bool


def export_bundle(request: ExportRequest, output: Path, *, force: bool = False, progress: Progress = SILENT) -> Bundle:
    """Write a bundle of ``request.model`` to ``output``; see ``phreg_deploy.export.export``."""
    photographs = [] if request.images is None else list_images(request.images, MOST_PHOTOGRAPHS, spread=True)
    with progress.task(f"export {request.precision}", 4) as advance:
        source = _load(request)
        advance(note="folding")
        sized = at_size(source.model, source.sizes.default)
        outputs: dict[str, Any] = {"layers": source.layers, "attention": source.attention}
        module = DenseViT(sized, source.preprocess, positions_as_input=source.sizes.dynamic, **outputs)
        advance(note="tracing")
        traced = trace(module, source.sizes, source.batches)
        advance(note="reference")
        exam = make_exam(source.model, source.preprocess, source.sizes, source.batches, **outputs)
        float_parts = _narrow(traced, source, exam, photographs, request)
        _write(output, force, traced.model, exam, source, _manifest(request, source, traced.model, float_parts))
        advance(note="")
    return Bundle.read(output)


def _load(request: ExportRequest) -> _Source:
    """Load the model, and check its sizes and its record before minutes of tracing."""
    model = load_model(request.model, checkpoint=request.checkpoint, random_weights=request.random_weights)
    model = with_readout(model, request.readout)
    height, width = model.patch_embed.img_size
    sizes = Sizes.parse(request.image_size or f"{height}x{width}", tuple(model.patch_embed.patch_size))
    batches = Batches.parse(request.batch)
    check_extent(sizes, batches)
    rotary = describe_rotary(model) if sizes.dynamic else None
    if rotary is not None:
        check_table(rotary[0], sizes, tuple(model.patch_embed.patch_size))
    layers = None
    if request.layers is not None:
        layers = Layers(parse_layers(request.layers, len(model.blocks)), request.layer_norm)
    request.readout.check_outputs(() if layers is None else layers.blocks, len(model.blocks), request.attention)
    if request.attention:
        _check_attention(request.model, model)
    folder = model_path(request.model)
    record = None if request.random_weights else read_record(folder)
    # Norms of another readout are not comparable.
    known = recorded_readout(record, folder) == request.readout
    return _Source(
        model=model,
        preprocess=model_preprocess(model, request.crop),
        sizes=sizes,
        batches=batches,
        recipe=None if record is None else recorded(record, folder, "recipe", "name"),
        norm_median=recorded_median(record, folder) if record is not None and known else None,
        layers=layers,
        attention=request.attention,
    )


def _check_attention(name: str, model: ViT) -> None:
    """Raise ``PhregError`` unless the model has a class token whose attention can be served."""
    if model.cls_token is None:
        pooled = getattr(model, "attn_pool", None) is not None
        reason = "it pools its patches by an attention of its own" if pooled else "it averages its patches"
        raise PhregError(
            f"attention: {name} has no class token ({reason}), so there is no class token's attention to serve. Leave "
            "out --attention, or choose a model with a class token, such as DINOv2 or CLIP."
        )


def _narrow(
    traced: Traced, source: _Source, exam: dict[str, np.ndarray], photographs: list[Path], request: ExportRequest
) -> list[str]:
    """Convert the graph to FP16 or BF16, in place; return what stays in FP32, as the manifest lists it."""
    if request.precision == "fp32":
        return []
    images = [read_fitted(path, source.sizes.default, source.preprocess) for path in photographs]
    _observe(traced, source, exam, images)
    return islands(narrow(traced.model, request.precision, traced.largest, request.keep), request.precision)


def _observe(traced: Traced, source: _Source, exam: dict[str, np.ndarray], images: list[np.ndarray]) -> None:
    """Measure the largest magnitude of every tensor on the exam's images, at every size, and on photographs."""
    batches = [value for name, value in exam.items() if name.endswith("/image")]
    count = len(batches[0])
    for start in range(0, len(images), count):
        part = images[start : start + count]
        batches.append(np.stack(part + part[-1:] * (count - len(part))))
    for batch in batches:
        tables = []
        if source.sizes.dynamic:
            sized = at_size(source.model, (batch.shape[1], batch.shape[2]))
            tables = [table for table in (patch_positions(sized), rotary_tables(sized)) if table is not None]
        traced.observe(torch.from_numpy(batch), *tables)


def _manifest(request: ExportRequest, source: _Source, graph: onnx.ModelProto, float_parts: list[str]) -> Manifest:
    rotary = describe_rotary(source.model) if source.sizes.dynamic else None
    folder = check_model(request.model, request.checkpoint, request.random_weights)
    if request.random_weights:
        origin = unknown_origin(request.model)
    else:
        origin = find_origin(request.model, folder, request.checkpoint)
    return Manifest(
        model=model_spec(source.model),
        preprocess=source.preprocess,
        sizes=source.sizes,
        batches=source.batches,
        precision=request.precision,
        opset=OPSET,
        inputs=_describe(graph.graph.input),
        outputs=_describe(graph.graph.output),
        source={**origin, "weights_sha256": weights_digest(source.model), "distilled": source.recipe},
        versions={
            "phreg_deploy": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "onnx": onnx.__version__,
            "python": platform.python_version(),
        },
        norm_median=source.norm_median,
        rotary=None if rotary is None else rotary[0],
        layers=source.layers,
        readout=request.readout,
        float_parts=float_parts,
        random_weights=request.random_weights,
    )


def _describe(values: Any) -> dict[str, dict[str, Any]]:
    """Map the names of a graph's inputs or outputs to their ``dtype`` and ``shape``."""
    described = {}
    for value in values:
        tensor = value.type.tensor_type
        described[value.name] = {
            "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
            "shape": [dim.dim_value or dim.dim_param for dim in tensor.shape.dim],
        }
    return described


def _write(
    output: Path, force: bool, graph: onnx.ModelProto, exam: dict[str, np.ndarray], source: _Source, manifest: Manifest
) -> None:
    manifest = replace(manifest, weights=None if fits(graph) else WEIGHTS)
    write_onnx_metadata(graph, manifest)
    positions, rotary = patch_positions(source.model), describe_rotary(source.model)
    with atomic_folder(output, force) as folder:
        write_graph(graph, folder / GRAPH, manifest.weights)
        write_npz(folder / REFERENCE, exam)
        if source.sizes.dynamic and positions is not None:
            grid = positions.reshape(*source.model.patch_embed.grid_size, -1).numpy().astype(np.float32)
            np.save(folder / POSITIONS, grid, allow_pickle=False)
        if source.sizes.dynamic and rotary is not None:
            np.save(folder / ROTARY, rotary[1].numpy(), allow_pickle=False)
        write_manifest(folder, manifest)
