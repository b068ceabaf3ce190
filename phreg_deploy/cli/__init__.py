"""The command line: parse, call one library function, print. Rooms are imported inside the commands, never here."""

from __future__ import annotations

import difflib
import io
import json
import sys
from contextlib import suppress
from typing import Any

import click

from phreg_deploy import __version__
from phreg_deploy.arguments import refuse_url
from phreg_deploy.cli.commands import (
    artifacts,
    build,
    calibrate,
    check,
    demo,
    distill,
    doctor,
    export,
    extract,
    inspect,
    profile,
)
from phreg_deploy.cli.console import echo, output, plain
from phreg_deploy.errors import PhregError

NOTHING = "Nothing was written."
WHOLE = "An output appears only when it is whole: where {} is missing, nothing of it was kept; run the command again."
INTERRUPTED = {  # command: what an interruption leaves
    "distill": "No student was written. Teacher targets stay in the cache; where OUTPUT.partial is there, the same command "
    "with --resume goes on from it, and with --force starts over.",
    "export": WHOLE.format("OUTPUT"),
    "calibrate": WHOLE.format("OUTPUT"),
    "build": "No half-built engine was kept; run the command again.",
    "extract": "Nothing was written to OUTPUT; run the command again.",
    "demo": WHOLE.format("OUTPUT"),
}


class Group(click.Group):
    """Turns every error that a user can cause into a message and an exit code."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" The commands are {', '.join(self.commands)}."
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}", ctx)
        for argument in args[1:]:
            refuse_url(argument)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode gets question marks, not a traceback
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            with output() as stream:
                if stream is not None:
                    stream.flush()
            sys.exit(code if isinstance(code, int) else 0)
        except PhregError as error:
            echo(f"Error: {error}", err=True)
            _fail(str(error), error.exit_code, error.report)
        except click.ClickException as error:  # unknown options and the like: click's words, and ours for machines
            error.show()
            _fail(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _interrupted(None)
        except BrokenPipeError:  # stderr's reader is gone, and progress cannot be shown
            sys.exit(0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print "Aborted!" and exit 1
            _interrupted(ctx.invoked_subcommand)


def _interrupted(command: str | None) -> None:
    message = f"Interrupted: {command or 'phreg-deploy'}. {INTERRUPTED.get(command or '', NOTHING)}"
    echo(f"Error: {message}", err=True)
    _fail(message, 130)


def _fail(message: str, code: int, report: dict[str, Any] | None = None) -> None:
    if "--json" in sys.argv:
        with suppress(PhregError):  # stdout cannot be written: the error on stderr and the exit code remain
            echo(json.dumps(plain({**(report or {}), "error": message, "exit_code": code}), sort_keys=True))
    sys.exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="phreg-deploy")
def main() -> None:
    """Clean dense features from pretrained Vision Transformers, served without PyTorch.

    \b
    The verbs chain, each takes what the one before wrote:
      phreg-deploy distill vit_small_patch14_dinov2.lvd142m --images photos/ -o dino-reg
      phreg-deploy export dino-reg -o dino.bundle --format onnx --image-size 518
      phreg-deploy calibrate dino.bundle --images photos/ -o dino-int8.bundle
      phreg-deploy build dino.bundle
      phreg-deploy check dino.bundle --reference dino-reg --images photos/
      phreg-deploy extract dino.bundle photo.jpg -o features/

    Exit codes: 0 done; 2 usage or bad input; 3 a gate failed; 4 a backend or dependency is missing.
    """


for command in (
    distill.distill,
    export.export,
    calibrate.calibrate,
    build.build,
    check.check,
    profile.profile,
    extract.extract,
    artifacts.artifacts,
    inspect.inspect,
    doctor.doctor,
    demo.demo,
):
    main.add_command(command)
