"""The README keeps its word: every command is in it, every command it shows exists with those options."""

import re
import shlex
from pathlib import Path

import click
import pytest

from phreg_deploy.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("phreg-deploy ")
]


def test_every_command_is_in_the_readme():
    assert {name for name in main.commands if f"phreg-deploy {name}" not in README} == set()


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_the_readme_parses(line):
    words = shlex.split(line)[1:]
    command = main.commands[words[0]]
    context = click.Context(command)
    _, rest, _ = command.make_parser(context).parse_args(words[1:])
    known = {o for p in command.params for o in p.opts}
    assert all(word in known for word in words if word.startswith("--"))
    assert rest == []


def test_the_two_commands_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "\ndemo: " in makefile
    assert "\ntest: " in makefile
    assert "make demo" in (Path(__file__).parents[1] / ".ci" / "run").read_text()


def test_every_link_points_to_a_file():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
