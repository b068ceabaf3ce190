"""Check the READMEs, CONTRIBUTING and docs/: commands parse, Python runs, links have a target."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from phreg_deploy.cli import main
from phreg_deploy.pytest_plugin.options import OPTIONS, SETTINGS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = [ROOT / "benchmarks" / "README.md", ROOT / "examples" / "README.md"]
PAGES = [README, ROOT / "CONTRIBUTING.md", *FOLDERS, *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
NEEDS_GPU = "<!-- needs a GPU -->"
# Programs of the system, which the project does not define.
SYSTEM = {"sudo", "apt-get", "git", "cd", "python3", ".", "curl", "g++", "npm", "cp", "docker", "tritonserver"}
OTHER_PROGRAMS = SYSTEM | {"VIT", "./dense_features", "openssl"}


def code_blocks(page: Path, language: str) -> list[tuple[int, str, bool]]:
    """Code blocks of a page: line number of the first line, code, and whether it needs a GPU."""
    text = page.read_text()
    found = re.finditer(rf"({re.escape(NEEDS_GPU)}\n)?```{language}\n(.*?)```", text, re.S)
    return [(text[: block.start(2)].count("\n") + 1, block[2], bool(block[1])) for block in found]


def position(page: Path, line: int) -> str:
    return f"{page.relative_to(ROOT)}:{line}"


def commands() -> list[object]:
    """Every command line of every page, with its continuation lines joined and its comment cut."""
    params = []
    for page in PAGES:
        for start, code, _ in code_blocks(page, "bash"):
            for line in code.replace("\\\n", " " * 2).splitlines():
                for part in re.split(r"\s&&\s", line):
                    words = shlex.split(part, comments=True)
                    if words:
                        params.append(pytest.param(words, id=f"{position(page, start)} {' '.join(words)[:60]}"))
    return params


def check_phreg(words: list[str]) -> None:
    """Assert that a command of the command line takes these words.

    click caches a command's help option, with the names that its first context gives. Only a child of the group's
    context has the name ``-h``: a context without a parent would remove ``-h`` from the tests that come later.
    """
    command = main.commands[words[0]]
    context = click.Context(command, parent=click.Context(main, **main.context_settings))
    _, rest, _ = command.make_parser(context).parse_args(list(words[1:]))
    known = {option for parameter in command.params for option in parameter.opts}
    assert all(word in known for word in words if word.startswith("--"))
    assert rest == []


def check_plugin(words: list[str]) -> None:
    """pytest and its plugin know these words: ``--phreg-NAME=VALUE``, ``-o phreg_NAME=VALUE`` and a few of pytest."""
    for before, word in zip(["", *words], words):
        name = word.partition("=")[0]
        if before == "-o":
            assert name.removeprefix("phreg_") in SETTINGS, word
        elif name.startswith("--phreg-"):
            assert name.removeprefix("--phreg-") in OPTIONS, word
        else:
            assert name in ("-o", "-p", "--junitxml") or word == "no:phreg_deploy.pytest_plugin", word


def check_script(script: Path, words: list[str]) -> None:
    """A script of benchmarks/, examples/ or tests/ exists and declares every option; rclpy reads what is ROS's."""
    if "--ros-args" in words:
        words = words[: words.index("--ros-args")]
    if script.with_suffix("").is_dir():
        script = script.with_suffix("") / "__main__.py"
    assert script.is_file(), script
    code = script.read_text()
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in code] == []


@pytest.mark.parametrize("words", commands())
def test_every_command_line_parses(words):
    program, *rest = words
    if program == "torchrun":
        program, *rest = "python", *rest[rest.index("-m") :]
    if "phreg_deploy" in rest[:3] and rest[:2] == ["-m", "phreg_deploy"]:
        check_phreg(rest[2:])
    elif program == "phreg-deploy":
        if ">" in rest:
            rest = rest[: rest.index(">")]
        check_phreg(rest)
    elif program == "make":
        assert f"\n{rest[0]}: " in MAKEFILE
    elif program == "pip":
        for extra in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert all(f"\n{name} = [" in PYPROJECT for name in extra.split(",")), extra
    elif program == "pytest" and rest == ["-m", "gpu"]:
        assert '"gpu: ' in PYPROJECT
    elif program == "pytest":
        check_plugin(rest)
    elif program == "python" and rest[0] == "-c":
        ast.parse(rest[1])
    elif program == "python" and rest[:2] == ["-m", "http.server"]:
        assert len(rest) == 3
    elif program == "python" and rest[0] == "-m":
        check_script(ROOT / f"{rest[1].replace('.', '/')}.py", rest[2:])
    elif program == "python":
        check_script(ROOT / rest[0], rest[1:])
    elif program.startswith(".venv/bin/"):
        assert f'"{Path(program).name}>=' in PYPROJECT
    else:
        assert program.split("=")[0] in OTHER_PROGRAMS, words


def python_blocks() -> list[object]:
    return [
        pytest.param(code, needs_gpu, id=position(page, line))
        for page in PAGES
        for line, code, needs_gpu in code_blocks(page, "python")
    ]


@pytest.mark.parametrize(("code", "needs_gpu"), python_blocks())
def test_every_python_block_runs(code, needs_gpu, request, tmp_path, monkeypatch):
    tree = ast.parse(code)
    if needs_gpu:
        pytest.skip("needs a GPU: parsed only")
    if "timm" in code:
        pytest.importorskip("timm")
        shutil.copytree(request.getfixturevalue("student"), tmp_path / "student")
    if "student.bundle" in code:
        shutil.copytree(request.getfixturevalue("bundle"), tmp_path / "student.bundle")
        shutil.copy(request.getfixturevalue("photos") / "frame-03.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(tree, "page", "exec"), {})


def test_every_command_is_in_the_readme():
    assert {name for name in main.commands if f"phreg-deploy {name}" not in README.read_text()} == set()


def test_the_readme_is_short_and_shows_a_small_picture():
    assert len(README.read_text().splitlines()) <= 130
    picture = ROOT / "docs" / "images" / "before-after.png"
    assert f"]({picture.relative_to(ROOT)})" in README.read_text()
    assert picture.stat().st_size < 300_000


def test_continuous_integration_runs_the_readme():
    runner = (ROOT / ".ci" / "run").read_text()
    for target in ("demo", "test", "docs"):
        assert f"\n{target}: " in MAKEFILE
        assert f"\nmake {target}\n" in runner


def anchor(heading: str) -> str:
    """The anchor of a heading, as Markdown viewers and mkdocs make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_has_a_target(page):
    for target in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if fragment:
            assert fragment in {anchor(title) for title in re.findall(r"^#+ (.*)$", path.read_text(), re.M)}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_exists(page):
    """Paths of the repository; NAME and VERB stand for what a contributor adds."""
    paths = re.findall(r"`((?:phreg_deploy|tests|benchmarks|docs|examples)/[\w./-]*)`", page.read_text())
    assert [path for path in paths if not re.search(r"NAME|VERB", path) and not (ROOT / path).exists()] == []


def test_every_page_of_docs_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f": {page.name}\n" not in navigation] == []
