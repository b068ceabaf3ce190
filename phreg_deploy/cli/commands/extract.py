"""``extract``: dense features of images, as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from phreg_deploy.cli.console import Result
from phreg_deploy.cli.options import force_option, output_options, public_key_option, tuning_options
from phreg_deploy.cli.tables.extract import show_extraction, show_ray, show_shard, skipped_error
from phreg_deploy.errors import PhregError
from phreg_deploy.files.atomic import check_target


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write into.")
@tuning_options
@public_key_option
@click.option("--image-size", help="For bundles with several sizes, e.g. 518 or 480x640.")
@click.option(
    "--fit",
    type=click.Choice(["pad", "crop", "squash"]),
    help="Keep the aspect by padding or cropping, or squash; by default as the bundle says.",
)
@click.option("--window", help="Do not resize: blend overlapping windows of this size, which the bundle serves.")
@click.option("--stride", help="Largest step between windows in pixels, e.g. 259; half a window by default.")
@click.option(
    "--outputs",
    default="features",
    show_default=True,
    help="What to write, with commas between: features, cls, token_norm, those of a layer (features.6), attention, "
    "mask, and of heads: segmentation, labels, depth.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type of all outputs but token norms.",
)
@click.option(
    "--pictures/--no-pictures",
    default=False,
    show_default=True,
    help="Write feature and norm pictures too; takes as long again.",
)
@click.option("--exif/--no-exif", default=None, help="Turn photographs upright by EXIF; by default as the bundle says.")
@click.option("--skip-bad", is_flag=True, help="Exit with 0 although files could not be read.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["npy", "parquet", "zarr"]),
    default="npy",
    show_default=True,
    help="npy: files for each image; parquet, zarr: many images in a file.",
)
@click.option(
    "--max-bad",
    help="Exit with 0 if at most so many files (20) or a share of all (1%) cannot be read; stop at the next one.",
)
@click.option("--shard", help="Extract one part of the images, e.g. 3/16, beside other processes; see docs/scale.md.")
@click.option("--ray", type=click.IntRange(1), help="Extract by so many actors of Ray Data; see docs/scale.md.")
@click.option("--resume", is_flag=True, help="Keep what an interrupted run wrote, and extract the rest.")
@force_option
@output_options
def extract(
    bundle: Path,
    images: tuple[Path, ...],
    output: Path,
    backend: str,
    threads: int | None,
    compute: str,
    mode: str,
    device: int,
    image_size: str | None,
    fit: str | None,
    window: str | None,
    stride: str | None,
    outputs: str,
    dtype: str,
    pictures: bool,
    exif: bool | None,
    skip_bad: bool,
    kind: str,
    max_bad: str | None,
    shard: str | None,
    ray: int | None,
    resume: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    public_key: Path | None,
) -> None:
    """Write the dense features of IMAGES as NAME.npy, and an index of them, features.json.

    IMAGES are files, folders, or tar archives as WebDataset writes them. Sub-folders keep their paths. A file that
    cannot be read is left out, whether it was named or found in a folder; all others are written, each such file is
    listed, and the exit code is 2, or 0 with --skip-bad, or with --max-bad up to that limit.

    \b
    Examples:
      phreg-deploy extract student.bundle photo.jpg more-photos/ -o features/
      phreg-deploy extract student.bundle photos/ -o features/ --outputs features,cls,token_norm --dtype float16
      phreg-deploy extract student.bundle aerial.jpg -o features/ --window 518 --stride 259
      phreg-deploy extract layers.bundle photos/ -o features/ --outputs features.6,features.12,attention
      phreg-deploy extract student.bundle shard-*.tar -o features/ --shard 3/16 --resume --max-bad 1%
    """
    from phreg_deploy.extraction.extraction import extract_images
    from phreg_deploy.extraction.formats import check_format
    from phreg_deploy.extraction.inputs.bad_files import check_max_bad
    from phreg_deploy.extraction.inputs.shards import Shard
    from phreg_deploy.extraction.inputs.sources import find_images
    from phreg_deploy.extraction.ray_data import RayRequest, check_ray, extract_on_ray
    from phreg_deploy.extraction.sharded import extract_shard
    from phreg_deploy.extraction.task import ExtractionOptions, parse_outputs
    from phreg_deploy.runtime.features import FeatureExtractor
    from phreg_deploy.spec import parse_size

    result = Result(as_json, quiet)
    if resume and force:
        raise PhregError("extract: got --resume and --force; expected one of them. --force starts over.")
    if skip_bad and max_bad is not None:
        raise PhregError("extract: got --skip-bad and --max-bad; expected one of them. --skip-bad sets no limit.")
    # Loading takes seconds, so the arguments are checked first.
    part = Shard.parse(shard or "1/1") if shard or kind != "npy" else None
    check_max_bad(max_bad)
    if ray is not None:
        check_ray(ray, shard, force)
    check_target(output, force or resume or part is not None or ray is not None, [bundle, *images])
    size, tile, step = (parse_size(text) if text else None for text in (image_size, window, stride))
    options = ExtractionOptions(size, fit, tile, step, parse_outputs(outputs), dtype, pictures)
    options.check()
    check_format(kind, options)
    load: dict[str, Any] = {"backend": backend, "threads": threads, "compute": compute, "mode": mode, "device": device}
    load |= {"exif": exif, "public_key": public_key and os.path.abspath(public_key)}
    how: dict[str, Any] = {"max_bad": max_bad, "force": force, "resume": resume, "progress": result.progress}
    index: Any
    if ray is not None:
        find_images(images, options.outputs)
        paths, load = tuple(os.path.abspath(image) for image in images), {**load, "path": os.path.abspath(bundle)}
        request = RayRequest(paths, os.path.abspath(output), {**load, "threads": threads or 1}, options, kind, max_bad)
        index = extract_on_ray(request, ray, resume=resume, progress=result.progress)
        show_ray(index, result)
    else:
        sources = find_images(images, options.outputs)
        with FeatureExtractor.load(bundle, **load) as extractor:
            result.chosen(extractor.choice, backend)
            if part is None:
                index = extract_images(extractor, sources, output, options, **how)
            else:
                index = extract_shard(extractor, sources, output, options, part, format=kind, **how)
        (show_extraction if part is None else show_shard)(index, result)
    if index.skipped and not skip_bad and max_bad is None:
        raise skipped_error(index)
    result.json(index.to_json())
