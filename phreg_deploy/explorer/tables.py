"""The sections of the page that are text: verdict, gates, parity, artifact rates, sensitivities, latency, environment.

They are read without scripts.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from phreg_deploy.explorer.exploration import Exploration, Explored

Row = Sequence[str]
# Layers and images that a table shows at once; the rest is folded.
SHOWN = 12


def verdict(exploration: Exploration) -> str:
    missed = exploration.missed
    if missed:
        items = "".join(f"<li>{html.escape(gate)}</li>" for gate in missed)
        count = f"{len(missed)} gate{'s' * (len(missed) > 1)} missed"
        return f'<p class="verdict bad"><strong>✗ {count}</strong></p><ul class="bad">{items}</ul>'
    notes = [
        f"{b.name} missed when it was calibrated: {'; '.join(b.check.missed_when_calibrated)}."
        for b in exploration.bundles
        if b.check.missed_when_calibrated
    ]
    rest = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f'<p class="verdict good"><strong>✓ All gates passed</strong></p>{rest}'


def gates(exploration: Exploration) -> str:
    """Every gate with its figure and bar; missed ones first."""
    rows = [
        (not gate.passed, [b.name, reference, gate.name, str(gate), _passed(gate.passed)])
        for b in exploration.bundles
        for reference, of_reference in b.check.gates.items()
        for gate in of_reference
    ]
    rows.sort(key=lambda row: not row[0])
    columns = ["bundle", "compared with", "figure", "measured and bar", "verdict"]
    text = table("", columns, [row for _, row in rows], ["bad" if missed else "" for missed, _ in rows])
    return f'<details open class="gates"><summary>Gates ({len(rows)})</summary>{text}</details>'


def parity(exploration: Exploration) -> str:
    columns = [
        "bundle",
        "compared with",
        "size",
        "cosine mean",
        "1st pct",
        "min",
        "relative L2",
        "neighbours",
        "points",
    ]
    rows = []
    for b in exploration.bundles:
        for c in b.check.comparisons:
            p = c.parity
            figures = (p.cosine_mean, p.cosine_p1, p.cosine_min, p.relative_l2, p.neighbours, p.outlier_points)
            rows.append([b.name, c.reference, c.size, *map(_number, figures)])
    return table("Parity; points: change of the norm-outlier rate, percentage points", columns, rows)


def images(exploration: Exploration) -> str:
    """Parity by image, the worst first; a name is a button where the image is shown."""
    parts = []
    shown = {} if exploration.maps is None else {name: i for i, name in enumerate(exploration.maps.names)}
    for b in exploration.bundles:
        if b.check.by_image is not None:
            rows = [
                [row.image, _number(row.cosine_mean), _number(row.cosine_p1), _number(row.cosine_min)]
                for row in b.check.by_image.images
            ]
            name = f"{b.name} and {b.check.by_image.reference}, by image, the worst first"
            buttons = [shown.get(row[0]) for row in rows]
            parts.append(_folded(name, ["image", "cosine mean", "1st pct", "min"], rows, buttons))
    return "".join(parts)


def artifacts(exploration: Exploration) -> str:
    columns = ["", "norm-outlier rate", "largest / median", "shift incoherence", "note"]
    rows: dict[str, Row] = {}
    for b in exploration.bundles:
        for name, rates in b.check.artifacts.items():
            label = b.name if name == "bundle" else name
            outliers = rates.norm_outliers
            rows[label] = [
                label, _percent(outliers.rate), _number(outliers.largest), _percent(rates.incoherent), rates.note,
            ]  # fmt: skip
            for layer, of_layer in rates.layers.items():
                own = f"{label}, layer {layer}"
                rows[own] = [own, _percent(of_layer.rate), _number(of_layer.largest), "-", rates.note]
    if not rows:
        return "<p>No photographs were given, so the artifact rates are not known: add --images photos/.</p>"
    return table(f"Artifacts on {exploration.bundles[0].check.images} images", columns, list(rows.values()))


def sensitivity(bundle: Explored) -> str:
    """The layers of an 8-bit bundle, the most sensitive first."""
    layers = sorted(bundle.layers, key=lambda layer: -layer["mean"])
    rows = [
        [x["name"], f"{x['mean']:.2e}", f"{x['p1']:.2e}", _percent(x["macs"]), x["precision"], x["reason"]]
        for x in layers
    ]
    columns = ["layer", "mean gain", "1st pct gain", "share of work", "precision", "reason"]
    return _folded(f"{bundle.name}: what each layer alone gains in float", columns, rows, [])


def latency(exploration: Exploration) -> str:
    columns = ["bundle", "backend", "batch", "size", "part", "p50 ms", "p90 ms", "p99 ms", "images / s"]
    rows = []
    for b in exploration.bundles:
        for result in b.latency.results if b.latency else ():
            for part in ("graph", "extractor", "preprocess"):
                of = getattr(result, part)
                speed = f"{result.images_per_second:.1f}" if part == "extractor" else "-"
                size = f"{result.size[0]}x{result.size[1]}"
                times = [f"{x:.2f}" for x in (of.p50, of.p90, of.p99)]
                rows.append([b.name, b.check.backend, str(result.batch), size, part, *times, speed])
    if not rows:
        return ""
    unsteady = any(
        not getattr(result, part).stable
        for b in exploration.bundles
        for result in (b.latency.results if b.latency else ())
        for part in ("graph", "extractor")
    )
    note = "<p>The machine's speed changed while it was measured; measure again.</p>" if unsteady else ""
    return (
        "<section aria-labelledby=latency><h2 id=latency>Latency</h2>" + table("", columns, rows) + note + "</section>"
    )


def environment(exploration: Exploration) -> str:
    rows = [[name, value] for name, value in exploration.environment.items()]
    parts = [table("This machine", ["", ""], rows)]
    digests = []
    for b in exploration.bundles:
        facts = {"folder": b.check.bundle, "backend": f"{b.check.backend}, {b.check.precision}, {b.check.choice}"}
        facts |= {f"source: {k}": str(v) for k, v in b.manifest.source.items() if v is not None}
        facts |= {f"written with {k}": str(v) for k, v in b.manifest.versions.items()}
        facts |= {f"sha256 of {k}": v for k, v in b.manifest.files.items()}
        digests += [[b.name, k, v] for k, v in facts.items()]
    parts.append(table("Bundles", ["bundle", "fact", "value"], digests))
    if exploration.maps is not None:
        maps = exploration.maps
        rows = [["all measured images", maps.digest], *([n, d] for n, d in zip(maps.names, maps.digests))]
        parts.append(_folded("sha256 of the images", ["image", "sha256"], rows, [], open_=False))
    return "".join(parts)


def commands(exploration: Exploration) -> str:
    return f"<pre tabindex=0><code>{html.escape(chr(10).join(exploration.commands))}</code></pre>"


def table(caption: str, columns: Row, rows: Sequence[Row], classes: Sequence[str] = ()) -> str:
    """A table whose first cells are the headings of its rows."""
    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in columns)
    body = ""
    for i, (first, *rest) in enumerate(rows):
        kind = f' class="{classes[i]}"' if classes and classes[i] else ""
        cells = "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in rest)
        body += f"<tr{kind}><th scope=row>{html.escape(first)}</th>{cells}</tr>"
    heads = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    name = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="wide" tabindex=0><table>{name}{heads}<tbody>{body}</tbody></table></div>'


def _folded(name: str, columns: Row, rows: Sequence[Row], buttons: Sequence[int | None], open_: bool = True) -> str:
    """A table in a fold, open if it is short. ``buttons``: the shown image that each row's heading chooses."""
    text = table("", columns, rows)
    for row, index in zip(rows, buttons):
        if index is not None:
            heading = f"<th scope=row>{html.escape(row[0])}</th>"
            button = f'<th scope=row><button type=button data-image="{index}">{html.escape(row[0])}</button></th>'
            text = text.replace(heading, button, 1)
    mark = " open" if open_ and len(rows) <= SHOWN else ""
    return f"<details{mark}><summary>{html.escape(name)} ({len(rows)})</summary>{text}</details>"


def _kind(cell: str) -> str:
    """The class of numbers, which are not broken at a minus sign."""
    return " class=number" if cell[:1].isdigit() and len(cell) < SHOWN else ""


def _passed(passed: bool) -> str:
    return "✓ passed" if passed else "✗ missed"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.8f}" if 0.9 < abs(value) < 1 else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3f} %"
