"""Check on this machine that every backend answers right, and write one archive to send.

Importing this module imports no runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phreg_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from phreg_deploy.selftest.checks import Check, Verdict

__all__ = ["selftest"]
# Frames that the memory must stay flat over.
FRAMES, QUICK_FRAMES = 10_000, 1_000


def selftest(
    output: Path | str = "selftest.zip",
    *,
    gpu: bool = False,
    device: int = 0,
    bundles: Sequence[Path | str] = (),
    quick: bool = False,
    frames: int | None = None,
    force: bool = False,
    on_check: Callable[[Check], None] | None = None,
    progress: Progress = SILENT,
) -> Verdict:
    """Check the backends of this machine, on the processor or on an NVIDIA GPU, and write an archive of all findings.

    Without ``bundles`` it exports its own: the model that comes with the package, and a ViT-S with random weights, in
    each precision that the device has. That needs the extras ``export`` and ``calibration``.

    On a GPU it builds the engine of each bundle, examines each profile on each path (plain, captured, replayed, arrays
    on the GPU, misaligned frames), serves two threads beside one that synchronises the GPU, serves ``frames`` frames
    and watches the memory, runs compute-sanitizer where it is installed, and tries the cases on which documents of
    NVIDIA contradict each other (``selftest.disputes``).

    Args:
        output: the archive, a .zip. It holds no user name and no path of this machine.
        gpu: check TensorRT on an NVIDIA GPU instead of the backends of the processor.
        device: number of the GPU.
        bundles: bundles to check instead of its own; their engines are built in copies.
        quick: leave out the ViT-S and the compatibility modes, and serve 1,000 frames.
        frames: frames to serve; None for 10,000, or 1,000 with ``quick``.
        force: replace an archive that exists.
        on_check: is called with each check once it is done.

    Returns:
        the checks, and whether all passed. A failed check raises nothing.

    Raises:
        PhregError: a bad argument or bundle, or an archive that exists or cannot be written.
        BackendMissing: there is no usable GPU, TensorRT or backend, or an extra is missing for its own bundles.
    """
    from phreg_deploy.errors import PhregError
    from phreg_deploy.selftest.archive import check_archive
    from phreg_deploy.selftest.runner import Plan, run_checks

    if frames is not None and frames < 1:
        raise PhregError(f"frames: got {frames}, expected at least 1.")
    target = Path(output)
    check_archive(target, force)
    count = frames or (QUICK_FRAMES if quick else FRAMES)
    plan = Plan(gpu, device, tuple(Path(bundle) for bundle in bundles), quick, count)
    return run_checks(plan, target, on_check, progress)
