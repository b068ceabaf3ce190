"""The command line: each command parses its options, calls one library function and prints the result.

``commands.VERBS`` lists the commands; its docstring says how to add one. Commands import the library inside their
functions, so ``--help`` is fast.
"""

from __future__ import annotations

import difflib
import io
import json
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

import click

from phreg_deploy import __version__
from phreg_deploy.arguments import refuse_url
from phreg_deploy.cli.commands import ADDRESSES, FOLDERS, VERBS
from phreg_deploy.cli.console import echo, output, plain
from phreg_deploy.cli.termination import exit_code
from phreg_deploy.errors import Interrupted, PhregError


class Group(click.Group):
    """Print every error that a user can cause as a message, and exit with its code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        # In the order of the pipeline; click would sort them.
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # With whole sentences; click would cut them off at the end of the line.
        whole = [(name, self.commands[name].get_short_help_str(limit=200)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(whole)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" The commands are {', '.join(self.commands)}."
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}", ctx)
        for argument in args[1:] if args[:1] != [] and args[0] not in ADDRESSES else ():
            refuse_url(argument)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # A terminal without Unicode gets question marks, not a traceback.
        for stream in (sys.stdout, sys.stderr):
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
            _fail(str(error), exit_code() if isinstance(error, Interrupted) else error.exit_code, error.report)
        except click.ClickException as error:
            from phreg_deploy.distill.devices.launch import find_launch

            # torchrun's processes all have the same words.
            if not find_launch().first:
                sys.exit(error.exit_code)
            error.show()
            _fail(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _interrupted(None)
        except BrokenPipeError:
            # The reader of stderr is gone, so progress cannot be shown.
            sys.exit(0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would print "Aborted!" and exit with 1.
            _interrupted(ctx.invoked_subcommand)


def _interrupted(command: str | None) -> None:
    leaves = "Nothing was written." if command is None else VERBS[command]
    message = f"Interrupted: {command or 'phreg-deploy'}. {leaves}"
    echo(f"Error: {message}", err=True)
    _fail(message, exit_code())


def _fail(message: str, code: int, report: dict[str, Any] | None = None) -> None:
    if "--json" in sys.argv:
        # If stdout cannot be written, the error on stderr and the exit code remain.
        with suppress(PhregError):
            echo(json.dumps(plain({**(report or {}), "error": message, "exit_code": code}), sort_keys=True))
    sys.exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="phreg-deploy")
def main() -> None:
    """Clean dense features from pretrained Vision Transformers, served without PyTorch.

    \b
    The commands form a chain; each reads what the one before it wrote:
      phreg-deploy distill vit_small_patch14_dinov2.lvd142m --images photos/ -o dino-reg
      phreg-deploy export dino-reg -o dino.bundle --format onnx --image-size 518
      phreg-deploy calibrate dino.bundle --images photos/ -o dino-int8.bundle
      phreg-deploy build dino.bundle
      phreg-deploy check dino.bundle --reference dino-reg --images photos/
      phreg-deploy extract dino.bundle photo.jpg -o features/

    Exit codes: 0 done; 2 usage or bad input; 3 a gate failed; 4 a backend or dependency is missing.
    """


for verb in VERBS:
    main.add_command(getattr(import_module(f"phreg_deploy.cli.{FOLDERS.get(verb, 'commands')}.{verb}"), verb))
