"""Tables of speed and parity in FP32 and 8 bits, of gates, and of frames that a GPU resizes."""

from __future__ import annotations

from benchmarks.tables.cells import Row, four, load, table

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
