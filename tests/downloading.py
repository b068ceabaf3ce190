"""The command line of the scripts that download what tests need."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path


def download_all(description: str, folder: Path, names: Iterable[str], fetch: Callable[[Path, str], str]) -> None:
    """Fetch every one of ``names`` into the folder that the command names, else ``folder``, and print the outcomes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", nargs="?", type=Path, default=folder)
    chosen = parser.parse_args().folder
    for name in names:
        print(fetch(chosen, name), flush=True)  # noqa: T201
