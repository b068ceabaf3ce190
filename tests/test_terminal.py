"""Commands on a terminal or a pipe: other encodings, closed pipes, control characters, Ctrl-C."""

import json
import os
import subprocess
import sys

import pytest

from phreg_deploy import cli
from phreg_deploy.cli.console import Result
from tests.cli_helpers import ROOT

pytestmark = pytest.mark.usefixtures("torch")


def run_process(*words, **options):
    """Start the command line in its own process, like a shell."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("environment", {})}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "phreg_deploy", *(str(word) for word in words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_a_terminal_without_unicode_gets_question_marks(world, environment):
    folder = world.copy("bundle").rename(world.tmp / "bünd→le")
    for path, code in ((folder, 0), (world.student, 0), (world.tmp / "wég→", 2)):
        process = run_process("inspect", path, environment=environment)
        out, err = process.communicate()
        assert b"Traceback" not in err
        assert process.returncode == code, err
        assert b"?" in out + err


def run_without_reader(*words):
    """Return exit code and stderr of a command whose reader closes the pipe, as ``head`` does."""
    process = run_process(*words)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    return process.wait(), err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_closed_pipe_is_no_error(world, more):
    code, err = run_without_reader("inspect", world.bundle, *more)
    assert code == 0
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


def test_a_closed_pipe_changes_neither_the_work_nor_the_exit_code(world):
    """The first line of ``extract`` names the backend; the features are written after it."""
    assert run_without_reader("extract", world.bundle, world.photos / "frame-00.png", "-o", world.out)[0] == 0
    assert (world.out / "features.json").is_file()
    code, err = run_without_reader("inspect", world.tmp / "none", "--json")
    assert code == 2
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are not Unicode")
def test_a_folder_whose_name_is_not_unicode(world):
    folder = world.copy("bundle").rename(os.fsdecode(os.fsencode(world.tmp) + b"/caf\xe9"))
    for words in (["inspect", folder], ["check", folder, "--report", world.tmp / "page.html"]):
        process = run_process(*words)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert b"caf?" in out + err
    assert "caf?" in (world.tmp / "page.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_stdout_on_a_full_disk_is_a_message(world, more):
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "phreg_deploy", "inspect", str(world.bundle), *more],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert process.returncode == 2
    assert b"Error: output: stdout cannot be written (No space left on device)." in process.stderr
    assert b"Traceback" not in process.stderr


HOSTILE = "vit\x1b[2J\x1b]0;owned\x07\x9b31m\r"


def test_control_characters_of_a_bundle_do_not_reach_the_terminal(world, run_cli):
    def hostile(data):
        return json.dumps({**json.loads(data), "architecture": HOSTILE}).encode()

    outcome = run_cli("inspect", world.copy("base", config=hostile))
    assert outcome.code == 0
    assert "vit?[2J?]0;owned?" in outcome.out
    assert not {c for c in outcome.out if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n"}
    refused = run_cli("inspect", world.tmp / "gone\x1b[2J", "--json")
    assert refused.code == 2
    assert "\x1b" not in refused.err + refused.out


def test_every_way_to_print_drops_control_characters(capsys):
    result = Result(as_json=False, quiet=False)
    result.say(f"say {HOSTILE}")
    result.table(f"title {HOSTILE}", ["column"], [[HOSTILE]])
    result.progress.say(f"progress {HOSTILE}")
    result.json({"name": HOSTILE})
    printed = capsys.readouterr()
    assert not {c for c in printed.out + printed.err if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n"}
    assert (printed.out + printed.err).count("vit?[2J") == 4


# command: arguments that it can parse
ARGUMENTS = {
    "distill": ["m", "--images", "i", "-o", "o"],
    "export": ["m", "-o", "o"],
    "calibrate": ["b", "--images", "i", "-o", "o"],
    "extract": ["b", "i", "-o", "o"],
    "artifacts": ["m", "--images", "i"],
    "attach": ["b", "--head", "h", "-o", "o"],
    "classes": ["n", "--model", "m", "-o", "o"],
    "evaluate": ["m", "--images", "i", "--masks", "k"],
    "explore": ["b", "--images", "i", "-o", "o"],
    "push": ["s", "org/name"],
    "probe": ["m", "--images", "i", "--masks", "k", "-o", "o"],
    "serve": ["b"],
    "sign": ["b", "--key", "k"],
    "watch": ["s", "b"],
    "doctor": [],
    "selftest": [],
    "demo": [],
}


@pytest.mark.parametrize("name", sorted(cli.main.commands))
def test_an_interruption_names_what_the_command_leaves(run_cli, monkeypatch, name):
    def interrupted(**_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.main.commands[name], "callback", interrupted)
    outcome = run_cli(name, *ARGUMENTS.get(name, ["b"]), "--json")
    outcome.refused(130, f"Interrupted: {name}. ")
    message = outcome.document["error"]
    assert ("--resume" in message) == (name == "distill")
    assert ("OUTPUT" in message) == ("-o" in ARGUMENTS.get(name, []) or name == "demo")


# ``rich.table`` is imported with the command line, ``PIL.Image`` by the command.
@pytest.mark.parametrize("module", ["rich.table", "PIL.Image"])
def test_an_interruption_of_the_imports_is_a_message(world, module):
    early = f"""
import signal, sys
from phreg_deploy.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(lambda event, got: event == "import" and got[0] == {module!r} and signal.raise_signal(signal.SIGINT))
main()
"""
    command = [sys.executable, "-c", early, "extract", world.bundle, world.photos, "-o", world.out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("Error: Interrupted: ")
    assert "Traceback" not in done.stderr
    assert list(world.tmp.iterdir()) == []


def test_an_interrupted_distillation_resumes_as_the_message_says(world, run_cli, monkeypatch):
    """The message names ``OUTPUT.partial`` and ``--resume``; the folder exists and the option works."""
    from phreg_deploy.distill import distillation

    words = ["distill", world.base, "--images", world.photos, "-o", world.out]
    words += ["--epochs", "1", "--batch", "8", "--views", "6", "--device", "cpu", "--precision", "fp32", "--json"]

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "train", interrupted)
        run_cli(*words).refused(130, "OUTPUT.partial", "--resume", "--force")
    assert (world.tmp / "out.partial").is_dir()
    assert not world.out.exists()
    assert run_cli(*words, "--resume").code == 0
