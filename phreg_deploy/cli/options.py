"""What commands share: options, and the way in which results are printed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phreg_deploy.errors import PhregError
from phreg_deploy.progress import Progress, printable

WIDTH = 140  # of tables in files and pipes


class Number(click.FloatRange):
    """A finite number within bounds; click's own lets NaN and infinity through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Screen(Console):
    """A console that goes on without output once its reader is gone, as ``head`` is after ten lines."""

    def on_broken_pipe(self) -> None:
        drop(sys.stderr if self.stderr else sys.stdout)


def drop(stream: TextIO) -> None:
    """Send what is still written to ``stream`` nowhere: its reader is gone, and the command's work goes on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def output(err: bool = False) -> Iterator[TextIO | None]:
    """The stream to write to, None where the shell closed it. A reader that is gone is no error.

    Raises:
        PhregError: the system refuses to write, as on a full disk.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        yield stream
    except BrokenPipeError:
        drop(stream)
    except OSError as error:
        drop(stream)
        raise PhregError(f"output: std{'err' if err else 'out'} cannot be written ({error.strerror}).") from None


def echo(text: str, err: bool = False) -> None:
    """Print a line without control characters, in the stream's own encoding: click's ``echo`` would write UTF-8."""
    with output(err) as stream:
        if stream is not None:
            stream.write(printable(text) + "\n")
            stream.flush()


class Result:
    """Where a command prints: tables to stdout, or with ``--json`` to stderr and one JSON line to stdout."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.progress = Progress(quiet)
        self.console = Screen(stderr=as_json, highlight=False)
        if not self.console.is_terminal:
            self.console = Screen(stderr=as_json, highlight=False, width=WIDTH)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        if self.quiet:
            return
        table = Table(*columns, title=printable(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(
                *(Text(printable(cell if isinstance(cell, str) else figure(cell))) for cell in row)
            )  # never markup: [distill] is text
        with output(self.as_json):
            self.console.print(table)

    def say(self, text: str) -> None:
        if not self.quiet:
            with output(self.as_json):
                self.console.print(printable(text), markup=False, soft_wrap=True)

    def chosen(self, choice: str, asked: str) -> None:
        """What ``--backend auto`` chose, and why."""
        if asked == "auto":
            self.say(f"Backend {choice}.")

    def json(self, document: dict[str, Any]) -> None:
        if self.as_json:
            echo(json.dumps(plain(document), sort_keys=True))


def figure(value: Any) -> str:
    """A number as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 0.9 or abs(value) >= 1.1 else f"{value:.6f}".rstrip("0").rstrip(".")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3f} %"


def plain(value: Any) -> Any:
    """JSON has neither infinity nor paths nor dataclasses of ours."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    return str(value) if isinstance(value, Path) else value


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--json", "as_json", is_flag=True, help="One JSON document as the last line of stdout; tables go to stderr."
    )(command)
    return click.option("--quiet", is_flag=True, help="No progress bars and no tables.")(command)


def images_option(required: bool, text: str) -> Callable[..., Any]:
    return click.option("--images", type=click.Path(path_type=Path), required=required, help=text)


def runtime_extra(backend: str) -> dict[str, tuple[str, ...]]:
    """The extra of a runtime and its module, where none is installed that ``--backend auto`` could take."""
    from phreg_deploy.runtime.backends import BACKENDS, there

    return {} if backend != "auto" or any(there(name) for name in BACKENDS) else {"cpu": ("onnxruntime",)}


def _known_backend(_ctx: click.Context, _param: click.Parameter, name: str) -> str:
    from phreg_deploy.runtime.backends import check_name

    if name != "auto":
        check_name(name)
    return name


backend_option = click.option(
    "--backend",
    callback=_known_backend,
    default="auto",
    show_default=True,
    help="auto (the fastest that passes), onnxruntime-cpu, openvino, tensorrt, onnxruntime-cuda or onnxruntime-tensorrt.",
)
device_number = click.option(
    "--device", type=click.IntRange(0), default=0, show_default=True, help="Number of the GPU, where one is used."
)


def tuning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--mode", type=click.Choice(["latency", "throughput"]), default="latency", show_default=True, help="Latency of one call, or throughput of calls from several threads; only openvino has the second."),
        click.option("--compute", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True, help="Precision of what is not in 8 bits; bf16 needs openvino."),
        click.option("--threads", type=click.IntRange(1), help="For one inference; by default one per physical core."),
        device_number,
        backend_option,
    ):  # fmt: skip
        command = option(command)
    return command


force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")
checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights for a timm name: .safetensors, or .pth read with weights_only.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
devices_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, or several GPUs: cuda:0,cuda:1."
)
