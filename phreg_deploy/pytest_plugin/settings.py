"""Read the plugin's settings: an argument of the call, else the command line, else the ini file."""

from __future__ import annotations

from pathlib import Path

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.hub.names import is_hub_name
from phreg_deploy.pytest_plugin.options import OPTIONS, SETTINGS

PathLike = Path | str


class Settings:
    """The settings of one run of pytest. Every method takes a key of ``SETTINGS`` and what the call gave, or None.

    A path of the ini file is relative to the root of the tests (pytest's rootdir); one of the command line is relative
    to the folder that pytest was started in.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def text(self, name: str, given: str | None = None) -> str | None:
        """Return a text; None if it is nowhere."""
        if given is not None:
            return given
        option = self.config.getoption(f"phreg_{name}") if name in OPTIONS else None
        value = option if option is not None else self._ini(name)
        return None if value is None else str(value)

    def path(self, name: str, given: PathLike | None = None) -> Path | None:
        """Return a path; None if it is nowhere."""
        if given is not None:
            return Path(given)
        option = self.config.getoption(f"phreg_{name}") if name in OPTIONS else None
        value = self._ini(name) if option is None else option
        if value is None:
            return None
        folder = self.config.rootpath if option is None else self.config.invocation_params.dir
        return Path(str(value)) if is_hub_name(str(value)) else folder / str(value)

    def needed_path(self, name: str, given: PathLike | None, what: str) -> Path:
        """Return a path. Raises ``PhregError`` if it is nowhere, and says where it can be given."""
        path = self.path(name, given)
        if path is None:
            raise PhregError(f"no {name}: give {what} to the call, by --phreg-{name}, or as phreg_{name} in the ini.")
        return path

    def number(self, name: str, given: float | None = None, most: float | None = None) -> float | None:
        """Return a number above 0, or 0, and at most ``most``; None if it is nowhere.

        Raises:
            PhregError: something else.
        """
        value = given if given is not None else self._ini(name)
        if value is None:
            return None
        try:
            number = float(str(value))
        except ValueError:
            number = float("nan")
        if not 0 <= number <= (float("inf") if most is None else most):
            bound = "" if most is None else f" up to {most:g}"
            raise PhregError(f"{name}: got {value!r}, expected a number from 0{bound}.")
        return number

    def count(self, name: str, given: int | None = None, default: int | None = None) -> int | None:
        """Return a whole number from 1, or the default. Raises ``PhregError`` for something else."""
        number = self.number(name, given)
        if number is None:
            return default
        if number < 1 or number != int(number):
            raise PhregError(f"{name}: got {number:g}, expected a whole number from 1.")
        return int(number)

    def _ini(self, name: str) -> object:
        try:
            value = self.config.getini(f"phreg_{name}")
        except (TypeError, ValueError, pytest.UsageError) as error:
            kind = {"float": "a number", "int": "a whole number"}.get(SETTINGS[name][0], "a text")
            raise PhregError(f"phreg_{name} in the ini: {error}; expected {kind}.") from None
        return None if value == "" else value
