"""The ``config.pbtxt`` of a model: names, types and shapes, batching, instances and warm-up.

Fields: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phreg_deploy.bundle.exam import answer_shape
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.errors import PhregError
from phreg_deploy.model_repository.text_format import Symbol, to_text

ONNXRUNTIME, OPENVINO, TENSORRT = "onnxruntime", "openvino", "tensorrt"
BACKENDS = (ONNXRUNTIME, OPENVINO, TENSORRT)
TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}
# Microseconds for which a request waits for others, and after which it is refused; requests that may wait.
DELAY, PATIENCE, MOST_WAITING = 2000, 30_000_000, 64


def write_config(
    name: str,
    manifest: Manifest,
    size: tuple[int, int] | None,
    backend: str,
    *,
    instances: int = 1,
    profiles: int = 0,
    plans: dict[str, str] | None = None,
) -> str:
    """Return the text of ``config.pbtxt``.

    Args:
        size: (height, width) of the images; None for any size of the bundle's range.
        instances: copies of the model that run at a time.
        profiles, plans: of the backend "tensorrt": optimization profiles, and the plan's file by compute capability.

    Raises:
        PhregError: the bundle's smallest batch is not 1, and it serves others: Triton forms batches from 1 on.
    """
    batches = manifest.batches
    if batches.dynamic and batches.lowest > 1:
        raise PhregError(
            f"triton: the bundle serves {batches} images, and Triton forms batches of 1 image on. Export it with "
            f"--batch 1:{batches.best}:{batches.highest}, or with one batch size."
        )
    most = _most(manifest, backend)
    shown = size or manifest.sizes.default
    image = (most or batches.highest, *shown, 3)
    free = size is None
    config: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "default_model_filename": "model.plan" if backend == TENSORRT else "model.onnx",
        "max_batch_size": most,
        "input": [_tensor("image", manifest.inputs["image"]["dtype"], image, most, (1, 2) if free else ())],
        "output": [
            _tensor(output, described["dtype"], answer_shape(manifest, output, image), most, _free(described, free))
            for output, described in manifest.outputs.items()
        ],
        "instance_group": [_instances(backend, instances, profiles)],
        "dynamic_batching": _batching(most, batches.best, backend) if most else None,
        "parameters": _parameters(backend),
        "model_warmup": [_warm_up(number, shown, most, batches.highest) for number in _batch_sizes(most, batches.best)],
    }
    if plans:
        del config["default_model_filename"]
        config["cc_model_filenames"] = [{"key": capability, "value": file} for capability, file in plans.items()]
    return to_text(config)


def _most(manifest: Manifest, backend: str) -> int:
    """Return Triton's ``max_batch_size``, 0 for a graph with one batch size, which is then part of its shape.

    The OpenVINO backend fills every batch up to the largest, so its largest is the bundle's best.
    """
    batches = manifest.batches
    if not batches.dynamic:
        return 0
    return batches.best if backend == OPENVINO else batches.highest


def _tensor(name: str, dtype: str, shape: Sequence[int], most: int, free: Sequence[int]) -> dict[str, Any]:
    """``free``: axes of ``shape`` of any length."""
    dims = [-1 if axis in free else int(side) for axis, side in enumerate(shape)]
    return {"name": name, "data_type": Symbol(TYPES[dtype]), "dims": dims[1:] if most else dims}


def _free(described: dict[str, Any], free: bool) -> tuple[int, ...]:
    """Return the axes of an output that follow from the size of the image: those with a name, but for the batch."""
    return tuple(axis for axis, side in enumerate(described["shape"]) if free and axis and isinstance(side, str))


def _instances(backend: str, count: int, profiles: int) -> dict[str, Any]:
    kind = "KIND_GPU" if backend == TENSORRT else "KIND_CPU"
    chosen = [str(number) for number in range(profiles)]
    return {"count": count, "kind": Symbol(kind), "profile": chosen or None}


def _batching(most: int, best: int, backend: str) -> dict[str, Any]:
    policy = {
        "timeout_action": Symbol("REJECT"),
        "default_timeout_microseconds": PATIENCE,
        "max_queue_size": MOST_WAITING,
    }
    return {
        "preferred_batch_size": [min(best, most)],
        "max_queue_delay_microseconds": DELAY,
        "default_queue_policy": policy,
    }


def _parameters(backend: str) -> list[dict[str, Any]] | None:
    """OpenVINO's backend takes full batches only, unless it may fill them up."""
    if backend != OPENVINO:
        return None
    values = {"ENABLE_BATCH_PADDING": "YES", "PERFORMANCE_HINT": "LATENCY"}
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def _batch_sizes(most: int, best: int) -> list[int]:
    return sorted({1, min(best, most)}) if most else [1]


def _warm_up(number: int, size: tuple[int, int], most: int, whole: int) -> dict[str, Any]:
    dims = [*size, 3] if most else [whole, *size, 3]
    data = {"data_type": Symbol("TYPE_UINT8"), "dims": dims, "random_data": True}
    name = f"batch-{number if most else whole}"
    return {"name": name, "batch_size": number, "inputs": [{"key": "image", "value": data}]}
