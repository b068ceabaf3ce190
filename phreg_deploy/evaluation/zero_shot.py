"""Segment images by text embeddings of class names, without training: the protocol "ovss" of ``evaluate``.

It is what PH-Reg (arXiv 2505.21501, section C.1) took from SCLIP and NACLIP: the short side of an image is resized to
448 pixels, windows of 336 pixels lie 112 apart, the cosines of each window are enlarged bilinearly to its pixels and
averaged over windows, and enlarged to the mask's size before a class is chosen. S embeddings, K classes, M images.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
from PIL import Image

from phreg_deploy.arguments import check_model
from phreg_deploy.bundle.bundle import Bundle, is_bundle
from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.data.sources import BATCH, Source, open_source
from phreg_deploy.evaluation.data.splits import Split, group_of
from phreg_deploy.evaluation.data.truth import Masks, check_sides, find_truth, read_masks
from phreg_deploy.evaluation.evaluator import Outcome
from phreg_deploy.evaluation.intervals import Bootstrap
from phreg_deploy.evaluation.pictures import Pictures
from phreg_deploy.evaluation.report import Evaluation, Subject
from phreg_deploy.evaluation.request import EvaluationRequest
from phreg_deploy.evaluation.scores import COUNTS, DECIDES, ClassParts, class_row, figures_of
from phreg_deploy.heads.class_embeddings import ClassEmbeddings
from phreg_deploy.heads.text_head import TextHead, check_space, check_tower
from phreg_deploy.images.decoding import read_image
from phreg_deploy.images.upsampling import upsample, weights
from phreg_deploy.images.windows import Windows, cut
from phreg_deploy.progress import Progress
from phreg_deploy.student_record import model_path, read_record

# The long side is at most this, as in the paper's configurations.
LONGEST = 2048
# The paper's factor of cosines, of models trained with softmax.
SCALE = 40.0
# Rows of the mask that are enlarged at once.
BAND = 64
SETTINGS = ("background", "short_side", "window", "stride", "first_class", "group", "seed", "readout", "project")
FIGURE = DECIDES["segmentation"]


def run_zero_shot(request: EvaluationRequest, progress: Progress, draw: bool) -> Outcome:
    """Read every model of a request on every image; ``draw``: also draw pictures.

    Raises:
        PhregError: embeddings of another model, a size that a bundle does not serve, or unreadable files.
    """
    began = time.perf_counter(), time.process_time()
    assert request.text is not None
    assert request.masks is not None
    embeddings = ClassEmbeddings.read(request.text)
    scale = SCALE if request.scale is None and embeddings.bias is None else request.scale
    head = embeddings.head(scale, request.background)
    for name in request.names:
        _check_model(name, head)
    files, missing = find_truth(request.images, request.masks, (".png",))
    masks = read_masks(
        files, request.masks, request.text, request.ignore, progress, names=head.classes, first=request.first_class
    )
    names, groups = tuple(files), {name: group_of(name, request.group) for name in files}
    split = Split((), names, groups, "none: nothing is trained")
    bootstrap = Bootstrap([groups[name] for name in names], request.seed)
    pictures = Pictures.of(request.images, masks, split) if draw else None
    subjects: list[Subject] = []
    base: tuple[Subject, dict[str, np.ndarray]] | None = None
    for name in dict.fromkeys(request.names):
        with ExitStack() as stack:
            # A PyTorch model is projected into the space of text; a bundle has its own readout.
            readout = (request.readout, None if is_bundle(name) else True)
            size = (request.window, request.window)
            where = (readout, request.device, request.backend, stack)
            source = open_source(name, request.checkpoint_of(name), size, None, *where)
            subject, drawn = _evaluate(source, head, masks, names, bootstrap, base, pictures, request, progress)
        base = base or (subject, drawn)
        subjects.append(subject)
    spent = {"wall": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}
    facts = {"model": embeddings.model, "pretrained": embeddings.pretrained, "templates": len(embeddings.templates)}
    evaluation = Evaluation(
        task=masks.task,
        images=len(names),
        train=0,
        val=len(names),
        split=split.how,
        groups=len(set(groups.values())),
        val_groups=len(set(groups.values())),
        resampled=bootstrap.unit,
        units=bootstrap.units,
        classes=masks.classes,
        colours=masks.colours,
        ignore=request.ignore,
        protocol=request.solver,
        settings={
            **{key: getattr(request, key) for key in SETTINGS},
            "scale": embeddings.scale if scale is None else scale,
            "text": facts,
        },
        outliers=None,
        outlier_median=None,
        skipped=len(missing),
        cache=None,
        cache_bytes=0,
        subjects=tuple(subjects),
        seconds=spent,
    )
    return Outcome(evaluation, [], pictures)


def _check_model(name: str, head: TextHead) -> None:
    """Raise ``PhregError`` for a model whose features are known not to be in the space of the embeddings."""
    if is_bundle(name):
        check_space(Bundle.read(name).manifest, head, f"evaluate: {name}")
    elif check_model(name) is None:
        check_tower(name, head, "evaluate")
    else:
        source = (read_record(model_path(name)) or {}).get("source")
        if isinstance(source, dict) and isinstance(source.get("model"), str):
            check_tower(source["model"], head, f"evaluate: {name}")


def _evaluate(
    source: Source,
    head: TextHead,
    masks: Masks,
    names: tuple[str, ...],
    bootstrap: Bootstrap,
    base: tuple[Subject, dict[str, np.ndarray]] | None,
    pictures: Pictures | None,
    request: EvaluationRequest,
    progress: Progress,
) -> tuple[Subject, dict[str, np.ndarray]]:
    """Return a model's figures, and those of every resample."""
    wall, cpu = time.perf_counter(), time.process_time()
    rows, drawn_maps = [], dict[str, np.ndarray]()
    with progress.task(f"testing {source.name}", len(names)) as advance:
        for name in names:
            truth = masks.read(name)
            image = read_image(request.images / name, source.preprocess.exif)
            check_sides(truth, image, name)
            scores = window_scores(image, source, head, request.short_side, request.stride)
            predicted = enlarged_classes(scores, (truth.shape[0], truth.shape[1]), head)
            rows.append(class_row(predicted, truth, len(masks.classes)))
            if pictures is not None and name in pictures.rows:
                drawn_maps[name] = predicted
            advance()
    seconds = {"reading": {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}}
    pixels = np.stack(rows)
    # Without patches and outliers.
    counts = np.zeros((len(rows), len(COUNTS)))
    counts[:, 0], counts[:, 1] = pixels[..., 0].sum(-1), pixels[..., 2].sum(-1)
    parts = ClassParts(pixels, np.zeros_like(pixels), counts)
    figures, drawn = figures_of([parts]), bootstrap.draw([parts])
    if figures[FIGURE] is None:
        raise PhregError("evaluate: the masks have no pixel of a class; check --ignore.")
    if pictures is not None:
        whole = replace(source.preprocess, crop_mode="squash", crop_pct=1.0)
        pictures.draw(source.name, replace(source, preprocess=whole), lambda name, _size: drawn_maps[name])
    subject = Subject.of(
        source,
        FIGURE,
        figures,
        drawn,
        base,
        name=source.name,
        width=head.width,
        layers=None,
        seeds=[figures[FIGURE]],
        class_iou=parts.class_iou(),
        patches=0,
        iterations=[],
        converged=True,
        computed=len(names),
        cache_bytes=0,
        seconds=seconds,
    )
    return subject, drawn


def window_scores(image: Image.Image, source: Source, head: TextHead, short_side: int, stride: int) -> np.ndarray:
    """Compute the mean scores of embeddings over the windows that cover each pixel of the resized image.

    Args:
        image: RGB of any size. source: its ``size`` is the windows'. short_side, stride: pixels.

    Returns:
        float32 ``(H, W, S)``, where the shorter of H and W is ``short_side``, or less where the other reaches
        ``LONGEST``.

    Raises:
        PhregError: features of another width than the embeddings.
    """
    factor = min(short_side / min(image.size), LONGEST / max(image.size))
    width, height = (max(1, int(side * factor + 0.5)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    windows = Windows(
        source.size,
        (1, 1),
        (height, width),
        *(_starts(side, own, stride) for side, own in zip((height, width), source.size)),
    )
    total, count = np.zeros((height, width, len(head.weight)), np.float32), np.zeros((height, width, 1), np.float32)
    starts = list(windows)
    for i in range(0, len(starts), BATCH):
        batch = starts[i : i + BATCH]
        arrays = [cut(resized, windows, start, source.preprocess, False) for start in batch]
        features = source.run(np.stack(arrays))["features"]
        if features.shape[-1] != head.width:
            raise PhregError(
                f"evaluate: the features of {source.name} have {features.shape[-1]} channels, and the text embeddings "
                f"{head.width}; expected the file of its own text tower: `phreg-deploy classes --model`."
            )
        for start, cosines in zip(batch, head.scores(features)):
            rows, columns = windows.inside(start)
            scores = upsample(cosines[None], source.size)[0]
            total[rows, columns] += scores[: rows.stop - rows.start, : columns.stop - columns.start]
            count[rows, columns] += 1
    return total / count


def enlarged_classes(scores: np.ndarray, size: tuple[int, int], head: TextHead) -> np.ndarray:
    """Enlarge scores ``(H, W, S)`` bilinearly to ``size`` and choose classes, uint8, band by band."""
    down, across = weights(scores.shape[0], size[0]), weights(scores.shape[1], size[1])
    classes = np.empty(size, np.uint8)
    for top in range(0, size[0], BAND):
        band = np.matmul(across, np.tensordot(down[top : top + BAND], scores, 1))
        classes[top : top + BAND] = head.decide(head.combine(band))
    return classes


def _starts(side: int, window: int, stride: int) -> tuple[int, ...]:
    """Return where windows begin along a side: a stride apart, the last one moved back to end with the image."""
    room = max(0, side - window)
    return tuple(min(place, room) for place in range(0, room + stride, stride))
