"""Run the stages of a distillation, from a model's name and a folder of photographs to the folder of a student."""

from __future__ import annotations

import io
import platform
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
from PIL import Image

from phreg_deploy import __version__
from phreg_deploy.cards.student import PICTURE, write_student_card
from phreg_deploy.distill.devices.processes import ALONE, Processes
from phreg_deploy.distill.evaluation import score_student
from phreg_deploy.distill.fake_quantisation import observe_grids, quantised_layers
from phreg_deploy.distill.neurons.search import find_register_neurons
from phreg_deploy.distill.neurons.start import Start, choose_start, move_neurons
from phreg_deploy.distill.recipes import Request
from phreg_deploy.distill.record import History, Seconds, StudentRecord, StudentScores, TrainingImages
from phreg_deploy.distill.run import Run, load_run
from phreg_deploy.distill.teacher import TargetCache, Teacher
from phreg_deploy.distill.training import loss_of, train
from phreg_deploy.distill.work_folder import remove, work_folder, wrote
from phreg_deploy.errors import PhregError, write_error
from phreg_deploy.files.atomic import atomic_folder, write_atomic
from phreg_deploy.files.cache import cache_folder
from phreg_deploy.images.photographs import Photographs, read_photographs
from phreg_deploy.images.pictures import colours, components, heat, sheet
from phreg_deploy.models.answers import read_features
from phreg_deploy.models.batches import Batches, split, spread
from phreg_deploy.models.checkpoint import write_record, write_student
from phreg_deploy.models.hardware import select_attention
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.readouts import readout_of, with_readout
from phreg_deploy.models.registers import add_registers
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.quantisation import Smoothing

# Images on which register neurons are searched, and on which they are transplanted.
SEARCH_IMAGES, NEURON_IMAGES = 96, 256
# Images whose loss decides how the student starts.
START_IMAGES = 64
# Images on which the ranges of fake quantisation are observed.
RANGE_IMAGES = 128
# Photographs in the picture of the model card.
SHOWN = 3


def run_distillation(
    request: Request,
    output: Path,
    *,
    cache: Path | None,
    resume: bool,
    force: bool,
    progress: Progress,
    processes: Processes | None = None,
) -> StudentRecord:
    """Distil and write the student; arguments, result and errors as of ``phreg_deploy.distill.distill``."""
    started, processes = time.perf_counter(), processes or ALONE
    run = load_run(request, progress if processes.first else SILENT, processes)
    training, held_out = _read_photographs(run)
    student = _add_registers(run)
    settings = run.settings(training)
    processes.check_same(settings, "give each of them the same options, files and kind of device.")
    with work_folder(output, settings, resume, force, writes=processes.first) as work:
        return _distil(run, student, training, held_out, output, work, started, cache, resume, force)


def _distil(
    run: Run,
    student: ViT,
    training: Photographs,
    held_out: Photographs | None,
    output: Path,
    work: Path,
    started: float,
    cache: Path | None,
    resume: bool,
    force: bool,
) -> StudentRecord:
    """Train, write and score the student."""
    try:
        start = _move_register_neurons(run, student, training)
    except PhregError:
        # The work folder holds nothing yet that could be resumed.
        if not resume:
            remove(work)
        raise
    targets, seconds = _compute_targets(run, training, cache or cache_folder())
    start = _choose_start(run, start, training, targets)
    student = with_readout(start.student, run.recipe.student_readout)
    range_images = run.batches(training, RANGE_IMAGES) if run.recipe.int8 else None
    history = _train(run, student, training, targets, range_images, work, resume)
    if not run.processes.first:
        return run.processes.first_of(None)
    held_out_names = held_out.names if held_out else []
    python = platform.python_version()
    versions = {"phreg_deploy": __version__, "torch": torch.__version__, "timm": timm.__version__, "python": python}
    record = StudentRecord(
        source={**run.origin, "checkpoint": run.checkpoint, "weights_sha256": run.identity.weights},
        recipe=run.recipe,
        strength=run.strength,
        views=run.views,
        seed=run.request.seed,
        preprocess=run.preprocess,
        image_size=tuple(run.base.patch_embed.img_size),
        autocast=run.autocast,
        devices=run.devices,
        images=TrainingImages(len(training), training.digest(), held_out_names, len(training.skipped)),
        register_neurons=start.neurons,
        history=history,
        seconds=replace(seconds, total=time.perf_counter() - started),
        versions=versions,
        processes=run.processes.count,
    )
    with atomic_folder(output, force or wrote(work, output)) as folder:
        write_student(student, record.to_json(), folder)
        write_student_card(record.to_json(), folder)
    scores, reason = _score(run, student, held_out or training, range_images, output)
    seconds = replace(seconds, total=time.perf_counter() - started)
    record = replace(record, scores=scores, missing_scores=reason, seconds=seconds)
    write_record(record.to_json(), output)
    if scores is not None:
        _draw(run, student, held_out or training, scores.median_norm, output)
    write_student_card(record.to_json(), output)
    if scores is not None:
        remove(work)
    return run.processes.first_of(record)


def _read_photographs(run: Run) -> tuple[Photographs, Photographs | None]:
    """Read the photographs, and split them into those to train on and those held out for scores."""
    size, say = tuple(run.base.patch_embed.img_size), run.progress.say
    training, held_out = split(read_photographs(run.request.images, size, run.preprocess, say=say), run.request.holdout)
    precision = "bfloat16 autocast" if run.autocast else "float32"
    say(
        f"{len(training)} images to train on, {len(held_out) if held_out else 0} held out for scores; "
        f"{','.join(run.devices)}, {precision}."
    )
    return training, held_out


def _add_registers(run: Run) -> ViT:
    """Make the student: the base model with registers, still untrained. Refuses a model that cannot be distilled."""
    student = add_registers(run.base, run.recipe.registers, run.request.seed)
    if run.recipe.int8:
        quantised_layers(student)
    for model in (run.base, student):
        select_attention(model, run.device, run.autocast)
    return student


def _move_register_neurons(run: Run, student: ViT, training: Photographs) -> Start:
    """Find the register neurons, and move them in a copy of the student; the first process alone does."""
    if run.strength is None or not run.processes.first:
        return Start(student, None, {})
    batches = run.batches(training, SEARCH_IMAGES)
    with run.progress.task("register neurons", 3 * len(batches.photographs)) as advance:
        search = find_register_neurons(run.base.to(run.device), batches, advance)
    run.progress.say(search.summary)
    batches = run.batches(training, NEURON_IMAGES)
    return move_neurons(
        student.to(run.device),
        search.neurons,
        batches,
        len(batches.photographs),
        registers=run.recipe.registers,
        strength=run.strength,
        progress=run.progress,
    )


def _choose_start(run: Run, start: Start, training: Photographs, targets: TargetCache) -> Start:
    """Choose between moved neurons and registers at random by the loss; a strength or no registers decides already."""
    if start.moved is not None and (run.request.strength is not None or not run.recipe.registers):
        return Start(start.moved, None, start.neurons)
    digests = spread(training, START_IMAGES).digests

    def loss(model: ViT) -> float:
        model = with_readout(model, run.recipe.student_readout)
        return loss_of(model, targets, digests, run.preprocess, run.recipe, device=run.device, autocast=run.autocast)

    return choose_start(start, loss, run.progress)


def _compute_targets(run: Run, training: Photographs, folder: Path) -> tuple[TargetCache, Seconds]:
    """Fill the cache with the teacher's targets. ``Seconds.total`` of the result is 0."""
    started = time.perf_counter()
    teacher = Teacher(
        with_readout(run.base, run.recipe.teacher_readout),
        run.preprocess,
        views=run.views,
        seed=run.request.seed,
        devices=run.devices,
        autocast=run.autocast,
        layers=run.recipe.layers,
        identity=run.identity,
    )
    targets, processes = TargetCache(teacher, folder), run.processes
    share = training.subset(range(processes.rank, len(training), processes.count))
    try:
        with run.progress.task("teacher targets", len(share)) as advance:
            computed = targets.fill(share, advance)
    except OSError as error:
        raise write_error(error, targets.folder) from error
    (computed_in_all,) = processes.sum([computed])
    if processes.count > 1:
        targets.check_shared(training.digests)
    return targets, Seconds(0.0, time.perf_counter() - started, int(computed_in_all))


def _train(
    run: Run,
    student: ViT,
    training: Photographs,
    targets: TargetCache,
    range_images: Batches | None,
    work: Path,
    resume: bool,
) -> History:
    """Train the student against the targets; with 0 epochs it is not changed."""
    if not run.recipe.epochs:
        return History([])
    return train(
        student,
        targets,
        training.digests,
        run.preprocess,
        run.recipe,
        seed=run.request.seed,
        devices=run.devices,
        autocast=run.autocast,
        work=work,
        resume=resume,
        progress=run.progress,
        range_images=() if range_images is None else range_images,
        micro_batch=run.request.micro_batch,
        grad_checkpointing=run.request.grad_checkpointing,
        workers=run.request.workers,
        processes=run.processes,
    )


def _score(
    run: Run, student: ViT, photographs: Photographs, range_images: Batches | None, output: Path
) -> tuple[StudentScores | None, str]:
    """Score the written student. If that fails, returns no scores and the reason."""
    device, progress = run.device, run.progress
    try:
        grids = observe_grids(student.to(device), range_images, Smoothing()) if range_images is not None else None
        scores = score_student(
            run.base,
            student,
            photographs,
            run.preprocess,
            device=device,
            progress=progress,
            grids=grids,
            teacher=run.recipe.teacher_readout,
        )
    # PyTorch reports a lack of GPU memory as a RuntimeError.
    except (PhregError, OSError, RuntimeError, MemoryError) as error:
        return None, f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        progress.say(f"{output} is complete; only its scores are missing. The same command with --resume adds them.")
        raise
    return scores, ""


def _draw(run: Run, student: ViT, photographs: Photographs, median: float, output: Path) -> None:
    """Write the picture of the model card: a few photographs, with the base's and the student's features and norms.

    The student is complete without it, so nothing is raised if it cannot be drawn.
    """
    shown = spread(photographs, SHOWN)
    models = (with_readout(run.base, readout_of(student)), student)
    try:
        before, after = (read_features(model, shown, run.preprocess, run.device) for model in models)
    # PyTorch reports a lack of GPU memory as a RuntimeError.
    except (PhregError, OSError, RuntimeError, MemoryError) as error:
        run.progress.say(f"The model card has no picture ({type(error).__name__}: {error}).")
        return
    grid = tuple(run.base.patch_embed.grid_size)
    # One basis for both, so that equal features have equal colours.
    basis = components(list(after["patches"]))
    rows = []
    for i in range(len(shown)):
        row = [("photograph", Image.fromarray(shown.array(i)))]
        for caption, features in (("before", before), ("after", after)):
            row.append((f"features {caption}", colours(features["patches"][i].reshape(*grid, -1), basis)))
            row.append((f"norms {caption}", heat(features["norms"][i].reshape(grid), 3 * median)))
        rows.append(row)
    data = io.BytesIO()
    sheet(rows).save(data, "PNG", optimize=True)
    write_atomic(output / PICTURE, data.getvalue())
