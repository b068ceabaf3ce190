"""Tables of extraction with two workers, of streams and of ``serve``."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.tables.cells import Row, load, table

# Figures of a round.
KEYS = ("rate", "seconds")


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
