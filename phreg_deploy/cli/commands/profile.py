"""``profile``: what a bundle takes on this machine, on a GPU in trtexec's words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phreg_deploy.cli.console import Result, figure
from phreg_deploy.cli.options import Number, output_options, tuning_options
from phreg_deploy.errors import GateFailed, PhregError

if TYPE_CHECKING:
    from phreg_deploy.profiling.baseline import Baseline
    from phreg_deploy.runtime.features import FeatureExtractor

LARGEST = 16_384
PARTS = ("latency", "h2d", "enqueue", "compute", "d2h")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@tuning_options
@click.option("--batch", "batches", help="Batch sizes, e.g. 1,4,8; by default the bundle's best.")
@click.option("--image-size", help="For bundles with several sizes, e.g. 518 or 480x640.")
@click.option(
    "--frame", default="480x640", show_default=True, help="Frame that preprocessing is measured on, HEIGHTxWIDTH."
)
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=Number(0.1),
    help="Of measuring per batch, after the warm-up.",
)
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="An earlier --json report; exit code 3 when the median grew."
)
@click.option("--streams", default="1,2,4", show_default=True, help="On a GPU: numbers of threads that call at once.")
@click.option("--fps", type=Number(0.1), help="On a GPU: feed images at this rate; jitter and missed deadlines.")
@click.option(
    "--without", type=click.Path(path_type=Path), help="On a GPU: the same model without registers, for what they cost."
)
@click.option(
    "--tolerance",
    default=0.1,
    show_default=True,
    type=Number(0),
    help="Growth allowed over the baseline; 0.1 is 10 %.",
)
@click.option(
    "--allow-other-conditions",
    "others",
    is_flag=True,
    help="Compare with a baseline of another processor, graph, backend, version or thread count; the report names each.",
)
@output_options
def profile(
    bundle: Path,
    backend: str,
    threads: int | None,
    compute: str,
    mode: str,
    device: int,
    batches: str | None,
    streams: str,
    fps: float | None,
    without: Path | None,
    image_size: str | None,
    frame: str,
    seconds: float,
    baseline: Path | None,
    tolerance: float,
    others: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure a BUNDLE's latency: the bare graph, the extractor around it, preprocessing apart; interleaved.

    On a GPU also, in trtexec's words: h2d, enqueue, compute, d2h, with and without CUDA graph; streams; layers by block;
    memory, power, energy per frame, clocks and throttling; a roofline against peaks measured on the spot.

    \b
    Examples:
      phreg-deploy profile student.bundle --threads 2 --frame 1080x1920
      phreg-deploy profile student.bundle --batch 1,8 --json > today.json
      phreg-deploy profile student.bundle --batch 1,8 --baseline today.json
      phreg-deploy profile student.bundle --backend tensorrt --fps 30 --without base.bundle
    """
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.profiling.baseline import Baseline, slower_rows
    from phreg_deploy.profiling.latency import conditions, measured_cases, profile_bundle
    from phreg_deploy.runtime.backends.registry import GPU
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.spec import parse_size

    result = Result(as_json, quiet)
    sizes, threads_at_once = _numbers(batches, "batch") if batches else None, _numbers(streams, "streams")
    size = parse_size(image_size) if image_size else None
    frame_size = parse_size(frame)
    if max(frame_size) > LARGEST:
        raise PhregError(f"frame: got {frame}, expected sides of at most {LARGEST} pixels.")
    before = None if baseline is None else Baseline.read(baseline)
    cases = measured_cases(Bundle.read(bundle).manifest, sizes, size)
    differences: list[str] = []
    with FeatureExtractor.load(
        bundle, backend, threads=threads, compute=compute, mode=mode, device=device
    ) as extractor:
        result.chosen(extractor.choice, backend)
        if (fps or without) and extractor.backend not in GPU:
            raise PhregError(f"profile: --fps and --without are for a GPU; this would run on {extractor.backend}.")
        if without is not None:
            measured_cases(Bundle.read(without).manifest, sizes, size)
        if before is not None:  # before anything is measured
            differences = before.differences(conditions(extractor, threads, mode), cases)
            _check_conditions(before, differences, others)
        report = profile_bundle(
            extractor,
            batches=sizes,
            size=size,
            seconds=seconds,
            threads=threads,
            mode=mode,
            frame=frame_size,
            progress=result.progress,
        )
        if extractor.backend in GPU:
            asked = {"batches": sizes, "size": size, "seconds": seconds, "streams": threads_at_once, "fps": fps}
            report["gpu"] = _on_gpu(extractor, asked, result)
    if without is not None:
        with FeatureExtractor.load(without, backend, compute=compute, mode=mode, device=device) as other:
            report["registers"] = _cost_of_registers(
                report["gpu"], _on_gpu(other, {**asked, "fps": None}, result), result
            )
    rows = [
        [str(r["batch"]), f"{r['size'][0]}x{r['size'][1]}", name, *(f"{r[name][q]:.2f}" for q in ("p50", "p90", "p99", "minimum")), str(r[name]["rounds"]), "yes" if r[name]["stable"] else "NO"]
        for r in report["results"] for name in ("graph", "extractor", "preprocess")
    ]  # fmt: skip
    where = report["conditions"]
    result.table(
        f"Milliseconds on {where['backend']} ({where['processor']}, {where['cores']} cores)",
        ["batch", "size", "part", "p50", "p90", "p99", "min", "rounds", "stable"],
        rows,
    )
    for r in report["results"]:
        result.say(
            f"batch {r['batch']}: {r['images_per_second']:.1f} images/s; the extractor adds {100 * r['overhead']:.1f} % to the bare graph. "
            f"Preprocessing of {where['photograph']} ({where['resize']} resize) is {100 * r['preprocess_share']:.0f} % of the time from frame to features."
        )
    slower: list[str] = []
    if before is not None:
        compared = before.rows(report["results"])
        slower = slower_rows(compared, tolerance)
        report["baseline"] = {
            "path": str(baseline),
            "differences": differences,
            "tolerance": tolerance,
            "rows": compared,
        }
        _show_baseline(report["baseline"], result)
    if slower:
        raise GateFailed(f"profile: {'; '.join(slower)}.", {**report, "slower": slower})
    result.json({**report, "slower": slower})


def _check_conditions(before: Baseline, differences: list[str], others: bool) -> None:
    if differences and not others:
        raise PhregError(
            f"baseline: {before.path} was measured under other conditions: {'; '.join(differences)}. Measure the baseline again under "
            "these, or add --allow-other-conditions to compare all the same.",
            {"differences": differences},
        )


def _show_baseline(compared: dict[str, Any], result: Result) -> None:
    other = "; OTHER CONDITIONS" if compared["differences"] else ""
    result.table(
        f"Median milliseconds against {compared['path']}{other}",
        ["batch", "size", "before", "now", "ratio", "at most"],
        [
            [str(r["batch"]), f"{r['size'][0]}x{r['size'][1]}", f"{r['before']:.2f}", f"{r['now']:.2f}", f"{r['ratio']:.2f}", f"{1 + compared['tolerance']:.2f}"]
            for r in compared["rows"]
        ],
    )  # fmt: skip
    for line in compared["differences"]:
        result.say(f"Other condition: {line}.")


def _on_gpu(extractor: FeatureExtractor, asked: dict[str, Any], result: Result) -> dict[str, Any]:
    """``profile_gpu`` with this GPU's own peaks and telemetry, printed."""
    from phreg_deploy.profiling.gpu import pci_of, profile_gpu
    from phreg_deploy.profiling.roofline import measure_peaks
    from phreg_deploy.profiling.telemetry import Telemetry

    backend = extractor.opened
    gemm, metadata = None, None
    if extractor.backend == "tensorrt" and hasattr(backend.trt, "Builder"):  # the lean runtime builds and tells nothing
        from phreg_deploy.export.engine.gemm import measure_product
        from phreg_deploy.export.engine.inspection import read_layers

        gemm = lambda: measure_product(backend.trt, backend.cuda)  # noqa: E731
        metadata = {layer["Name"]: str(layer.get("Metadata", "")) for layer in read_layers(backend.trt, backend.engine)}
    try:
        peaks = measure_peaks(backend.cuda, gemm)
    except PhregError as error:  # a roof is worth less than the figures below it
        result.say(f"No peak of products: {error}")
        peaks = measure_peaks(backend.cuda)
    telemetry = Telemetry(backend.cuda.index, pci=pci_of(backend.cuda))  # NVML counts devices in an order of its own
    try:
        report = profile_gpu(
            extractor, progress=result.progress, telemetry=telemetry, peaks=peaks, metadata=metadata, **asked
        )
    finally:
        telemetry.close()
    report["peaks"] = peaks.to_json()
    rows = [
        [str(r["batch"]), {True: "graph", False: "no graph", None: "-"}[r["graph"]], part, *(f"{r[part][q]:.3f}" for q in ("p50", "p90", "p95", "p99", "p99.9")),
         f"{r['images_per_second']:.1f}" if part == "latency" else "", "yes" if r["stable"] else "NO"]
        for r in report["results"] for part in PARTS if part in r
    ]  # fmt: skip
    columns = ["batch", "CUDA graph", "milliseconds", "p50", "p90", "p95", "p99", "p99.9", "images/s", "stable"]
    result.table(f"{extractor.bundle.folder} on {backend.cuda.gpu.name}", columns, rows)
    rows = [
        [str(s["batch"]), str(s["streams"]), f"{s['images_per_second']:.1f}", _energy(s)] for s in report["streams"]
    ]
    result.table("Threads that call at once", ["batch", "threads", "images/s", "J per image"], rows)
    for grouped in report["layers"]:
        total = sum(grouped["parts"].values()) or 1.0
        rows = [
            [part, f"{ms:.3f}", f"{100 * ms / total:.1f} %"]
            for part, ms in sorted(grouped["parts"].items(), key=lambda p: -p[1])
        ]
        result.table(
            f"Layers at batch {grouped['batch']}, by TensorRT's profiler", ["part", "milliseconds", "share"], rows
        )
    for name, reason in report["missing"].items():
        result.say(f"{name}: {reason}")
    return report


def _energy(sweep: dict[str, Any]) -> str:
    energy = (sweep.get("telemetry") or {}).get("energy") or {}
    return figure(energy.get("per_frame"))


def _cost_of_registers(with_: dict[str, Any], without: dict[str, Any], result: Result) -> list[dict[str, Any]]:
    from phreg_deploy.profiling.roofline import register_cost

    costs = register_cost(with_, without)
    rows = [
        [
            str(c["batch"]),
            str(c["graph"]),
            f"{c['latency'][0]:.3f}",
            f"{c['latency'][1]:.3f}",
            f"{c['ratio']:.3f}",
            "yes" if c["measurable"] else "no",
        ]
        for c in costs
    ]
    result.table("What registers cost", ["batch", "graph", "with, ms", "without, ms", "ratio", "measurable"], rows)
    return costs


def _numbers(text: str, name: str) -> list[int]:
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise PhregError(f"{name}: got {text!r}, expected numbers above 0, e.g. 1,4,8.")
    return [int(part) for part in text.split(",")]
