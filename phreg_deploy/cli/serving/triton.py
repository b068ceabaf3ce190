"""The options of ``export --format triton``, and the repository that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from phreg_deploy.bundle.bundle import Bundle, is_bundle
from phreg_deploy.cli.console import Result
from phreg_deploy.errors import PhregError

FORMAT = "triton"
# Options that say something of the repository; all others are of a bundle that is exported first.
OWN = (
    "model",
    "output",
    "formats",
    "public_key",
    "image_size",
    "triton_backend",
    "instances",
    "force",
    "as_json",
    "quiet",
)


def triton_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a repository."""
    for option in (
        click.option(
            "--instances", type=click.IntRange(1, 256), default=1, show_default=True, help="Copies, for triton."
        ),
        click.option(
            "--triton-backend",
            type=click.Choice(["onnxruntime", "openvino", "tensorrt"]),
            default="onnxruntime",
            show_default=True,
            help="With --format triton: Triton's backend; tensorrt takes the engines of a bundle.",
        ),
    ):
        command = option(command)
    return command


def export_repository(
    output: Path,
    options: dict[str, Any],
    result: Result,
    export_bundle: Callable[[Path, dict[str, Any]], dict[str, Any]],
) -> None:
    """Write a repository of a bundle, or of a model, which ``export_bundle`` exports and checks in a folder beside it.

    Raises:
        PhregError: see ``write_repository``; options of a bundle that exists already, or TensorRT without one.
    """
    from phreg_deploy.files.atomic import check_target
    from phreg_deploy.files.temporary import folder_beside
    from phreg_deploy.model_repository import write_repository

    model, backend = options["model"], options["triton_backend"]
    own = {"backend": backend, "instances": options["instances"], "force": options["force"]}
    if is_bundle(model):
        _refuse_others(model)
        written = write_repository(Bundle.read(model), output, image_size=options["image_size"], **own)
        document: dict[str, Any] = {}
    else:
        if backend == "tensorrt":
            raise PhregError(
                f"triton: got {model}, which is no bundle, and --triton-backend tensorrt, which copies engines. Export "
                "it with --format trt, and give that bundle here."
            )
        check_target(output, options["force"])
        with folder_beside(output) as folder:
            bundle = folder / "bundle"
            document = export_bundle(bundle, {**options, "force": False})
            written = write_repository(Bundle.read(bundle), output, name=_name(model), **own)
    names = ", ".join(str(model["name"]) for model in written.models)
    result.say(
        f"Wrote {output}: {names} for Triton's backend {backend}. Serve it: tritonserver --model-repository {output}"
    )
    result.json({"output": output, "repository": written.to_json(), **document})


def _refuse_others(model: str) -> None:
    """Raise ``PhregError`` for options that say how a bundle is made: this one is made already."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in OWN
        and context.get_parameter_source(str(parameter.name)) == click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise PhregError(
            f"triton: got {', '.join(given)} for the bundle {model}, which is exported already; expected its sizes "
            "(--image-size), --triton-backend and --instances alone."
        )


def _name(model: str) -> str:
    """Return the name of a model: that of its folder, or of timm's architecture."""
    return Path(model).resolve().name if Path(model).exists() else model
