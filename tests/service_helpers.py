"""What the tests of ``serve`` share: the service in a process of its own, and images to send."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from tests.cli_helpers import ROOT

httpx = pytest.importorskip("httpx")

TOKEN = "a-token-for-the-tests-of-serve"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*words, port, token=None):
    """Start ``serve`` on a port."""
    options = ("--backend", "onnxruntime-cpu", "--threads", 1, "--json")
    command = [sys.executable, "-m", "phreg_deploy", "serve", *words, "--port", port, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | (
        {"PHREG_SERVE_TOKEN": token} if token else {}
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], env=environment, **pipes)


def await_ready(process, client, port):
    for _ in range(400):
        assert process.poll() is None, process.stderr.read()
        try:
            if client.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail("the service did not start")


def await_line(process, text, seconds=120):
    """Read stderr until a line has this text; end the process if none has in time."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        assert any(text in line for line in process.stderr), f"no line with {text!r} within {seconds} s"
    finally:
        timer.cancel()


@contextmanager
def running(*words, token=None):
    """Start ``serve`` on a free port; yield a client that sends the token, and the process."""
    port = free_port()
    process = start(*words, port=port, token=token)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=30) as client:
        try:
            await_ready(process, client, port)
            yield client, process
        finally:
            process.kill()
            process.communicate()


def stopped(process, number):
    """Send a signal, wait for the end, and return the exit code, the JSON report and stderr."""
    process.send_signal(number)
    out, err = process.communicate(timeout=40)
    return process.returncode, json.loads(out.splitlines()[-1]), err


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def figures(client):
    """The values of ``/metrics`` by name with labels."""
    text = client.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\S+) ([\d.e+-]+)$", text, re.M)}
