"""The command line: parse, call one library function, print. Rooms are imported inside the commands, never here."""

from __future__ import annotations

import difflib
import json
import sys
from typing import Any

import click

from phreg_deploy import __version__
from phreg_deploy.cli import build, eight, look, make, measure, serve, show
from phreg_deploy.cli.options import plain
from phreg_deploy.errors import PhregError


class Group(click.Group):
    """Turns every error that a user can cause into a message and an exit code."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" The commands are {', '.join(self.commands)}."
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.exit(code if isinstance(code, int) else 0)
        except PhregError as error:
            click.echo(f"Error: {error}", err=True)
            _fail(str(error), error.exit_code, error.report)
        except click.ClickException as error:  # unknown options and the like: click's words, and ours for machines
            error.show()
            _fail(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _interrupted()
        except BrokenPipeError:
            sys.exit(0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print "Aborted!" and exit 1
            _interrupted()


def _interrupted() -> None:
    hint = "; the same command with --resume goes on" * ("distill" in sys.argv[1:2])
    message = f"Interrupted. Nothing half-written was left{hint}."
    click.echo(f"Error: {message}", err=True)
    _fail(message, 130)


def _fail(message: str, code: int, report: dict[str, Any] | None = None) -> None:
    if "--json" in sys.argv:
        click.echo(json.dumps(plain({**(report or {}), "error": message, "exit_code": code}), sort_keys=True))
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
    make.distill,
    make.export,
    eight.calibrate,
    build.build,
    serve.check,
    measure.profile,
    serve.extract,
    look.artifacts,
    look.inspect,
    look.doctor,
    show.demo,
):
    main.add_command(command)
