r"""Measure ``serve`` against bare calls, in turns, and count requests over hand-overs from one service to the next.

    python -m benchmarks.serving --image PHOTO --bundle NAME=PATH --bundle NAME=PATH --json OUT [--requests 60]

Each service runs in a process of its own, with one thread per inference like the bare calls. ``run`` is the graph on an
array; ``call`` decodes and resizes the same bytes before it; ``served`` is an answer of ``/features`` as npy. Clients
are threads; a round takes every kind and every number of clients in turn, and figures are over all rounds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.profiling.latency import processor
from phreg_deploy.runtime import FeatureExtractor

CLIENTS, ROUNDS = (1, 4, 16), 3
HANDOVERS, EACH = 3, 60
HEADERS = {"Content-Type": "application/octet-stream"}


class Server:
    """A process of ``serve`` on a port; ``stop`` returns its report."""

    def __init__(self, bundle: str, port: int) -> None:
        words = [
            "serve",
            bundle,
            "--port",
            port,
            "--backend",
            "onnxruntime-cpu",
            "--threads",
            1,
            "--reuse-port",
            "--json",
        ]
        command = [sys.executable, "-m", "phreg_deploy", *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        while "Serving" not in (line := self.process.stderr.readline()):
            assert line, "the service did not start"

    def stop(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, self.process.returncode
        return dict(json.loads(out.splitlines()[-1]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def timed(make: Callable[[], Callable[[], object]], clients: int, requests: int) -> tuple[list[float], float]:
    """Seconds of each of ``requests`` calls by so many clients, and of all; ``make`` makes a client's call."""
    seconds: list[float] = []
    left = iter(range(requests))

    def client() -> None:
        call = make()
        for _ in left:
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds, time.perf_counter() - started


def asking(port: int, data: bytes) -> Callable[[], Callable[[], object]]:
    """Make clients that keep a connection and expect an answer with 200."""

    def make() -> Callable[[], object]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

        def call() -> object:
            connection.request("POST", "/features", data, HEADERS)
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, body
            return body

        return call

    return make


def compare(bundle: str, data: bytes, requests: int) -> dict[str, Any]:
    """Latency and throughput of the three kinds, by clients."""
    port = free_port()
    server = Server(bundle, port)
    with FeatureExtractor.load(bundle.partition("=")[2], "onnxruntime-cpu", threads=1) as extractor:
        image = extractor.prepare(data)[None]
        kinds: dict[str, Callable[[], Callable[[], object]]] = {
            "run": lambda: lambda: extractor.run(image),
            "call": lambda: lambda: extractor(data),
            "served": asking(port, data),
        }
        taken: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        for make in kinds.values():
            timed(make, 4, 8)
        for _ in range(ROUNDS):
            for clients in CLIENTS:
                for kind, make in kinds.items():
                    seconds, whole = timed(make, clients, requests)
                    single, wholes = taken.setdefault((kind, clients), ([], []))
                    single += seconds
                    wholes.append(whole)
        shape = list(extractor.manifest.outputs["features"]["shape"])
    report = server.stop()
    assert report["answers"]["200"] == report["accepted"]
    rows = [
        {
            "kind": kind,
            "clients": clients,
            "p50_ms": 1e3 * float(np.quantile(single, 0.5)),
            "p99_ms": 1e3 * float(np.quantile(single, 0.99)),
            "per_second": ROUNDS * requests / sum(wholes),
        }
        for (kind, clients), (single, wholes) in taken.items()
    ]
    return {"requests": ROUNDS * requests, "features": shape, "rows": rows}


def hand_over(bundle: str, data: bytes) -> dict[str, Any]:
    """Replace the service again and again under 16 clients, who repeat what was not accepted; count everything."""
    port, seen, lock = free_port(), Counter[str](), threading.Lock()
    servers = [Server(bundle, port)]

    def client() -> None:
        for _ in range(EACH):
            status = ""
            while status != "200":
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.request("POST", "/artifacts", data, HEADERS)
                    response = connection.getresponse()
                    response.read()
                    status = str(response.status)
                except (OSError, http.client.HTTPException) as error:
                    status = type(error).__name__
                finally:
                    connection.close()
                with lock:
                    seen[status] += 1
                if status != "200":
                    time.sleep(0.02)

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    reports = []
    for number in range(1, HANDOVERS + 1):
        while seen["200"] < number * 16 * EACH / (HANDOVERS + 1):
            time.sleep(0.01)
        servers.append(Server(bundle, port))
        reports.append(servers[-2].stop())
    for thread in threads:
        thread.join()
    reports.append(servers[-1].stop())
    return {
        "requests": 16 * EACH,
        "clients_saw": dict(seen),
        "services": [{key: report[key] for key in ("accepted", "answers", "unfinished")} for report in reports],
        "accepted": sum(report["accepted"] for report in reports),
        "answered": sum(report["answers"].get("200", 0) for report in reports),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--bundle", action="append", required=True, help="NAME=PATH; the first one is handed over too")
    parser.add_argument("--requests", type=int, default=60, help="in each round")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    data = given.image.read_bytes()
    models = {bundle.partition("=")[0]: compare(bundle, data, given.requests) for bundle in given.bundle}
    conditions = {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    report = {**conditions, "models": models, "hand_over": hand_over(given.bundle[0], data)}
    given.json.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
