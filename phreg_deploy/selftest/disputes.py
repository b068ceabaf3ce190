"""Try on this GPU where NVIDIA's documents contradict each other, or a library is known to fail.

docs/tensorrt.md ("Where documents disagree") gives the reason of each form that this project chose.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import Manifest
from phreg_deploy.bundle.plan_keys import BuildSettings
from phreg_deploy.errors import BackendMissing
from phreg_deploy.export.engine.build import LEAST_COMPATIBLE
from phreg_deploy.export.engine.exam import examine
from phreg_deploy.export.engine.findings import NO, UNKNOWN
from phreg_deploy.progress import Progress
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.runtime.gpu.jetson import is_jetson
from phreg_deploy.runtime.parity import ParityAccumulator
from phreg_deploy.selftest.checks import Failed, Skipped
from phreg_deploy.selftest.engines import ORIN, Built, build
from phreg_deploy.selftest.serving import CALLS, repeat_exam

# Least 1st-percentile patch cosine of BF16 with FP32 on flat and graded pictures. Rounding to BF16 costs .002 at most;
# a byte that is read as signed, or a Cast that saturates, costs most of it.
LEAST_COSINE = 0.99
COMPATIBILITIES = ("version", *LEAST_COMPATIBLE)


def check_first_cast(bf16: Built | None, fp32: Built | None, device: int) -> str:
    """Compare BF16 with FP32 on pictures that hold every byte value, from black to white."""
    if bf16 is None or fp32 is None:
        raise Skipped("there is no BF16 engine beside an FP32 one of the same model.")
    answers = []
    for built in (fp32, bf16):
        with FeatureExtractor.load(built.subject.folder, "tensorrt", device=device) as extractor:
            answers.append([extractor.run(picture) for picture in byte_pictures(extractor.manifest)])
    accumulator = ParityAccumulator(fp32.bundle.manifest.norm_median)
    for wanted, got in zip(*answers):
        accumulator.add(got, wanted)
    parity = accumulator.parity()
    cosine = parity.cosine_p1
    if cosine is None:
        raise Skipped("the bundles serve heads alone, which have no patch cosine.")
    if parity.bad_values or not cosine >= LEAST_COSINE:
        raise Failed(
            f"1st-percentile patch cosine of BF16 with FP32 on black, white and graded pictures is "
            f"{cosine:.4f}, expected at least {LEAST_COSINE}."
        )
    return f"1st-percentile patch cosine {cosine:.4f} with FP32 on black, white and graded pictures"


def byte_pictures(manifest: Manifest) -> list[np.ndarray]:
    """Black, white, and all 256 byte values in order, each as a least batch at the default size."""
    height, width = manifest.sizes.default
    shape = (manifest.batches.lowest, height, width, 3)
    graded = np.resize(np.arange(256, dtype=np.uint8), shape)
    return [np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), graded]


def check_int8_on_orin(int8: Built | None, architecture: int) -> str:
    """Whether an INT8 engine was built on Orin, and computes its linear layers in 8 bits."""
    if architecture != ORIN:
        raise Skipped("this GPU is no Orin.")
    if int8 is None:
        raise Failed("no INT8 engine was built on this Orin; see the check of its engine.")
    finding = next((one for one in int8.report.findings if one.subject == "8-bit layers"), None)
    if finding is None or finding.verdict == UNKNOWN:
        raise Skipped("the engine was built, and TensorRT's inspector does not show the types of its layers.")
    if finding.verdict == NO:
        raise Failed(finding.sentence)
    return finding.sentence


def check_compatibility(built: Built, compatibility: str, device: int, room: Path, progress: Progress) -> str:
    """Build an engine for later versions or other GPUs and examine it; on JetPack only the first kind is supported."""
    if compatibility in LEAST_COMPATIBLE and is_jetson():
        raise Skipped("TensorRT's developer guide excludes it on JetPack, and `build` refuses it there.")
    copy = room / f"{built.subject.model}-{compatibility.strip('+')}"
    shutil.copytree(built.subject.folder, copy, ignore=shutil.ignore_patterns("engines"))
    report, plan = build(copy, device, BuildSettings(compatibility=compatibility), progress)
    verdict = examine(built.bundle, plan, device)
    if verdict["missed"]:
        raise Failed("; ".join(verdict["missed"]))
    return f"{len(verdict['runs'])} runs agree with the exam; built in {report.seconds:.1f} s"


def check_onnxruntime(folder: Path, device: int) -> str:
    """Answer the exam several times by ONNX Runtime's CUDA provider, with its CUDA graph where it takes one."""
    bundle = Bundle.read(folder)
    try:
        extractor = FeatureExtractor.load(folder, "onnxruntime-cuda", device=device)
    except BackendMissing as error:
        raise Skipped(str(error)) from None
    with extractor:
        agreed = repeat_exam(bundle, extractor)
        remark = extractor.opened.remark
        graph = "with a CUDA graph" if extractor.opened.replays else "without a CUDA graph"
    return f"{CALLS} exams {graph}, {agreed}{'; ' * bool(remark)}{remark}"


def check_onnxruntime_graph(model: Path, folder: Path, device: int, progress: Progress) -> str:
    """Export a bundle of one size and one batch, whose work ONNX Runtime records as a CUDA graph, and check it."""
    from phreg_deploy.export import export

    export(str(model), folder, precision="fp16", progress=progress)
    return check_onnxruntime(folder, device)
