"""Tables of what heads add and cost, of finer maps, and of windows over big images."""

from __future__ import annotations

from benchmarks.tables.cells import Row, interval, load, percent, table


def heads(name: str) -> str:
    """``heads.json``: label maps of base, student and INT8 student on CamVid."""
    models = load(name)["models"]

    def line(title: str, place: str, figure: str) -> list[str]:
        cells = [title]
        for label, maps in models.items():
            value, low, high = maps[place][figure]
            gain = "" if label == "base" else f"; {interval(maps[place][figure + '_gain'][1:])}"
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
