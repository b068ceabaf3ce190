"""``extract --ray`` on a local cluster of two actors, one of which is killed."""

import logging
import os
import signal
import threading
import time

import pytest

from tests.cli_helpers import photograph
from tests.extraction_helpers import extract, files_of, index_of, journaled, journals


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(60):
        photograph(i % 6, 80, 70 + i).save(folder / f"p{i:02d}.png")
    return folder


def holder(lock):
    """The process that holds a lock, by the kernel's list; None if nobody does."""
    inode = f":{lock.stat().st_ino}"
    with open("/proc/locks") as locks:
        words = [line.split() for line in locks]
    return next((int(line[4]) for line in words if line[1] == "FLOCK" and line[5].endswith(inode)), None)


def kill_one(out, killed):
    """Kill the first actor that has journaled an image of a shard which it still writes."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not killed:
        for journal in journals(out):
            text = journal.read_text()
            if '"files"' in text and '"complete"' not in text and (pid := holder(journal.with_suffix(".lock"))):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break
        time.sleep(0.001)


@pytest.mark.fresh_process
@pytest.mark.filterwarnings("default")
def test_a_killed_actor_loses_nothing_and_repeats_nothing(bundle, images, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    # Four shards of about fifteen images, so that the kill finds one in the middle.
    monkeypatch.setattr("phreg_deploy.extraction.ray_data.SHARDS_EACH", 2)
    assert extract(bundle, images, tmp_path / "plain").code == 0
    out, killed = tmp_path / "out", []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        killer = threading.Thread(target=kill_one, args=(out, killed))
        killer.start()
        done = extract(bundle, images, out, "--ray", "2")
        killer.join()
        assert done.code == 0, done.err
        printing = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
        assert printing, "Ray Data has no handler that prints; look for another way to keep it quiet"
        assert all(handler.level >= logging.ERROR for handler in printing)
        assert len(killed) == 1, "no actor was killed in the middle of a shard"
        assert (done.document["images"], done.document["joined"]) == (60, True)
        assert done.document["kept"] > 0, "what the killed actor finished was kept"
        assert done.document["kept"] + done.document["extracted"] == 60
        assert files_of(out) == files_of(tmp_path / "plain")
        assert index_of(out).keys() >= index_of(tmp_path / "plain").keys()
        assert sorted(journaled(out)) == sorted(entry["name"] for entry in index_of(out)["images"])
        extract(bundle, images, out, "--ray", "2").refused(2, "was begun before", "--resume")
        again = extract(bundle, images, out, "--ray", "1", "--resume").document
        assert (again["kept"], again["extracted"], again["shards"]) == (60, 0, 4)
    finally:
        ray.shutdown()


def test_options_that_exclude_each_other(bundle, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    extract(bundle, images, out, "--ray", "2", "--shard", "1/2").refused(2, "got --ray and --shard")
    extract(bundle, images, out, "--ray", "2", "--force").refused(2, "got --ray and --force")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    extract(bundle, images, out, "--ray", "2").refused(4, 'pip install "phreg-deploy[ray]"')
    assert not out.exists()
