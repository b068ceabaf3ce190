"""Write the tables of README and docs from the JSON beside this file; a test compares them.

    python -m benchmarks.tables

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->`` on a page of ``PAGES``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability import run_tables
from benchmarks.reliability.summary import disks, kills, outcomes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "reliability.md", ROOT / "docs" / "figures.md", ROOT / "docs" / "int8.md")
MARK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]
KEYS = ("rate", "seconds")
# Titles of the runs in ``present_recipe.json``, by how they start; a run of each but the first is optional.
RUNS = {
    "transplant": "default recipe",
    "random-registers": "random-registers",
    "no registers": "no registers",
    "sinder": "sinder, no registers",
    "singular values": "singular values on targets, no registers",
}


def load(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def three(value: float | None) -> str:
    """A cosine or share with three digits, as ".967"; "1" above .99995."""
    return "-" if value is None else "1" if value > 0.99995 else f"{value:.3f}".removeprefix("0")


def four(value: float) -> str:
    """A cosine with four digits, as ".9671"; "1" above .99995."""
    return "1" if value > 0.99995 else f"{value:.4f}".removeprefix("0")


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _interval(low_high: list[float]) -> str:
    return f"{100 * low_high[0]:+.1f} to {100 * low_high[1]:+.1f}"


def quality(name: str) -> str:
    """The rows of ``quality.py`` as columns, one for each model."""
    rows = load(name)["rows"]
    columns = [f"{n} ({r['seeds']} seeds)" if r["seeds"] > 1 else n for n, r in rows.items()]

    def line(title: str, read: Callable[[Row], str]) -> list[str]:
        return [title, *(read(row) for row in rows.values())]

    def outliers(row: Row, read: Callable[[Row], str]) -> str:
        return read(row["norm_outliers"]) if "norm_outliers" in row else "-"

    def gain(row: Row, text: str) -> str:
        return text if row["gain"] else "-"

    return table(
        ["", *columns],
        [
            line("norm-outlier rate, CamVid val", lambda r: outliers(r, lambda o: percent(o["rate"], 3))),
            line("largest norm / median", lambda r: outliers(r, lambda o: f"{o['largest']:.2f}")),
            line("cosine to the denoised target, mean", lambda r: three(r["fidelity"]["mean"])),
            line("1st percentile", lambda r: three(r["fidelity"]["p1"])),
            line("over the base's outlier tokens", lambda r: three(r["fidelity"]["chosen"])),
            line("class token cosine", lambda r: three(r.get("class_cosine"))),
            line("top-1 agreement", lambda r: three(r.get("top1_agreement"))),
            line("CamVid probe, accuracy on outlier tokens", lambda r: three(r["accuracy_outliers"])),
            line("CamVid probe, mean IoU", lambda r: percent(r["miou"])),
            line("95 % interval of the gain over base, points", lambda r: gain(r, _interval(r["gain_interval"]))),
            line("against base", lambda r: gain(r, r["against_base"])),
        ],
    )


def headline(name: str) -> str:
    """Rows of ``headline.py``: the base model in PyTorch beside the bundle that three commands make of it."""
    report = load(name)
    base, served, instructions = report["base"], report["served"], report["eight_bit_instructions"]
    kind = f"with {', '.join(instructions)}" if instructions else "without 8-bit dot products"
    model = report["model"].split(".")[0]
    title = f"{model} on {report['processor']} {kind}, {report['threads']} threads"
    models = (base, served)
    verdicts = ("", f" ({served['against_base']})")
    return table(
        [title, "base, PyTorch FP32", f"INT8 bundle, {report['backend']}"],
        [
            ["milliseconds an image", *(f"{m['ms']:.1f}" for m in models)],
            ["weights on disk", *(f"{m['megabytes']:.1f} MB" for m in models)],
            ["norm-outlier rate", *(percent(m["norm_outliers"]["rate"], 2) for m in models)],
            ["cosine to the denoised target: mean", *(three(m["fidelity"]["mean"]) for m in models)],
            ["over the base's outlier tokens", *(three(m["fidelity"]["chosen"]) for m in models)],
            ["CamVid probe, mean IoU", *(percent(m["miou"]) + verdict for m, verdict in zip(models, verdicts))],
        ],
    )


SHORT = (
    "PyTorch eager FP32",
    "torch.compile bf16",
    "ORT FP32, stock export",
    "ours OpenVINO FP32",
    "ours OpenVINO bf16",
    "NNCF on OpenVINO, default, bf16 rest",
    "ours ORT INT8, every linear layer",
    "ours OpenVINO INT8, every linear layer, bf16 rest",
)


def demo(_name: str) -> str:
    """``phreg-deploy demo --json``."""
    report = load("demo")
    columns = [
        f"on {report['scenes']} scenes that nothing was trained on",
        "base",
        "student",
        "served, ONNX Runtime",
        "served in INT8",
    ]
    return table(columns, [[str(cell or "") for cell in row] for row in report["table"]])


def speed(name: str) -> str:
    """Milliseconds of ``peers.json``, models with random weights; "speed-short" shows the rows of ``SHORT``."""
    reports = load("peers")["models"]
    models = {title: report["ms"] for title, report in reports.items() if "fidelity" not in report}
    names = SHORT if name.endswith("short") else dict.fromkeys(key for ms in models.values() for key in ms)
    eager = "PyTorch eager FP32"

    def cell(ms: dict[str, float], name: str) -> str:
        return f"{ms[name]:.1f} ({ms[eager] / ms[name]:.2f}x)" if name in ms else "-"

    return table(["", *models], [[key, *(cell(ms, key) for ms in models.values())] for key in names])


def no_vnni(_name: str) -> str:
    """``int8_without_vnni.json``: agreement with FP32, and milliseconds where they were measured."""
    rows = load("int8_without_vnni")["rows"]

    def line(row: Row) -> list[str]:
        cosine = "1" if row["mean"] is None else f"{row['mean']:.4f} / {row['p1']:.4f}"
        milliseconds = "-" if row["ms"] is None else f"{row['ms']:.1f}"
        return [row["what"], row["model"], cosine, milliseconds, row["where"]]

    columns = ["", "model", "cosine to own FP32: mean / 1st percentile", "ms", "measured on"]
    return table(columns, [line(row) for row in rows])


def choices(_name: str) -> str:
    """``int8_choices.json``: one calibration on two kinds of processor."""
    report = load("int8_choices")

    def both(key: str) -> str:
        first, second = report[key]
        return "the same" if first == second else f"{first} / {second}"

    p1, largest = report["fidelity"]["cosine_p1"], report["largest_weight_difference"]
    return table(
        ["", "AVX512-VNNI / AVX2"],
        [
            ["smoothing that was chosen", both("smoothing")],
            ["layers that were left in float", both("float_layers")],
            ["1st-percentile cosine of the report", f"{p1[0]:.5f} / {p1[1]:.5f}"],
            [
                "int8 weights that differ",
                f"{report['weights_that_differ']} of {report['weights']}, by at most {largest}",
            ],
        ],
    )


def gates(_name: str) -> str:
    """``gates.json``: the worst figure of each kind by precision, beside its bar."""
    report = load("gates")
    rows = []
    for precision, kinds in report["worst"].items():
        for kind, figures in kinds.items():
            bars = report["bars"][precision][kind]
            rows += [[precision, kind, name, f"{figures[name]:.6g}", f"{bar:g}"] for name, bar in bars.items()]
    return table(["precision", "compared on", "figure", "worst measured", "bar"], rows)


def present_recipe(name: str) -> str:
    """The scores in ``phreg.json``: of each model the base, the students of all seeds, and the controls'."""
    columns, read = [""], []
    for model, record in load(name).items():
        scores = record["scores"]
        runs = {"transplant, seed 0": scores, **record["further_runs"]}
        read.append([{"student": scores["base"], "class_cosine": 1.0, "top1_agreement": 1.0}])
        columns.append(f"{model}, base")
        for kind, title in RUNS.items():
            of_kind = [run for name, run in runs.items() if name.startswith(f"{kind}, seed")]
            if of_kind:
                read.append(of_kind)
                columns.append(f"{title}, {f'{len(of_kind)} seeds' if len(of_kind) > 1 else 'one seed'}")

    def line(title: str, value: Callable[[Row], float], text: Callable[[float], str]) -> list[str]:
        return [title, *(" / ".join(text(value(run)) for run in runs) for runs in read)]

    rate, largest = (lambda run, key=key: run["student"]["norm_outliers"][key] for key in ("rate", "largest"))
    fidelity = {key: lambda run, key=key: run["student"]["fidelity"][key] for key in ("mean", "p1", "outliers")}
    rows = [
        line("norm-outlier rate", rate, lambda value: percent(value, 3)),
        line("largest norm / median", largest, lambda value: f"{value:.2f}"),
        line("cosine to the denoised target, mean", fidelity["mean"], three),
        line("1st percentile", fidelity["p1"], three),
        line("over the base's outlier tokens", fidelity["outliers"], three),
        line("class token cosine", lambda run: run["class_cosine"], three),
        line("top-1 agreement", lambda run: run["top1_agreement"], three),
    ]
    return table(columns, rows)


def sinder_direction(name: str) -> str:
    """The outliers' direction beside SINDER's prediction, one row for each model."""
    columns = ["|cosine| with the outliers' direction", "after block"]
    kinds = ["attention and MLP", "attention", "both, centred"]
    rules = ["as released", "in the recipe"]
    shares = ["outliers at the border", *(f"photographs flagged, {rule}" for rule in rules)]

    def line(row: Row) -> list[str]:
        cosines = [three(row["cosine"][kind]) for kind in kinds]
        found = [row["outliers_at_border"], *(row["flagged"][rule] for rule in rules)]
        return [
            row["model"],
            str(row["block"]),
            *cosines,
            three(row["random"]),
            *(percent(share, 0) for share in found),
        ]

    columns = [column.replace("|", "\\|") for column in [*columns, *kinds, "at random", *shares]]
    return table(columns, [line(row) for row in load(name)["models"]])


def tiling(_name: str) -> str:
    """``tiling.json``: the errors of blended windows beside those of windows apart."""
    report = load("tiling")
    rows = {
        "windows": ("windows", "{:.0f}"),
        "error of a shift by half a patch": ("shift", "{:.3f}"),
        "error beside borders, windows placed elsewhere": ("placement_near", "{:.3f}"),
        "the same over all other patches": ("placement_elsewhere", "{:.3f}"),
        "beside borders over a shift; the bar is 2": ("near_over_shift", "{:.2f}"),
        "error to the image in one piece, beside borders over elsewhere": ("whole_near_over_elsewhere", "{:.2f}"),
    }
    lines = [[name, *(text.format(row[key]) for row in report["seams"].values())] for name, (key, text) in rows.items()]
    for name, key in (("artifact rate within windows", "window_artifact_rate"), ("after blending", "artifact_rate")):
        lines.append([name, *(percent(row[key], 2) for row in report["seams"].values())])
    times = report["milliseconds"]
    alone = times["graph alone, a window"]
    title = f"milliseconds per megapixel (the graph alone: {alone:.1f} ms a window)"
    lines.append([title, *(f"{times[name]:.0f}" for name in report["seams"])])
    return table(["overlap", *report["seams"]], lines)


def extraction(_name: str) -> str:
    """``extraction.json``: medians over rounds of seconds and rates, with one and with two workers."""
    rows = load("extraction")["rows"]
    titles = {"shards": "two processes of `--shard`", "ray": "two actors of `--ray`"}

    def median(row: Row, workers: str, key: str) -> float:
        return statistics.median(one[key] for one in row[workers])

    lines = [
        [
            titles[way],
            *(f"{median(row, '1', key):.0f} / {median(row, '2', key):.0f} ({row['gain'][key]:.2f}x)" for key in KEYS),
        ]
        for way, row in rows.items()
    ]
    return table(["one worker / two", "images a second, after the start", "seconds of the whole command"], lines)


def stream(_name: str) -> str:
    """``stream.json``: counts, latency and memory of each kind of stream."""
    rows = load("stream")["rows"]
    read: dict[str, Callable[[Row], str]] = {
        "received": lambda row: f"{row['received']}",
        "served / dropped": lambda row: f"{row['served']} / {row['dropped']}",
        "moments at which the counts did not balance": lambda row: f"{row['unbalanced']}",
        "results per second": lambda row: f"{row['served'] / row['seconds']:.1f}",
        "latency p50 / p99, ms": lambda row: f"{row['latency_p50']:.1f} / {row['latency_p99']:.1f}",
        "memory at first / at the end, MiB": lambda row: f"{row['rss']['first']:.0f} / {row['rss']['end']:.0f}",
    }
    return table(["", *rows], [[name, *(one(row) for row in rows.values())] for name, one in read.items()])


def serving(_name: str) -> str:
    """``serving.json``: latency and throughput of bare runs, calls and answers, by clients."""
    columns, rows = ["", "clients"], dict[tuple[str, int], list[str]]()
    kinds = {"run": "`run`, the graph alone", "call": "a call: decode, resize, run", "served": "an answer of `serve`"}
    for name, model in load("serving")["models"].items():
        columns += [f"{name}: p50 / p99, ms", "images a second"]
        for row in model["rows"]:
            cells = [f"{row['p50_ms']:.0f} / {row['p99_ms']:.0f}", f"{row['per_second']:.1f}"]
            rows.setdefault((row["kind"], row["clients"]), []).extend(cells)
    return table(columns, [[kinds[kind], str(clients), *cells] for (kind, clients), cells in rows.items()])


def hand_over(_name: str) -> str:
    """``serving.json``: every request over three hand-overs."""
    found = load("serving")["hand_over"]
    services = found["services"]
    lines = {
        "requests of 16 clients": found["requests"],
        "accepted by the first to the last service": ", ".join(str(service["accepted"]) for service in services),
        "accepted, together": found["accepted"],
        "answered with 200": found["answered"],
        "unfinished at a stop": sum(service["unfinished"] for service in services),
        "repeated after 503 / after a refused connection": f"{found['clients_saw'].get('503', 0)} / "
        f"{sum(count for status, count in found['clients_saw'].items() if not status.isdigit())}",
    }
    return table(["", "count"], [[name, str(value)] for name, value in lines.items()])


def heads(name: str) -> str:
    """``heads.json``: label maps of base, student and INT8 student on CamVid."""
    models = load(name)["models"]

    def line(title: str, place: str, figure: str) -> list[str]:
        cells = [title]
        for label, maps in models.items():
            value, low, high = maps[place][figure]
            gain = "" if label == "base" else f"; {_interval(maps[place][figure + '_gain'][1:])}"
            cells.append(f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f}{gain})")
        return cells

    places = ("bilinear, stride 1", "bilinear, stride 4", "joint bilateral, stride 4", "joint bilateral, stride 1")
    figures = (("mean IoU", "miou"), ("F-score of borders", "boundary"))
    rows = [line(f"{title}, {place}", place, figure) for title, figure in figures for place in places]
    return table([f"{load(name)['model']} (95 % interval; that of the gain over base)", *models], rows)


def heads_cost(name: str) -> str:
    """``heads.json``: what a head adds to the backbone's time, and how many pixels 8 bits change."""
    report = load("heads")
    columns = [f"{size} px, backbone {cost['backbone_ms']:.1f} ms" for size, cost in report["cost"].items()]
    rows = []
    for place, changed in report["changes"].items():
        added = [cost[place] for cost in report["cost"].values()]
        cells = [f"{one['added_ms']:.2f} ms, {percent(one['share'][1])}" for one in added]
        rows.append([place, *cells, percent(changed, 2), percent(load("heads_deit")["changes"][place], 2)])
    return table(["", *columns, "pixels that INT8 changes, ViT-Tiny", "DeiT-Tiny"], rows)


def gpu_images(_name: str) -> str:
    """``gpu_images.json``: ways to resize a frame on a GPU, against Pillow."""
    report = load("gpu_images")
    rows = []
    for way in next(iter(report["models"].values())):
        cells = [way]
        for figures in (model[way] for model in report["models"].values()):
            levels = "0, 0" if not figures["levels_max"] else f"{figures['levels_max']}, {figures['levels_mean']:.4f}"
            cells += [levels, f"{four(figures['cosine_p1'])}, {four(figures['cosine_mean'])}"]
        taken = report["parsed"].get(way)
        rows.append([*cells, "-" if taken is None else "yes" if taken[0] else "no"])
    columns = [
        f"{name}: {what}" for name in report["models"] for what in ("levels, most and mean", "cosine, p1 and mean")
    ]
    return table(["", *columns, "TensorRT's parser takes it"], rows)


def upsamplers(name: str) -> str:
    """``upsamplers.json``: what a label map adds, and what a learned upsampler would."""
    sizes = load(name)["sizes"]
    columns = [f"{size} px, backbone {facts['backbone_ms']:.1f} ms" for size, facts in sizes.items()]

    def cell(facts: Row, row: str) -> str:
        return f"{facts['added_ms'][row]:.1f} ms, {percent(facts['share'][row][1])}"

    rows = [[row, *(cell(facts, row) for facts in sizes.values())] for row in next(iter(sizes.values()))["share"]]
    saved = [facts["saved_by_labels_alone"] for facts in sizes.values()]
    spread = [f"{percent(middle)} ({percent(low)} to {percent(high)})" for low, middle, high in saved]
    copied = [f"{f['bytes']['labels beside features']} / {f['bytes']['labels alone']}" for f in sizes.values()]
    rows += [["time saved by labels alone (quartiles)", *spread], ["bytes of outputs, beside / alone", *copied]]
    return table(["", *columns], rows)


def reliability(name: str) -> str:
    """``reliability.json``: how damaged files ended."""
    return table(*outcomes(load(name)))


def reliability_kills(_name: str) -> str:
    """``reliability.json``: what kills left of each command's output."""
    return table(*kills(load("reliability")))


def reliability_disk(_name: str) -> str:
    """``reliability.json``: each command on full and read-only disks, and beside a second one."""
    return table(*disks(load("reliability")))


TABLES: dict[str, Callable[[str], str]] = {
    "reliability": reliability,
    "reliability-hostile": lambda _name: table(*run_tables.hostile(load("reliability"))),
    "reliability-long": lambda _name: table(*run_tables.long_runs(load("reliability"))),
    "reliability-threads": lambda _name: table(*run_tables.threads(load("reliability"))),
    "reliability-kills": reliability_kills,
    "reliability-disk": reliability_disk,
    "heads": heads,
    "heads-deit": heads,
    "heads-cost": heads_cost,
    "upsamplers": upsamplers,
    "tiling": tiling,
    "stream": stream,
    "extraction": extraction,
    "serving": serving,
    "hand-over": hand_over,
    "present-recipe": present_recipe,
    "sinder-direction": sinder_direction,
    "students": quality,
    "present-students": lambda _name: quality("present_students"),
    "present-students-deit": lambda _name: quality("present_students_deit"),
    "students-deit": quality,
    "headline": headline,
    "headline-deit": headline,
    "speed": speed,
    "speed-short": speed,
    "demo": demo,
    "int8-without-vnni": no_vnni,
    "int8-choices": choices,
    "gates": gates,
    "gpu-images": gpu_images,
}


def render(page: str) -> str:
    """The page, with every table replaced by that of its JSON."""
    return MARK.sub(lambda m: f"{m[1]}{TABLES[m['name']](m['name'].replace('-', '_'))}\n{m[3]}", page)


def main() -> None:
    for path in PAGES:
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
