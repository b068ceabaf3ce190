"""``check``: parity and artifact rates of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phreg_deploy.arguments import check_cosine, check_file, check_model
from phreg_deploy.cli.console import Result, figure, percent
from phreg_deploy.cli.options import Number, images_option, output_options, runtime_extra, tuning_options
from phreg_deploy.errors import GateFailed, PhregError
from phreg_deploy.extras import DISTILL, require
from phreg_deploy.images.photographs import list_images


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", help="The PyTorch student (or timm name) to compare with on --images.")
@click.option(
    "--reference-checkpoint", type=click.Path(path_type=Path), help="Weights for a timm name given as --reference."
)
@click.option("--base", help="The base model, for its artifact rate beside the others.")
@click.option("--base-checkpoint", type=click.Path(path_type=Path), help="Weights for a timm name given as --base.")
@images_option(False, "Folder of images to compare and to take artifact rates on.")
@click.option("--limit", default=64, show_default=True, type=click.IntRange(1), help="Images at most.")
@tuning_options
@click.option("--cosine", type=Number(), help="Gate on the 1st-percentile patch cosine; by default the precision's.")
@click.option("--outlier-points", type=Number(), help="Gate on the change of the norm-outlier rate, percentage points.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML page with pictures.")
@click.option(
    "--bisect", is_flag=True, help="Find the first block that diverges from FP32; needs onnx and onnxruntime."
)
@output_options
def check(
    bundle: Path,
    backend: str,
    threads: int | None,
    compute: str,
    mode: str,
    device: int,
    bisect: bool,
    cosine: float | None,
    outlier_points: float | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Check a BUNDLE: parity with PyTorch and artifact rates. Exit code 3 when a gate is missed.

    Without --reference no PyTorch is needed: the bundle carries its own exam.

    \b
    Examples:
      phreg-deploy check student.bundle
      phreg-deploy check student.bundle --reference student --images photos/ --report report.html
    """
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.verify.checking import run_check

    result = Result(as_json, quiet)
    check_cosine(cosine)
    for option in ("reference", "base"):
        if asked[f"{option}_checkpoint"] and not asked[option]:
            raise PhregError(f"check: --{option}-checkpoint holds the weights of a timm name; give it as --{option}.")
        if asked[option] and not asked["images"]:
            raise PhregError(f"check: --{option} needs --images DIR to compare on.")
        if asked[option]:
            check_model(asked[option], asked[f"{option}_checkpoint"])
    if asked["images"] is not None:
        list_images(asked["images"])
    if report is not None:
        check_file(report, "report")
    Bundle.read(bundle)
    if asked["reference"] or asked["base"]:
        require("`phreg-deploy check --reference` or --base", distill=DISTILL, **runtime_extra(backend))
    with FeatureExtractor.load(
        bundle, backend, threads=threads, compute=compute, mode=mode, examine=False, device=device
    ) as extractor:
        result.chosen(extractor.choice, backend)
        document, pictures = run_check(extractor, gates=(cosine, outlier_points), progress=result.progress, **asked)
    columns = [
        "compared with",
        "size",
        "cosine p1",
        "cosine min",
        "relative L2",
        "largest diff.",
        "neighbours",
        "outlier points",
    ]
    rows = [
        [c["with"], c["size"], f"{c['parity']['cosine_p1']:.8f}", f"{c['parity']['cosine_min']:.8f}", f"{c['parity']['relative_l2']:.1e}",
         f"{c['parity']['largest_difference']:.1e}", percent(c["parity"]["neighbours"]), f"{c['parity']['outlier_points']:.4f}"]
        for c in document["comparisons"]
    ]  # fmt: skip
    result.table(f"Parity of {bundle} on {document['backend']} ({document['precision']})", columns, rows)
    result.table(
        "Gates",
        ["compared with", "figure", "measured", "bar", ""],
        [
            [g["with"], g["name"], figure(g["figure"]), figure(g["bar"]), "passed" if g["passed"] else "MISSED"]
            for g in document["gates"]
        ],
    )
    fidelity = document["quantised_fidelity"]
    if fidelity:
        result.say(
            f"The own reference holds the {document['precision'].upper()} graph's answers in ONNX Runtime, not those of FP32. Agreement with "
            f"FP32 when it was calibrated: patch cosine {fidelity['cosine_mean']:.5f}, 1st percentile {fidelity['cosine_p1']:.5f}."
        )
    if document["artifacts"]:
        rows = [
            [
                name,
                percent(a["norm_outliers"]["rate"]),
                a["norm_outliers"]["largest"],
                percent(a["shift_incoherence"]["rate"]),
                a["note"],
            ]
            for name, a in document["artifacts"].items()
        ]
        result.table(
            f"Artifacts on {document['images']} images",
            ["", "norm-outlier rate", "largest / median", "shift incoherence", "note"],
            rows,
        )
    if report is not None:
        from phreg_deploy.files.atomic import write_atomic
        from phreg_deploy.verify.html import render

        write_atomic(report, render(document, pictures).encode(errors="replace"))
        result.say(f"Wrote {report}.")
    if bisect:
        from phreg_deploy.cli.commands.build import show_bisection, tried_bisection
        from phreg_deploy.runtime.backends.options import BackendOptions

        find = tried_bisection if document["missed"] else show_bisection  # its own failure must not hide the gate's
        document["bisection"] = find(
            bundle, document["backend"], device, result, tuning=BackendOptions(threads, compute, mode)
        )
    if document["missed"]:
        raise GateFailed(f"check: {bundle}: {'; '.join(document['missed'])}.", document)
    result.json(document)
    was = (extractor.manifest.quantisation or {}).get("missed", [])
    result.say(
        f"All gates passed{'; when it was calibrated the bundle itself missed: ' + '; '.join(was) if was else ''}."
    )
