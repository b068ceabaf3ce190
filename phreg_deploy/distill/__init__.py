"""Distil register tokens into a timm ViT. The student is again a standard timm checkpoint.

Needs the extra ``distill`` (torch, timm, safetensors). Importing this module imports none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.arguments import check_distillation, check_model, check_resume
from phreg_deploy.distill.devices.launch import find_launch
from phreg_deploy.distill.recipes import Request
from phreg_deploy.distill.work_folder import refuse_running, wrote
from phreg_deploy.files.atomic import check_target
from phreg_deploy.images.photographs import list_images
from phreg_deploy.layers import check_layers
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.spec import parse_size
from phreg_deploy.student_record import model_path

if TYPE_CHECKING:
    from phreg_deploy.distill.devices.processes import Processes
    from phreg_deploy.distill.record import StudentRecord

__all__ = ["distill"]


def distill(
    model: str,
    images: Path | str,
    output: Path | str,
    *,
    checkpoint: Path | None = None,
    recipe: str = "transplant",
    registers: int | None = None,
    image_size: str | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    grad_checkpointing: bool = False,
    unlock: str | None = None,
    strength: float | None = None,
    int8_aware: bool = False,
    views: int = 10,
    holdout: float = 0.1,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    average: float | None = None,
    workers: int | None = None,
    readout: str | None = None,
    project: bool | None = None,
    layers: str | None = None,
    cache: Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> StudentRecord:
    """Add register tokens to a model, distil it against its own denoised features, and write the student.

    The student is written before it is scored; if scoring fails, the record holds the reason. Under torchrun every
    process calls this with the same arguments: they share the work, the first one writes, and all return the record.

    Args:
        model: a timm name, or a folder with ``config.json`` and ``model.safetensors``.
        images: folder of photographs; no labels are needed.
        output: folder of the student to write.
        checkpoint: weights for a timm name, ``.safetensors`` or ``.pth``.
        recipe: "transplant", "random-registers", "ph-reg", for CLIP "ph-reg-clip", or "sinder".
        registers, epochs, lr, batch, unlock, average: None for the recipe's value. ``unlock`` is "all", "paper",
            "paper-clip" or, without registers, "singular-values".
        image_size: "518" or "480x640" (height x width); None for the model's own size.
        micro_batch: most images per forward and backward pass of a process; None for its whole part of a batch.
        grad_checkpointing: recompute each block in the backward pass, which needs less memory.
        strength: activation of a transplanted neuron, as a share of its activation on outlier tokens; None for 0.07.
        int8_aware: train through the fake quantisation of INT8.
        views: shifted and flipped views per teacher target; always 1 in "sinder", whose loss reads no targets.
        holdout: share of the images, chosen by name, that are used for scores and not for training.
        seed: of registers, views and the order of images.
        device: "auto", "cpu", "cuda", "cuda:N", or several GPUs, "cuda:0,cuda:1". Under torchrun "auto", "cpu" or
            "cuda", which is each process's own GPU.
        precision: "auto", "fp32" or "bf16" (autocast).
        average: decay per step of an exponential moving average of the weights, which becomes the student; 0 for none.
        workers: threads of a process that read targets; None for one per core, at most four.
        readout: what is trained and served: "final", "value" or "neighbour" (``phreg_deploy.readout``); None for the
            recipe's.
        project: train and serve features in the space of text, of a CLIP; None for the recipe's.
        layers: further layers to train against denoised targets of their own, as in ``export``, e.g. "1/4,1/2,3/4,1";
            for heads that read several layers, such as DPT.
        cache: folder of teacher targets; None for ``$XDG_CACHE_HOME/phreg-deploy``.
        resume: continue the interrupted run of the same settings in ``OUTPUT.partial``, also one that has written the
            student and lacks its scores alone.
        force: replace an output or an interrupted run.

    ``micro_batch``, ``grad_checkpointing`` and the number of GPUs or processes change the student by rounding only.

    Raises:
        PhregError: bad input, an output that exists, leftovers of another run, or a loss that is not finite.
        BackendMissing: the extra ``distill`` is not installed, or PyTorch cannot use the device.
        SystemExit: under torchrun, in every process but one after an error; that one raises the error.
    """
    images, output = Path(images), Path(output)
    with _joined_processes() as processes:
        request = Request(
            model=model,
            images=images,
            checkpoint=checkpoint,
            recipe=recipe,
            registers=registers,
            image_size=parse_size(image_size) if image_size else None,
            epochs=epochs,
            lr=lr,
            batch=batch,
            micro_batch=micro_batch,
            grad_checkpointing=grad_checkpointing,
            unlock=unlock,
            strength=strength,
            int8_aware=int8_aware,
            views=views,
            holdout=holdout,
            seed=seed,
            device=device,
            precision=precision,
            average=average,
            workers=workers,
            readout=readout,
            project=project,
            layers=layers,
        )
        check_distillation(vars(request))
        request.adjusted_recipe()
        check_layers(layers)
        check_model(model, checkpoint)
        list_images(images)
        work = output.parent / f"{output.name}.partial"
        check_target(output, force or wrote(work, output), [model_path(model), images, checkpoint])
        refuse_running(work)
        check_resume(work, resume, force)
        # Raises BackendMissing if torch, timm or safetensors is missing or broken.
        import phreg_deploy.models  # noqa: F401
        from phreg_deploy.distill.distillation import run_distillation

        return run_distillation(
            request, output, cache=cache, resume=resume, force=force, progress=progress, processes=processes
        )


@contextmanager
def _joined_processes() -> Iterator[Processes | None]:
    """Connect torchrun's processes for the block; None for one alone, which needs no PyTorch for that."""
    launch = find_launch()
    if launch.count == 1:
        yield None
        return
    import phreg_deploy.models  # noqa: F401
    from phreg_deploy.distill.devices.processes import joined

    with joined(launch) as processes:
        yield processes
