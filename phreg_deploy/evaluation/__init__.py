"""Evaluate dense features by linear probes: segmentation or depth, with intervals; and keep a probe as a head.

Needs the extra ``evaluate`` (scikit-learn, safetensors). Bundles need no PyTorch. Importing this module imports none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.request import OVSS, EvaluationRequest
from phreg_deploy.extras import DISTILL, EVALUATE, require
from phreg_deploy.files.atomic import check_target
from phreg_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from phreg_deploy.evaluation.report import Evaluation
    from phreg_deploy.heads import Head

__all__ = ["EvaluationRequest", "evaluate", "probe"]


def evaluate(
    request: EvaluationRequest, report: Path | None = None, *, force: bool = False, progress: Progress = SILENT
) -> Evaluation:
    """Train a linear layer on frozen features of one part of the images, and read it on the other part.

    With the protocol "ovss" nothing is trained: text embeddings of class names predict every image.

    Args:
        request: the models, the images and how they are split and trained.
        report: folder to write ``evaluation.json`` and pictures into; ``force`` replaces it.

    Raises:
        PhregError: bad arguments, images, truth or models.
        BackendMissing: the extra, a backend, or PyTorch for a model is not installed.
    """
    request.check()
    if report is not None:
        check_target(report, force, request.reads)
    _require("`phreg-deploy evaluate`", request)
    if request.solver == OVSS:
        from phreg_deploy.evaluation.zero_shot import run_zero_shot as run
    else:
        from phreg_deploy.evaluation.evaluator import run_evaluation as run
    outcome = run(request, progress, draw=report is not None)
    if report is not None and outcome.pictures is not None:
        from phreg_deploy.evaluation.pictures import write_report

        write_report(report, outcome.evaluation, outcome.pictures, force, request.reads)
    return outcome.evaluation


def probe(
    request: EvaluationRequest, output: Path, *, force: bool = False, progress: Progress = SILENT
) -> tuple[Head, Evaluation]:
    """Train the probe of one model as ``evaluate`` does with its first seed, and write it as a head.

    Args:
        request: of one model; ``seeds`` is 1.
        output: folder of the head (``docs/heads.md``); ``force`` replaces it.

    Raises:
        PhregError, BackendMissing: as ``evaluate``.
    """
    if request.solver == OVSS:
        raise PhregError("probe: --protocol ovss trains no head; `attach --classes` serves text embeddings.")
    request.check()
    check_target(output, force, request.reads)
    _require("`phreg-deploy probe`", request)
    from phreg_deploy.evaluation.evaluator import run_evaluation

    outcome = run_evaluation(request, progress, draw=False)
    head, subject = outcome.heads[0], outcome.evaluation.subjects[0]
    head.trained_on["figures"] = subject.figures
    head.write(output, force, request.reads)
    return head, outcome.evaluation


def _require(what: str, request: EvaluationRequest) -> None:
    from phreg_deploy.bundle.bundle import is_bundle

    torch = {} if all(is_bundle(name) for name in request.names) else {"distill": DISTILL}
    require(what, evaluate=EVALUATE, **torch)
