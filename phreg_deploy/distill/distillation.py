"""``distill``: from a model's name and a folder of images to a student's folder, resumable and never half-written."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch

from phreg_deploy import __version__
from phreg_deploy.arguments import check_distillation, check_model
from phreg_deploy.distill.evaluation import compare
from phreg_deploy.distill.fake_quantisation import observe, quantised_layers
from phreg_deploy.distill.recipes import Recipe, default_rate, find_recipe
from phreg_deploy.distill.register_neurons import RegisterNeuron, Survey, survey
from phreg_deploy.distill.teacher import TargetCache, Teacher
from phreg_deploy.distill.training import train
from phreg_deploy.distill.transplant import STRENGTH, silence, transplant
from phreg_deploy.distill.work_folder import work_folder
from phreg_deploy.errors import PhregError, write_error
from phreg_deploy.files.atomic import atomic_folder, check_target
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.models.batches import Batches, spread
from phreg_deploy.models.checkpoint import write_record, write_student
from phreg_deploy.models.hardware import find_autocast, find_devices, quickest_attention
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.identity import model_identity
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.models.origin import find_origin
from phreg_deploy.models.registers import add_registers
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.spec import Preprocess
from phreg_deploy.student_record import model_path
from phreg_deploy.views import check_views

SURVEYED = 256  # images that neurons are searched and transplanted on
RANGED = 128  # images that the ranges of fake quantisation are observed on


@dataclass(frozen=True)
class Request:
    """Everything that decides which student comes out; two equal requests give the same student.

    ``registers``, ``epochs``, ``lr`` and ``batch`` None: the recipe's. ``strength``: of a transplanted neuron, as a share
    of what it had on outlier tokens; None for ``STRENGTH``. ``holdout``: share of the images, chosen by name, that scores
    are taken on and that training never sees. ``views``: per image and target. ``int8_aware``: distil through fake
    quantisation. ``device``: ``auto``, a device, or several GPUs, ``cuda:0,cuda:1``, over which targets and batches are
    spread. ``micro_batch``: most images per forward and backward pass. ``grad_checkpointing``: recompute each block in the
    backward pass. The last two and the number of GPUs change the student by rounding alone.
    """

    model: str
    images: Path
    checkpoint: Path | None = None
    recipe: str = "transplant"
    registers: int | None = None
    image_size: tuple[int, int] | None = None
    epochs: int | None = None
    lr: float | None = None
    batch: int | None = None
    views: int = 10
    strength: float | None = None
    unlock: str | None = None
    holdout: float = 0.1
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    int8_aware: bool = False
    micro_batch: int | None = None
    grad_checkpointing: bool = False


def distill(
    request: Request,
    output: Path,
    *,
    cache: Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Distil registers into a model and write the student to ``output``.

    Args:
        cache: where denoised targets are kept; by default ``$XDG_CACHE_HOME/phreg-deploy``.
        resume: go on with an interrupted run of the same settings, kept in ``OUTPUT.partial``.

    Returns:
        The student's record (``phreg.json``): recipe, seed, digests, versions, scores before and after. The student is
        written before it is scored; where scoring fails, ``scores`` holds the reason as ``missing``.

    Raises:
        PhregError: bad input, an output that exists, another run's leftovers, a loss that is not finite.
    """
    started = time.perf_counter()
    check_distillation(vars(request))
    check_target(output, force, [model_path(request.model), request.images, request.checkpoint])
    recipe, devices = _recipe(request), find_devices(request.device)
    device, autocast = devices[0], all(find_autocast(request.precision, name) for name in devices)
    base = load_model(request.model, checkpoint=request.checkpoint, image_size=request.image_size)
    origin = find_origin(request.model, check_model(request.model, request.checkpoint), request.checkpoint)
    check_views(request.views, tuple(base.patch_embed.grid_size))
    recipe = replace(recipe, lr=request.lr if request.lr is not None else default_rate(recipe, base.embed_dim))
    preprocess = model_preprocess(base, "center")
    photographs = read_photographs(request.images, tuple(base.patch_embed.img_size), preprocess, say=progress.say)
    training, held = split(photographs, request.holdout)
    progress.say(
        f"{len(training)} images to train on, {len(held) if held else 0} held out for scores; {','.join(devices)}, {'bfloat16 autocast' if autocast else 'float32'}."
    )

    student = add_registers(base, recipe.registers, request.seed)  # refuses before hours of targets
    if recipe.int8:
        quantised_layers(student)
    for model in (base, student):
        quickest_attention(model, device, autocast)
    identity = model_identity(base)
    strength = request.strength or STRENGTH if recipe.moves_neurons else None
    settings = {
        **identity, "preprocess": preprocess.to_json(), "images": training.digest(), "recipe": recipe.to_json(),
        "registers": recipe.registers, "views": request.views, "strength": strength, "seed": request.seed, "autocast": autocast,
    }  # fmt: skip
    work = work_folder(output, settings, resume, force)
    try:
        found, left = _prepare(base, student, recipe, strength, training, preprocess, device, progress)
    except PhregError:  # nothing is in it yet that could be gone on with
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        raise
    targets = TargetCache(
        Teacher(
            base,
            preprocess,
            views=request.views,
            seed=request.seed,
            device=device,
            more_devices=devices[1:],
            autocast=autocast,
            identity=identity,
        ),
        cache or cache_folder(),
    )
    before = time.perf_counter()
    try:
        with progress.task("teacher targets", len(training)) as advance:
            computed = targets.fill(training, advance)
    except OSError as error:
        raise write_error(error, targets.folder) from error
    target_seconds = time.perf_counter() - before
    history: dict[str, Any] = {"loss": []}
    ranges_on = Batches(spread(training, RANGED), preprocess, device) if recipe.int8 else ()
    if recipe.epochs:
        history = train(
            student, targets, training.digests, preprocess, recipe,
            seed=request.seed, devices=devices, autocast=autocast, work=work, resume=resume, progress=progress,
            ranges_on=ranges_on, micro_batch=request.micro_batch, grad_checkpointing=request.grad_checkpointing,
        )  # fmt: skip
    grids = observe(student.to(device), ranges_on, Smoothing()) if recipe.int8 else None
    record: dict[str, Any] = {
        "source": {**origin, "checkpoint": request.checkpoint.name if request.checkpoint else None, "weights_sha256": identity["weights"]},
        "recipe": recipe.to_json(),
        "registers": recipe.registers, "strength": strength, "views": request.views, "seed": request.seed,
        "preprocess": preprocess.to_json(), "image_size": list(base.patch_embed.img_size), "autocast": autocast, "device": ",".join(devices),
        "images": {"trained": len(training), "digest": training.digest(), "held_out": held.names if held else [], "skipped": len(photographs.skipped)},
        "register_neurons": [{**n.to_json(), "left": left.get(n)} for n in found.neurons] if found else [],
        "history": history, "scores": {"missing": "the run ended before scoring did"},
        "seconds": {"total": time.perf_counter() - started, "targets": target_seconds, "targets_computed": computed},
        "versions": {"phreg_deploy": __version__, "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
    }  # fmt: skip
    with atomic_folder(output, force) as folder:
        write_student(student, record, folder)
    shutil.rmtree(work, ignore_errors=True)
    try:
        record["scores"] = compare(
            base,
            student,
            held or training,
            preprocess,
            device=device,
            progress=progress,
            grids=grids,
        )
    except (PhregError, OSError, RuntimeError, MemoryError) as error:  # torch is out of memory in a RuntimeError
        record["scores"] = {"missing": f"{type(error).__name__}: {error}"}
    except KeyboardInterrupt:
        progress.say(f"{output} is whole; only its scores are missing.")
        raise
    record["seconds"]["total"] = time.perf_counter() - started
    write_record(record, output)
    return record


def split(photographs: Photographs, share: float) -> tuple[Photographs, Photographs | None]:
    """Training and held-out images, by a hash of each name: adding images moves no other image across.

    With fewer than 20 images nothing is held out.
    """
    check_distillation({"holdout": share})
    place = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in photographs.names]
    held = [i for i, p in enumerate(place) if p < share]
    if len(photographs) < 20 or not held or len(held) == len(photographs):
        return photographs, None
    return photographs.subset(i for i, p in enumerate(place) if p >= share), photographs.subset(held)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/phreg-deploy``, or ``~/.cache/phreg-deploy``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phreg-deploy"


def _recipe(request: Request) -> Recipe:
    recipe = find_recipe(request.recipe)
    changes: dict[str, Any] = {
        "registers": request.registers, "epochs": request.epochs, "batch": request.batch, "unlock": request.unlock
    }  # fmt: skip
    if request.int8_aware:
        changes["int8"] = True
    return replace(recipe, **{k: v for k, v in changes.items() if v is not None})


def _prepare(
    base: ViT,
    student: ViT,
    recipe: Recipe,
    strength: float | None,
    training: Photographs,
    preprocess: Preprocess,
    device: str,
    progress: Progress,
) -> tuple[Survey | None, dict[RegisterNeuron, str]]:
    """The training-free part: find the register neurons and move them (or silence them without registers).

    Returns what was found, and the neurons that could not be moved, with the reason.
    """
    left: dict[RegisterNeuron, str] = {}
    if strength is None:
        return None, left
    batches = Batches(spread(training, SURVEYED), preprocess, device)
    count = len(batches.photographs)
    with progress.task("register neurons", 2 * count) as advance:
        found = survey(base.to(device), batches, advance)
    progress.say(found.word)
    if found.neurons and not recipe.registers:
        silence(student, found.neurons)
    elif found.neurons:
        student.to(device)
        with progress.task("transplant", count * len({n.block for n in found.neurons})) as advance:
            left = transplant(student, found.neurons, batches, strength=strength, advance=advance)
    if left:
        worst = max(left, key=lambda n: n.share)
        progress.say(
            f"{len(left)} of {len(found.neurons)} register neurons are left as they are, the strongest unit {worst.unit} of block "
            f"{worst.block}: {left[worst]}."
        )
    return found, left
