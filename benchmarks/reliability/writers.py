"""The commands that write an output, and whether an output is absent, the old one or the new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.children import ON_FAKE_GPU, PLAIN, Ended, run
from benchmarks.reliability.subjects import Subjects

HERE = ("--backend", "onnxruntime-cpu", "--threads", "1")
View = dict[str, bytes]


@dataclass(frozen=True)
class Writer:
    """A command that writes ``OUTPUT``.

    ``words(output)``: its words; ``older``: those that write an older output, which the command replaces by
    ``replaces``. ``imports``: the modules that it loads first. ``code``: what runs it. ``given``: a folder that stands
    as ``OUTPUT`` before the command, for one that writes into it. ``resumes``: None for a command without ``--resume``;
    else the folder beside the output that ``--resume`` needs, or "" if it needs none. ``view``: reads what counts.
    """

    name: str
    words: Callable[[Path], tuple[object, ...]]
    older: Callable[[Path], tuple[object, ...]]
    imports: str
    replaces: tuple[str, ...] = ("--force",)
    code: str = PLAIN
    given: Path | None = None
    resumes: str | None = None
    view: Callable[[Path], View | None] = field(default=lambda output: files_of(output))


def files_of(output: Path) -> View | None:
    """Every file of an output: path -> bytes; None if there is no output."""
    if not output.exists():
        return None
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


def indexed(output: Path) -> View | None:
    """The index of an extraction and every file that it names; None without an index. A missing file is empty."""
    index = output / "features.json"
    if not index.exists():
        return None
    data = index.read_bytes()
    names = sorted(name for entry in json.loads(data)["images"] for name in entry["sha256"])
    return {"features.json": data, **{name: _read(output / name) for name in names}}


def engine(output: Path) -> View | None:
    """The files of a bundle and of its listed plans; None if no plan is listed, which is as a bundle without one."""
    from phreg_deploy.bundle.bundle import Bundle
    from phreg_deploy.bundle.plans import INSPECTED, list_plans

    plans = list_plans(Bundle.read(output))
    if not plans:
        return None
    found = {}
    for plan in plans:
        found |= {f"engines/{path.name}": _read(path) for path in (plan.path, plan.path.with_suffix(INSPECTED))}
        # A sidecar may hold the facts of two plans; those of the plan that is there count.
        facts = {"sha256": plan.sha256, "report": plan.report}
        found[f"engines/{plan.path.with_suffix('.json').name}"] = json.dumps(facts).encode()
    return {**{p.name: p.read_bytes() for p in sorted(output.iterdir()) if p.is_file()}, **found}


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def writers(subjects: Subjects) -> dict[str, Writer]:
    """Every command that is measured; subjects that are missing are made first."""
    photos, student, bundle = subjects.photos, subjects.student, subjects.bundle
    few = sorted(photos.iterdir())[:8]

    def distill(output: Path, epochs: int = 10) -> tuple[object, ...]:
        words = ("distill", subjects.base, "--images", photos, "--epochs", epochs, "--batch", 8, "--views", 6)
        return (*words, "--device", "cpu", "--cache", output.with_name("cache"), "-o", output)

    def export(output: Path, *more: object) -> tuple[object, ...]:
        return ("export", student, "-o", output, *more)

    def calibrate(output: Path, *more: object) -> tuple[object, ...]:
        return ("calibrate", bundle, "--images", photos, "-o", output, *more)

    def extract(output: Path, images: list[Path], *more: object) -> tuple[object, ...]:
        return ("extract", bundle, *images, "-o", output, *HERE, "--outputs", "features,cls", *more)

    def build(output: Path, *more: object) -> tuple[object, ...]:
        return ("build", output, *more)

    shard = ("--shard", "1/1")
    exporter, calibrator = "phreg_deploy.export.exporter", "phreg_deploy.calibration.calibrator"
    features = "phreg_deploy.extraction.sharded, onnxruntime"
    listed = [
        Writer("distill", distill, lambda o: distill(o, 0), "phreg_deploy.distill.distillation", resumes="out.partial"),
        Writer("export", export, lambda o: export(o, "--image-size", 48), exporter),
        Writer(
            "export --precision int8",
            lambda o: export(o, "--precision", "int8", "--images", photos),
            lambda o: export(o, "--image-size", 48),
            f"{exporter}, {calibrator}",
        ),
        Writer("calibrate", calibrate, lambda o: calibrate(o, "--target", "trt"), calibrator),
        Writer(
            "extract",
            lambda o: extract(o, [photos]),
            lambda o: extract(o, few, "--dtype", "float16"),
            features,
            resumes="",
        ),
        Writer(
            "extract --shard 1/1",
            lambda o: extract(o, [photos], *shard),
            lambda o: extract(o, few, *shard),
            features,
            replaces=("--resume",),
            resumes="",
            view=indexed,
        ),
        Writer(
            "build",
            build,
            lambda o: build(o, "--no-check"),
            "tests.fake_gpu, phreg_deploy.export.engine.build",
            code=ON_FAKE_GPU,
            given=bundle,
            view=engine,
        ),
    ]
    return {writer.name: writer for writer in listed}


@dataclass
class Expected:
    """What a command writes when nothing goes wrong.

    ``new``: its output; ``again``: that of another run, which may differ in times; ``old``: the older output, kept in
    ``aged``. ``temporary``: what it leaves in the folder for temporary files. ``seconds``, ``imports``, ``warm``: CPU
    seconds of the whole command, of its imports, and of the command in a process that has imported them.
    """

    new: View
    again: View
    old: View
    aged: Path
    temporary: set[str]
    seconds: float
    imports: float
    warm: float


class Case:
    """A folder for one case: ``output``, and what lies beside it."""

    def __init__(self, place: Path) -> None:
        self.place, self.folder = place, place / "case"
        self.output = self.folder / "out"

    def prepare(self, writer: Writer | None, aged: Path | None = None) -> None:
        """Empty the folder; with a command, copy what stands there before it."""
        for name in ("case", "tmp", "home"):
            shutil.rmtree(self.place / name, ignore_errors=True)
            (self.place / name).mkdir(parents=True)
        if writer is not None:
            self.fill(writer, aged)

    def fill(self, writer: Writer, aged: Path | None) -> None:
        """Copy what stands there before the command: the older output, or what it writes into."""
        source = aged or writer.given
        if source is not None:
            shutil.copytree(source, self.output)

    def beside(self) -> list[str]:
        """What lies beside the output and its cache."""
        return sorted({p.name for p in self.folder.iterdir()} - {"out", "cache"})

    def temporary(self) -> set[str]:
        return {p.name for p in (self.place / "tmp").iterdir()}


def observe(writer: Writer, case: Case) -> Expected:
    """Run the command unharmed, twice, and once more for the older output."""

    def once(words: tuple[object, ...], again: bool = False, warm: bool = True) -> tuple[View, Ended]:
        if not again:
            case.prepare(writer)
        ended = run(case.place, words, writer.code, warm=warm)
        view = writer.view(case.output)
        if ended.code or view is None:
            raise SystemExit(f"{writer.name}, unharmed: exit code {ended.code}: {ended.error[-2000:]}")
        return view, ended

    old, _ = once(writer.older(case.output))
    aged = case.place / "aged"
    shutil.rmtree(aged, ignore_errors=True)
    shutil.copytree(case.output, aged)
    new, cold = once(writer.words(case.output), warm=False)
    temporary = case.temporary()
    _, warm = once(writer.words(case.output))
    # The second time over the first one, with what the first one left in a cache.
    replaces = ("--force",) if writer.replaces == ("--resume",) else writer.replaces
    again, _ = once((*writer.words(case.output), *replaces), again=True)
    imports = run(case.place, (), f"import {writer.imports}").seconds
    return Expected(new, again, old, aged, temporary, cold.seconds, imports, warm.seconds)


def judge(view: View | None, expected: Expected, old: bool) -> str:
    """Return "absent", "old", "new", "new, its scores or card not yet", "a part of the new one", or what is wrong.

    ``old``: whether the older output stood there before.
    """
    if view is None:
        return "the old output is gone" if old else "absent"
    if old and view == expected.old:
        return "old"
    wrong = different(view, expected)
    if wrong and unscored(view, expected):
        return "new, its scores or card not yet"
    if wrong and kept(view, expected):
        return "a part of the new one"
    return f"neither old nor new: {wrong}" if wrong else "new"


def kept(view: View, expected: Expected) -> bool:
    """Whether this is what `extract` keeps after Ctrl-C: whole files, and an index that says that some are missing."""
    index = _parse("features.json", view.get("features.json", b""))
    files = {name: data for name, data in view.items() if name != "features.json"}
    return isinstance(index, dict) and index["complete"] is False and files.items() <= expected.new.items()


def unscored(view: View, expected: Expected) -> bool:
    """Whether this is the new student without its scores, or without the picture of its card.

    `distill` computes both once the student is written. Its weights and their configuration have the right bytes, its
    record is whole, and its card ends in a whole line.
    """
    record = _parse("phreg.json", view.get("phreg.json", b""))
    same = all(view.get(name) == expected.new.get(name, b"") for name in ("model.safetensors", "config.json"))
    return same and isinstance(record, dict) and view.get("README.md", b"").endswith(b"\n")


def different(view: View, expected: Expected) -> str:
    """What differs from the output of an unharmed run; "" if nothing does that two unharmed runs share."""
    if view.keys() != expected.new.keys():
        return f"files {sorted(view.keys() ^ expected.new.keys())} are missing or too many"
    for name, data in view.items():
        first, second = expected.new[name], expected.again[name]
        if first == second and data != first:
            return f"{name} has other bytes"
        if first != second and not _agree(*(_parse(name, one) for one in (data, first, second))):
            return f"{name} says something else: {data[:300]!r}"
    return ""


def _parse(name: str, data: bytes) -> Any:
    try:
        return json.loads(data) if name.endswith(".json") else data[:40]
    except ValueError:
        return f"no JSON: {len(data)} bytes"


def _agree(value: Any, first: Any, second: Any) -> bool:
    """Whether a value is that of two unharmed runs, wherever these two agree; it has their type in any case."""
    if isinstance(value, dict) and isinstance(first, dict) and isinstance(second, dict):
        return value.keys() == first.keys() and all(_agree(value[key], first[key], second.get(key)) for key in value)
    if isinstance(value, list) and isinstance(first, list) and isinstance(second, list):
        return len(value) == len(first) and all(map(_agree, value, first, second))
    return type(value) is type(first) and (value == first or first != second)
