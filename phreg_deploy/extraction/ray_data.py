"""Extract all shards by Ray Data: a pool of actors, each with its own extractor and device, takes one after another."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phreg_deploy.errors import RESUME, BackendMissing, PhregError
from phreg_deploy.extraction.formats import check_format
from phreg_deploy.extraction.inputs.shards import Shard
from phreg_deploy.extraction.inputs.sources import find_images
from phreg_deploy.extraction.parts import PLAN
from phreg_deploy.extraction.sharded import extract_shard
from phreg_deploy.extraction.task import ExtractionOptions
from phreg_deploy.extras import require
from phreg_deploy.json_files import read_json
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.runtime.features import FeatureExtractor

MODULES = ("pyarrow", "ray")
# Shards for each actor: a killed actor's shard goes to another one, and the last ones end at about the same time.
SHARDS_EACH = 8
GPU_BACKENDS = ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt")


@dataclass(frozen=True)
class RayRequest:
    """What every actor does: ``load``, the arguments of ``FeatureExtractor.load``, and those of ``extract_shard``."""

    images: tuple[str, ...]
    output: str
    load: dict[str, Any]
    options: ExtractionOptions
    format: str = "npy"
    max_bad: str | None = None


@dataclass
class RayExtraction:
    """What all actors did together; the fields are those of ``ShardExtraction``, and ``shards`` is their number."""

    output: str
    shards: int
    workers: int
    images: int = 0
    kept: int = 0
    extracted: int = 0
    joined: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ShardActor:
    """An extractor in a process of Ray. A call extracts one shard, and keeps what a killed actor finished of it."""

    def __init__(self, request: RayRequest) -> None:
        self.request = request
        self.sources = find_images([Path(image) for image in request.images], request.options.outputs)
        self.extractor = FeatureExtractor.load(**request.load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Take columns ``number`` and ``count`` of one shard; return what was done, or the error, in columns."""
        shard, asked = Shard(int(batch["number"][0]), int(batch["count"][0])), self.request
        try:
            done = extract_shard(
                self.extractor,
                self.sources,
                Path(asked.output),
                asked.options,
                shard,
                format=asked.format,
                max_bad=asked.max_bad,
                resume=True,
            ).to_json()
        except PhregError as error:
            return {"error": [str(error)], "code": [error.exit_code], "done": ["{}"]}
        return {"error": [""], "code": [0], "done": [json.dumps(done)]}


def check_ray(workers: int, shard: object, force: bool = False) -> None:
    """Raise ``PhregError`` for options that exclude each other, ``BackendMissing`` without Ray, before any work."""
    if shard is not None:
        raise PhregError("ray: got --ray and --shard; expected one of them. --ray divides the images itself.")
    if force:
        raise PhregError("ray: got --ray and --force, which several processes cannot have; choose another output.")
    if workers < 1:
        raise PhregError(f"ray: got {workers}, expected at least one actor.")
    require("`--ray`", ray=MODULES)


def extract_on_ray(
    request: RayRequest, workers: int, *, resume: bool = False, progress: Progress = SILENT
) -> RayExtraction:
    """Write the features of all images by ``workers`` actors, into an output as ``extract_shard`` writes it.

    Connects to the cluster of ``RAY_ADDRESS``, or starts one on this machine. Every machine must see the images, the
    bundle and the output by the same paths. Ray restarts an actor that dies and gives its shard to another; what it
    finished is kept. An actor takes a GPU for backends that run on one, and else ``threads`` processors.

    Args:
        resume: continue an output, with the number of shards that it was begun with.

    Raises:
        PhregError: as ``extract_shard``, after every shard was tried. BackendMissing: Ray is not installed.
    """
    check_ray(workers, None)
    check_format(request.format, request.options)
    count = _shards_of(Path(request.output), resume) or workers * SHARDS_EACH
    result = RayExtraction(request.output, count, workers)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core prints an error for every pool of actors that may restart (ray-project/ray#53727), also for this one.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendMissing(f'ray: it cannot be imported ({error}). Run: pip install "phreg-deploy[ray]"') from None
    mine = not ray.is_initialized()
    if mine:
        local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **local)
    try:
        _quieten(ray.data)
        gpu = request.load.get("backend") in GPU_BACKENDS
        shards = ray.data.from_items(
            [{"number": n, "count": count} for n in range(1, count + 1)], override_num_blocks=count
        )
        done = shards.map_batches(
            ShardActor,
            fn_constructor_args=(request,),
            batch_size=1,
            # One shard waits for no busy actor while another one is free.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_gpus=1 if gpu else None,
            num_cpus=None if gpu else request.load.get("threads") or 1,
        )
        _gather(done, result, progress)
    finally:
        if mine:
            ray.shutdown()
    return result


def _quieten(data: Any) -> None:
    """Let Ray Data print errors alone on the terminal: the progress is ours. Its log file keeps the rest."""
    data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def _shards_of(output: Path, resume: bool) -> int | None:
    """The number of shards that an output was begun with; None if it was not begun."""
    if not (output / PLAN).exists():
        return None
    if not resume:
        raise PhregError(f"ray: {output} was begun before; add {RESUME} to continue it, or choose another output.")
    try:
        return Shard.parse(f"1/{read_json(output / PLAN)['shards']}").count
    except (OSError, ValueError, KeyError, TypeError):
        raise PhregError(f"output: {output / PLAN} is damaged; choose another output, or remove it.") from None


def _gather(rows: Any, result: RayExtraction, progress: Progress) -> None:
    """Add up what the actors did. Raises the first error, after all are done."""
    errors: list[tuple[str, int]] = []
    with progress.task("shards", result.shards) as advance:
        for row in rows.iter_rows():
            advance()
            if row["error"]:
                errors.append((row["error"], row["code"]))
                continue
            one = json.loads(row["done"])
            for key in ("images", "kept", "extracted"):
                setattr(result, key, getattr(result, key) + one[key])
            result.skipped.update(one["skipped"])
            result.joined = result.joined or one["joined"]
    if errors:
        kind = BackendMissing if errors[0][1] == BackendMissing.exit_code else PhregError
        raise kind(f"{errors[0][0]} {len(errors)} of {result.shards} shards failed.", result.to_json())
