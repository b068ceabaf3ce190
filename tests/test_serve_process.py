"""The process of ``serve``: a hand-over to the next one, its options, and its address."""

import concurrent.futures
import signal
import socket
import time

import pytest

from phreg_deploy.errors import PhregError
from tests.cli_helpers import run_python
from tests.service_helpers import await_line, await_ready, free_port, httpx, start, stopped

for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "onnxruntime"):
    pytest.importorskip(module)


def test_nothing_is_lost_while_one_service_hands_over_to_another(demo_bundle, demo_scenes):
    """Eight clients repeat what is refused with 503 or not taken at all; the first service stops in the middle."""
    port, body = free_port(), (demo_scenes / "images" / "0004.png").read_bytes()
    first = start(demo_bundle, "--reuse-port", port=port)
    processes = [first]
    done, seen, end = [], [], time.monotonic() + 300

    def ask(number):
        with httpx.Client(trust_env=False, timeout=30) as client:
            for _ in range(25):
                while True:
                    assert time.monotonic() < end, f"no answer; the last were {seen[-9:]}"
                    try:
                        response = client.post(f"http://127.0.0.1:{port}/artifacts", content=body)
                    except httpx.TransportError as error:
                        seen.append(type(error).__name__)
                        time.sleep(0.05)
                        continue
                    seen.append(response.status_code)
                    if response.status_code == 200:
                        break
                    assert (response.status_code, response.headers["retry-after"]) == (503, "1"), response.text
                    time.sleep(0.05)
                done.append(number)

    try:
        with httpx.Client(trust_env=False, timeout=30) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
            await_ready(first, client, port)
            work = [pool.submit(ask, number) for number in range(8)]
            while len(done) < 20:
                assert time.monotonic() < end, f"{len(done)} answers; the last were {seen[-9:]}"
                time.sleep(0.01)
            second = start(demo_bundle, "--reuse-port", port=port)
            processes.append(second)
            await_line(second, "Serving")
            code, report, err = stopped(first, signal.SIGTERM)
            for part in work:
                part.result(60)
        code_2, report_2, err_2 = stopped(second, signal.SIGINT)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert (code, code_2, len(done)) == (0, 0, 200), err + err_2
    assert (report["unfinished"], report_2["unfinished"]) == (0, 0)
    served = report["answers"]["200"], report_2["answers"]["200"]
    assert min(served) > 0
    # What a service accepted it answered, and each answer came once.
    assert sum(served) == report["accepted"] + report_2["accepted"] == seen.count(200) == 200


BAD = [
    (["{tmp}"], {}, "holds no manifest.json"),
    (["{bundle}", "{bundle}"], {}, "two bundles named"),
    (["a b={bundle}"], {}, "expected letters, digits"),
    (["{bundle}", "--host", "0.0.0.0"], {}, "no token"),
    (["{bundle}", "--host", "192.0.2.1", "--open"], {}, "cannot be listened on"),
    (["{bundle}", "--host", 64 * "a", "--open"], {}, "cannot be listened on"),
    (["{bundle}"], {"PHREG_SERVE_TOKEN": "short"}, "holds 5 characters, expected at least 16"),
    (["{bundle}", "--token-file", "{tmp}/none"], {}, "cannot be read"),
    (["{bundle}", "--max-mib", "5000"], {}, "got 5000.0 for mib"),
    (["{bundle}", "--max-wait", "nan"], {}, "nan"),
]


@pytest.mark.parametrize(("words", "variables", "message"), BAD)
def test_bad_options_are_refused_before_anything_is_served(
    run_cli, monkeypatch, tmp_path, bundle, words, variables, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = run_cli("serve", *(word.format(tmp=tmp_path, bundle=bundle) for word in words), "--port", "0", "--json")
    assert outcome.code == 2
    assert message in outcome.err


def test_a_taken_port_and_missing_modules_are_named(run_cli, bundle):
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        run_cli("serve", bundle, "--port", port, "--json").refused(2, f"127.0.0.1:{port} cannot be listened on")
    said = run_python(BLOCKED)
    assert said.startswith("4 ")
    assert "phreg-deploy[serve]" in said


def test_a_port_is_shared_only_where_the_system_can(monkeypatch):
    from phreg_deploy.serving.server import Address

    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(PhregError, match="got --reuse-port, which this system does not have"):
        Address(port=0, reuse_port=True).bind()


def test_the_address_is_shown_when_it_can_be_reached(bundle):
    from phreg_deploy.serving.server import Address, serve

    class Reached(Exception):
        pass

    def show(url, _extractors):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5):
            raise Reached

    with pytest.raises(Reached):
        serve({"it": bundle}, backend="onnxruntime-cpu", address=Address(port=0), show=show)


BLOCKED = """
import sys
sys.modules["uvicorn"] = None
from tests.cli_helpers import invoke
outcome = invoke("serve", "x")
print(outcome.code, outcome.err)
"""
