"""``export``: a student or any supported timm ViT -> a bundle folder with its own exam inside."""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: off
import phreg_deploy.export.needs  # noqa: F401  (first: it says which of the next three is missing)
import onnx
import timm
import torch

# isort: on
import numpy as np

from phreg_deploy import __version__
from phreg_deploy.arguments import EIGHT_BITS, FLOATS, check_export, check_model
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import GRAPH, POSITIONS, REFERENCE, Manifest
from phreg_deploy.bundle.validity import check_extent
from phreg_deploy.bundle.writing import write_manifest, write_npz, write_onnx_metadata
from phreg_deploy.errors import PhregError
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.export.folding import patch_positions
from phreg_deploy.export.trace import OPSET, Traced, check_size, trace
from phreg_deploy.files.atomic import atomic_folder, check_target
from phreg_deploy.images.photographs import list_images, read_fitted
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import load_model, model_preprocess, model_spec
from phreg_deploy.models.origin import find_origin, unknown_origin
from phreg_deploy.models.weights import weights_digest
from phreg_deploy.onnx_graph.mixed_precision import islands, narrow
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.spec import Batches, Preprocess, Sizes
from phreg_deploy.student_record import model_path, read_record, recorded, recorded_median

SEED = 417  # of the reference's inputs
WATCHED = 16  # photographs at most that ranges are taken on, beside the reference's inputs


@dataclass(frozen=True)
class ExportRequest:
    """What to export. ``image_size`` and ``batch`` as on the command line (``Sizes.parse``, ``Batches.parse``).

    ``images``: photographs that show what reaches beyond FP16's range. ``keep``: regular expressions on names of nodes
    that stay in FP32.
    """

    model: str
    checkpoint: Path | None = None
    precision: str = "fp32"
    image_size: str | None = None
    batch: str = "1"
    crop: str = "squash"
    random_weights: bool = False
    images: Path | None = None
    keep: tuple[str, ...] = ()


def export_bundle(request: ExportRequest, output: Path, *, force: bool = False, progress: Progress = SILENT) -> Bundle:
    """Write a bundle of ``request.model`` to ``output``.

    Raises:
        PhregError: bad input, an output that exists, a size that is not a multiple of the patch, or a range of sizes
            for a model whose rotary embedding cannot be an input.
    """
    if request.precision in EIGHT_BITS:
        raise PhregError(
            f"precision: got {request.precision}, which `phreg-deploy calibrate` makes of an fp32 bundle; expected {', '.join(FLOATS)}."
        )
    check_export(request.precision, request.keep, request.images, request.image_size, request.batch)
    check_target(output, force, [model_path(request.model), request.checkpoint])
    photographs = [] if request.images is None else list_images(request.images, WATCHED, spread=True)
    batches = Batches.parse(request.batch)
    with progress.task(f"export {request.precision}", 4) as advance:
        model = load_model(request.model, checkpoint=request.checkpoint, random_weights=request.random_weights)
        native = tuple(model.patch_embed.img_size)
        sizes = Sizes.parse(request.image_size or f"{native[0]}x{native[1]}", tuple(model.patch_embed.patch_size))
        if sizes.dynamic and getattr(model, "rope", None) is not None:
            raise PhregError(
                f"image size: got {request.image_size!r}, but {request.model} has a rotary position embedding, which is baked for one size. Export one bundle per size."
            )
        check_extent(sizes, batches)
        preprocess = model_preprocess(model, request.crop)
        record = None if request.random_weights else _record(request.model)
        base_positions = _grid(model)
        advance(note="folding")
        sized = _at(model, sizes.default)
        lean = DenseViT(sized, preprocess, positions_as_input=sizes.dynamic)
        advance(note="tracing")
        traced = trace(lean, sizes, batches)
        advance(note="reference")
        exam = reference(model, preprocess, sizes, batches)
        graph, kept = traced.model, []
        if request.precision != "fp32":
            _observe(traced, model, exam, [read_fitted(p, sizes.default, preprocess) for p in photographs], sizes)
            kept = islands(narrow(graph, request.precision, traced.largest, request.keep), request.precision)
        check_size(graph)
        manifest = _manifest(request, model, graph, preprocess, sizes, batches, record, kept)
        write_onnx_metadata(graph, manifest)
        with atomic_folder(output, force) as folder:
            (folder / GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
            write_npz(folder / REFERENCE, exam)
            if sizes.dynamic and base_positions is not None:
                np.save(folder / POSITIONS, base_positions, allow_pickle=False)
            write_manifest(folder, manifest)
        advance(note="")
    return Bundle.read(output)


@torch.inference_mode()
def reference(model: ViT, preprocess: Preprocess, sizes: Sizes, batches: Batches) -> dict[str, np.ndarray]:
    """The exam: seeded images at every size of interest, and what the *untouched* PyTorch model answers, in float32.

    Returns:
        ``{case}/image`` uint8 ``(B, H, W, 3)``, ``{case}/features`` ``(B, Hp, Wp, C)``, ``{case}/cls`` ``(B, C)`` where
        there is a class token, ``{case}/token_norm`` ``(B, Hp, Wp)``.
    """
    rng, exam = np.random.default_rng(SEED), {}
    batch = min(2, batches.highest) if batches.dynamic else batches.best
    for case, size in enumerate(dict.fromkeys(sizes.sizes)):
        sized = _at(model, size)
        images = np.stack([_image(rng, size) for _ in range(batch)])
        seen = hooks.forward(sized, hooks.normalise(images, preprocess.mean, preprocess.std))
        grid = tuple(sized.patch_embed.grid_size)
        answers = {
            "image": images, "features": seen.patches.numpy().reshape(batch, *grid, -1), "token_norm": seen.norms.numpy().reshape(batch, *grid),
            **({} if seen.cls is None else {"cls": seen.cls.numpy()}),
        }  # fmt: skip
        exam.update({f"{case}/{name}": value for name, value in answers.items()})
    return exam


def _observe(
    traced: Traced, model: ViT, exam: dict[str, np.ndarray], photographs: list[np.ndarray], sizes: Sizes
) -> None:
    """What every tensor of the graph reaches on the reference's inputs, at every size, and on photographs."""
    batches = [value for name, value in exam.items() if name.endswith("/image")]
    count = len(batches[0])
    for start in range(0, len(photographs), count):
        part = photographs[start : start + count]
        batches.append(np.stack(part + part[-1:] * (count - len(part))))
    for batch in batches:
        sized = _at(model, (batch.shape[1], batch.shape[2]))
        positions = patch_positions(sized) if sizes.dynamic else None
        traced.observe(torch.from_numpy(batch), *([] if positions is None else [positions]))


def _image(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Something between noise and a photograph: coarse and fine random fields added up, uint8 ``(H, W, 3)``."""
    total = np.zeros((*size, 3))
    for cells, strength in ((3, 70), (9, 40), (31, 25), (113, 12)):
        coarse = rng.standard_normal((cells, cells, 3))
        rows = np.linspace(0, cells - 1, size[0]).astype(int)
        columns = np.linspace(0, cells - 1, size[1]).astype(int)
        total += strength * coarse[rows][:, columns]
    return np.clip(total + 120, 0, 255).astype(np.uint8)


def _at(model: ViT, size: tuple[int, int]) -> ViT:
    """The model at another input size; the original keeps its own position embedding."""
    if tuple(model.patch_embed.img_size) == size:
        return model
    sized = copy.deepcopy(model)
    sized.set_input_size(img_size=size)
    return sized.eval()


def _grid(model: ViT) -> np.ndarray | None:
    positions = patch_positions(model)
    return None if positions is None else positions.reshape(*model.patch_embed.grid_size, -1).numpy().astype(np.float32)


def _record(name: str) -> dict[str, Any] | None:
    folder = model_path(name)
    record = read_record(folder)
    if record is not None:  # what the manifest takes from it, before a minute of tracing
        recorded(record, folder, "recipe", "name")
        recorded_median(record, folder)
    return record


def _manifest(
    request: ExportRequest,
    model: ViT,
    graph: onnx.ModelProto,
    preprocess: Preprocess,
    sizes: Sizes,
    batches: Batches,
    record: dict[str, Any] | None,
    kept: list[str],
) -> Manifest:
    def describe(values: Any) -> dict[str, dict[str, Any]]:
        names = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name for v in values}
        return {
            v.name: {
                "dtype": names[v.name],
                "shape": [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim],
            }
            for v in values
        }

    folder = check_model(request.model, request.checkpoint, request.random_weights)
    origin = (
        unknown_origin(request.model)
        if request.random_weights
        else find_origin(request.model, folder, request.checkpoint)
    )
    return Manifest(
        model=model_spec(model), preprocess=preprocess, sizes=sizes, batches=batches, precision=request.precision, opset=OPSET,
        inputs=describe(graph.graph.input), outputs=describe(graph.graph.output),
        source={**origin, "weights_sha256": weights_digest(model), "distilled": None if record is None else record["recipe"]["name"]},
        versions={"phreg_deploy": __version__, "torch": torch.__version__, "timm": timm.__version__, "onnx": onnx.__version__, "python": platform.python_version()},
        norm_median=None if record is None else recorded_median(record, model_path(request.model)),
        float_parts=kept,
        random_weights=request.random_weights,
    )  # fmt: skip
