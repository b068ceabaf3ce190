"""Run all checks in order, and write the archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phreg_deploy import __version__
from phreg_deploy.doctor.doctor import diagnose
from phreg_deploy.errors import BackendMissing
from phreg_deploy.files.temporary import scratch_folder
from phreg_deploy.profiling.latency import backend_version, processor
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.backends.registry import GPU, installed
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu.trt_library import load_tensorrt, plan_cuda
from phreg_deploy.selftest.archive import Archive
from phreg_deploy.selftest.checks import Check, Sheet, Verdict
from phreg_deploy.selftest.logs import collected
from phreg_deploy.selftest.subjects import LARGE, SMALL, Subject, check_means, copied, exported, packaged_model

if TYPE_CHECKING:
    from phreg_deploy.selftest.engines import Built

ON_PROCESSOR = ("fp32", "fp16", "int8")
ON_GPU = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class Plan:
    """What to check, see ``phreg_deploy.selftest.selftest``."""

    gpu: bool
    device: int
    bundles: tuple[Path, ...]
    quick: bool
    frames: int

    @property
    def models(self) -> list[str]:
        return [SMALL] if self.quick else [SMALL, LARGE]

    def subjects(self, room: Path, precisions: list[str], progress: Progress) -> list[Subject]:
        """The bundles to check; none is there yet."""
        if self.bundles:
            return copied(self.bundles, room)
        return exported(room, precisions, self.models, "trt" if self.gpu else "cpu", progress)


def run_checks(plan: Plan, output: Path, on_check: Callable[[Check], None] | None, progress: Progress) -> Verdict:
    """Run the checks of ``plan`` and write the archive ``output``; see ``phreg_deploy.selftest.selftest``."""
    cuda = open_gpu(plan.device) if plan.gpu else None
    backends = [] if plan.gpu else [name for name in installed() if name not in GPU]
    check_means(plan.bundles)
    sheet, archive = Sheet(on_check), Archive()
    with collected() as lines, scratch_folder("phreg-selftest") as folder:
        try:
            if cuda is None:
                _check_processor(plan, folder, sheet, backends, progress)
            else:
                _check_gpu(plan, cuda, folder, sheet, archive, progress)
        finally:
            # Also after Ctrl-C or a defect: what was found is worth sending.
            verdict = Verdict(tuple(sheet.checks), output)
            if sheet.checks:
                archive.add("verdict.json", {**verdict.to_json(), "archive": output.name})
                archive.add("verdict.txt", "\n".join([*map(str, sheet.checks), str(verdict), ""]))
                archive.add("machine.json", _machine(cuda, backends))
                archive.add("doctor.json", [finding.to_json() for finding in diagnose()])
                archive.add("log.txt", "\n".join([*lines, ""]))
                archive.write(output)
    return verdict


def open_gpu(device: int) -> Cuda:
    """Open the GPU. Raises ``BackendMissing``, which lists everything that is missing at once."""
    reasons, cuda = [], None
    for attempt in (lambda: Cuda(device), load_tensorrt):
        try:
            opened = attempt()
            cuda = opened if isinstance(opened, Cuda) else cuda
        except BackendMissing as error:
            reasons.append(str(error))
    if reasons or cuda is None:
        raise BackendMissing(" ".join([*reasons, "`phreg-deploy doctor` lists all parts."]))
    plan_cuda(load_tensorrt(), cuda.gpu.driver)
    return cuda


def _check_processor(plan: Plan, room: Path, sheet: Sheet, backends: list[str], progress: Progress) -> None:
    from phreg_deploy.selftest.processor import check_backends

    for subject in plan.subjects(room, list(ON_PROCESSOR), progress):
        if sheet.run(f"{subject}, bundle", subject.make):
            check_backends(sheet, subject, backends, plan.frames, progress)


def _check_gpu(plan: Plan, cuda: Cuda, room: Path, sheet: Sheet, archive: Archive, progress: Progress) -> None:
    from phreg_deploy.export.engine.build import LEAST_ARCHITECTURE
    from phreg_deploy.selftest.engines import EngineChecks
    from phreg_deploy.selftest.sanitizer import check_memory_accesses
    from phreg_deploy.selftest.serving import check_memory, check_threads

    architecture, device = cuda.gpu.architecture, plan.device
    precisions = [name for name in ON_GPU if architecture >= LEAST_ARCHITECTURE.get(name, 0)]
    checks = EngineChecks(sheet, archive, device, architecture, progress)
    built: dict[tuple[str, str], Built] = {}
    for subject in plan.subjects(room, precisions, progress):
        engine = checks.check(subject) if sheet.run(f"{subject}, bundle", subject.make) else None
        if engine is None:
            continue
        built[subject.model, subject.precision] = engine
        load = partial(FeatureExtractor.load, subject.folder, "tensorrt", device=device)
        sheet.run(f"{subject}, two threads and a synchronising one", partial(check_threads, load))
    archive.add("timings.json", checks.timings)
    # The first in FP16, or whichever there is.
    served = next((one for (_, precision), one in built.items() if precision == "fp16"), None)
    served = served or next(iter(built.values()), None)
    if served is not None:
        load = partial(FeatureExtractor.load, served.subject.folder, "tensorrt", device=device)
        sheet.run(f"{served.subject}, memory", partial(check_memory, load, plan.frames, progress))
        checked = partial(check_memory_accesses, served.subject.folder, device, archive)
        sheet.run(f"{served.subject}, compute-sanitizer", checked)
    _try_disputes(plan, built, served, architecture, room, sheet, progress)


def _try_disputes(
    plan: Plan,
    built: dict[tuple[str, str], Built],
    served: Built | None,
    architecture: int,
    room: Path,
    sheet: Sheet,
    progress: Progress,
) -> None:
    """Try the cases of ``selftest.disputes`` on the engines, ``built`` by model and precision."""
    from phreg_deploy.selftest import disputes

    device = plan.device
    for model in {model: None for model, _ in built}:
        of = {precision: one for (name, precision), one in built.items() if name == model}
        sheet.run(
            f"{model}, first Cast of BF16",
            partial(disputes.check_first_cast, of.get("bf16"), of.get("fp32"), device),
        )
    int8 = next((one for (_, precision), one in built.items() if precision == "int8"), None)
    sheet.run("INT8 on Orin", partial(disputes.check_int8_on_orin, int8, architecture))
    if served is None:
        return
    for kind in () if plan.quick else disputes.COMPATIBILITIES:
        compatible = partial(disputes.check_compatibility, served, kind, device, room, progress)
        sheet.run(f"{served.subject}, --compat {kind}", compatible)
    folders = {precision: one.subject.folder for (_, precision), one in reversed(built.items())}
    for precision in [name for name in ("fp16", "bf16") if name in folders]:
        on_cuda = partial(disputes.check_onnxruntime, folders[precision], device)
        served_too = sheet.run(f"{precision} on onnxruntime-cuda", on_cuda)
        if served_too and precision == "fp16" and not plan.bundles:
            fixed = partial(disputes.check_onnxruntime_graph, packaged_model(), room / "fixed", device, progress)
            sheet.run("fp16 on onnxruntime-cuda, one size and batch", fixed)


def _machine(cuda: Cuda | None, backends: list[str]) -> dict[str, Any]:
    """What the figures depend on."""
    gpu = None if cuda is None else {**cuda.gpu.to_json(), "kind": cuda.gpu.kind}
    names = ["tensorrt"] if cuda is not None else backends
    versions = {name: backend_version(name) for name in names}
    return {"phreg_deploy": __version__, "processor": processor(), "gpu": gpu, "backends": versions}
