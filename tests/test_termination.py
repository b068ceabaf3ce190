"""SIGTERM ends a command as Ctrl-C does, and leaves nothing."""

import os
import signal
import subprocess
import sys

import pytest

from tests.cli_helpers import ROOT

# Stops where the first features are to be saved. {ignore}: a shell starts background processes with SIGINT ignored.
WAITING = """
import signal, sys, time
import numpy as np
{ignore}
def save(*_arguments, **_options):
    print("at work", flush=True)
    time.sleep(120)
np.save = save
from phreg_deploy.__main__ import main
main()
"""
IGNORE = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def stopped(world, ignore="", environment=None):
    """Start ``extract``, send SIGTERM while it works; return its exit code and stderr."""
    command = [sys.executable, "-c", WAITING.format(ignore=ignore), "extract", world.bundle, world.photos]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    process = subprocess.Popen(
        [*command, "-o", world.out], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert "at work\n" in process.stdout
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, error


@pytest.mark.parametrize("ignore", ["", IGNORE])
def test_sigterm_ends_a_command_and_leaves_nothing(world, ignore):
    code, error = stopped(world, ignore)
    assert code == 143, error
    assert "Error: Interrupted. Nothing new was kept." in error
    assert "Traceback" not in error
    assert list(world.tmp.iterdir()) == []


def test_a_process_of_torchrun_ends_at_once(world):
    code, _ = stopped(world, environment=TORCHRUN)
    assert code == -signal.SIGTERM
