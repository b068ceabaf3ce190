"""Send bombs and malformed requests to a service, and look at its answers, its memory and its log."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability.hostile import files
from benchmarks.reliability.hostile.images import BOMBS
from benchmarks.reliability.subjects import Subjects
from tests.service_helpers import encoded, httpx, running

# Bombs that are below the service's limit of 20 MiB.
SENT = [name for name in BOMBS if "65,535" in name or "PPM" not in name]


def judge_uploads(subjects: Subjects) -> tuple[Counter[str], float, list[dict[str, Any]]]:
    """The outcomes, the largest resident MiB of the service, and the bad ones.

    "refused": a status from 400 to 499; "harmless": 200. After each request a good image must be served.
    """
    from tests.cli_helpers import photograph

    good, counts, bad = encoded(photograph(0, 80, 70)), Counter[str](), []
    with running(subjects.bundle) as (client, process):
        for name, request in _requests(Path(subjects.folder) / "it-ran").items():
            started = time.monotonic()
            try:
                status = client.post("/features", timeout=60, **request).status_code
                outcome = "refused" if 400 <= status < 500 else "harmless" if status == 200 else f"status {status}"
            except httpx.TransportError as error:
                # The server answers and hangs up before it has read all of these; a client that still sends may
                # see the end of the connection alone.
                outcome = "refused" if "headers" in name else type(error).__name__
            if client.post("/features", content=good).status_code != 200:
                outcome = "crash"
            counts[outcome] += 1
            if outcome not in ("refused", "harmless") or time.monotonic() - started > 60:
                bad.append({"case": f"upload, {name}", "outcome": outcome})
        memory = _largest(process.pid)
        process.terminate()
        log = process.stderr.read()
    if "Traceback" in log:
        counts["traceback"] += 1
        bad.append({"case": "the service's log", "outcome": "traceback", "said": log[-1500:]})
    return counts, memory, bad


def _requests(marker: Path) -> dict[str, dict[str, Any]]:
    requests: dict[str, dict[str, Any]] = {name: {"content": BOMBS[name](marker)} for name in SENT}
    part = b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    requests["form of 50,000 fields"] = {"content": b"".join(part % i for i in range(50_000)), "headers": form}
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\nX: '
    requests["part with a header of 15 MB"] = {"content": head + b"a" * (15 << 20), "headers": form}
    lines = b"".join(b"X%d: 1\r\n" % i for i in range(50_000))
    requests["part with 50,000 headers"] = {"content": head + b"1\r\n" + lines + b"\r\n1\r\n--x--", "headers": form}
    requests["form without a boundary"] = {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}
    requests["20,000 headers of HTTP"] = {"content": b"", "headers": {f"X-{i}": "1" for i in range(20_000)}}
    requests["a header of 10 MB of HTTP headers"] = {"content": b"", "headers": {"X-A": "a" * (10 << 20)}}
    requests["100 MB"] = {"content": bytes(100 << 20)}
    requests["nothing"] = {"content": b""}
    requests["outputs that lead out"] = {"content": b"", "params": {"outputs": "../../etc/passwd"}}
    requests["size of 10^18"] = {"content": files.encoded("PNG"), "params": {"size": "1000000000000000000"}}
    requests["name of a bundle that leads out"] = {"content": b"", "params": {"model": "../../x"}}
    return requests


def _largest(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0
