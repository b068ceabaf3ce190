"""Clients of ``serve`` that hang up, or do not read their answer, on sockets of their own."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from tests.service_helpers import encoded, figures, httpx, running

for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "onnxruntime"):
    pytest.importorskip(module)

WAIT, SECONDS = 1.5, 20


@pytest.fixture(scope="module")
def service(wide_bundle):
    """A service that lets an image wait for others, and closes at most ``SECONDS`` after a request came."""
    words = (f"wide={wide_bundle}", "--max-batch", 4, "--max-wait", 1e3 * WAIT, "--timeout", SECONDS)
    with running(*words) as (client, process):
        yield client, process


def post(client, path, body, sent=None):
    """Send ``sent`` bytes of a request, by default all, and return the socket."""
    address = client.base_url
    connection = socket.socket()
    # A small window: the kernel holds little of an answer that is not read.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    connection.settimeout(30)
    connection.connect((address.host, address.port))
    head = f"POST {path} HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[:sent])
    return connection


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def count(client, name):
    return figures(client).get(name, 0)


HUNG_UP = 'phreg_requests_total{route="/artifacts",status="499"}'
WAITING = 'phreg_waiting_images{model="wide"}'
RUN = 'phreg_batch_images_sum{model="wide"}'


def test_an_image_whose_client_hung_up_is_never_run(service):
    client, _ = service
    before, ran = count(client, HUNG_UP), count(client, RUN)
    image = encoded(Image.new("RGB", (64, 64)))
    with post(client, "/artifacts", image) as stays, post(client, "/artifacts", image) as leaves:
        until(lambda: count(client, WAITING) == 2)
        leaves.close()
        until(lambda: count(client, HUNG_UP) == before + 1, WAIT)
        answer = stays.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"x-phreg-batch: 1\r\n" in answer
    assert count(client, RUN) == ran + 1


def test_a_client_that_hangs_up_within_its_body_is_no_failure_of_the_service(service):
    client, _ = service
    before, image = count(client, HUNG_UP), encoded(Image.new("RGB", (64, 64)))
    post(client, "/artifacts", image, sent=20).close()
    until(lambda: count(client, HUNG_UP) == before + 1)
    assert count(client, 'phreg_requests_total{route="/artifacts",status="500"}') == 0


def test_a_client_that_does_not_read_is_disconnected_in_time(service):
    """The answer is larger than what the kernel holds for both sides; the service must not keep the rest for ever."""
    client, _ = service
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), np.uint8)
    image = encoded(Image.fromarray(noise), "JPEG", quality=90)
    whole = client.post("/overlay", content=image)
    assert whole.status_code == 200, whole.text
    with post(client, "/overlay", image) as connection:
        until(lambda: count(client, "phreg_active_requests") == 1)
        until(lambda: count(client, "phreg_active_requests") == 0, 2 * SECONDS)
        pieces = list(iter(lambda: connection.recv(1 << 20), b""))
    assert pieces[0].startswith(b"HTTP/1.1 200")
    kept = sum(map(len, pieces)) / len(whole.content)
    assert kept < 0.9, "the whole answer was kept for a client that did not read"


def pieces(path):
    with path.open("rb") as file:
        yield from iter(lambda: file.read(1 << 20), b"")


def send_by_http_client(url, path, chunked, _more):
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/artifacts", pieces(path) if chunked else path.read_bytes())
        return connection.getresponse().status


def send_by_httpx(url, path, chunked, _more):
    body = pieces(path) if chunked else path.read_bytes()
    return httpx.post(url.join("/artifacts"), content=body, timeout=60, trust_env=False).status_code


def send_by_requests(url, path, chunked, _more):
    body = pieces(path) if chunked else path.read_bytes()
    return pytest.importorskip("requests").post(str(url.join("/artifacts")), data=body, timeout=60).status_code


def send_by_curl(url, path, chunked, more):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    how = ["-sS", "-m", "60", "-o", os.devnull, "-w", "%{http_code}", "--data-binary", f"@{path}", *more]
    how += ["-H", "Transfer-Encoding: chunked"] if chunked else []
    command = ["curl", *how, str(url.join("/artifacts"))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("send", "more"),
    [
        (send_by_http_client, ()),
        (send_by_httpx, ()),
        (send_by_requests, ()),
        (send_by_curl, ()),
        (send_by_curl, ("-H", "Expect:")),
    ],
)
def test_a_client_that_sends_far_too_much_reads_why(service, tmp_path, send, more, chunked):
    """100 MB, where 20 MiB are allowed. Most clients read no answer before they have sent all of it."""
    (tmp_path / "body").write_bytes(bytes(100 << 20))
    assert send(service[0].base_url, tmp_path / "body", chunked, more) == 413


def test_a_body_without_end_is_refused_in_time(service):
    from phreg_deploy.serving.exchange import PATIENCE

    client, _ = service
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(b"POST /artifacts HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n")
        connection.settimeout(2 * PATIENCE)
        started = time.monotonic()
        answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 413")
        assert time.monotonic() - started < PATIENCE + 3
        connection.settimeout(5)
        # The answer may come in pieces. If the service does not close the connection, this runs into the timeout.
        answer += b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.endswith(b"}"), "the service sends its whole answer, and closes the connection"


def test_an_idle_connection_is_used_again(service):
    """uvicorn closes it after 5 seconds by default, just when a proxy may send the next request."""
    client, _ = service
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
    connection.connect()
    first = connection.sock
    for pause in (0, 6):
        time.sleep(pause)
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"live"}')
    assert connection.sock is first, "the service closed the connection"
    connection.close()


def test_nothing_that_clients_did_is_a_traceback_in_the_log(service):
    _, process = service
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert "Traceback" not in log
    assert process.returncode == 0
