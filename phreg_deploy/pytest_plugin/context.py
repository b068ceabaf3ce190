"""What the assertions of one test share: settings, open bundles, JUnit properties, and the folder for artifacts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from phreg_deploy.bundle.manifest import MANIFEST
from phreg_deploy.errors import PhregError
from phreg_deploy.pytest_plugin.settings import PathLike, Settings
from phreg_deploy.runtime.features import FeatureExtractor

P = ParamSpec("P")
# pytest's cache holds the artifacts in this folder where no other is given.
FOLDER = "phreg-deploy"
LONGEST_NAME = 120


class Extractors(AbstractContextManager["Extractors"]):
    """Open bundles, by path, time of the manifest, backend and threads."""

    def __init__(self) -> None:
        self._open: dict[tuple[Any, ...], FeatureExtractor] = {}

    def load(self, bundle: Path, backend: str, threads: int | None) -> FeatureExtractor:
        """Open a bundle, or return the one that is open; errors as of ``FeatureExtractor.load``.

        The exam is not a condition: the assertions judge it.
        """
        manifest = bundle / MANIFEST
        written = manifest.stat().st_mtime_ns if manifest.is_file() else None
        key = (bundle.absolute(), written, backend, threads)
        if key not in self._open:
            self._open[key] = FeatureExtractor.load(bundle, backend, threads=threads, examine=False)
        return self._open[key]

    def __exit__(self, *_error: object) -> None:
        while self._open:
            self._open.popitem()[1].close()


class CaseContext:
    """The context of one test.

    ``settings``: arguments, command line and ini file. ``name``: the test's node id.
    """

    def __init__(
        self, config: pytest.Config, item: pytest.Item, extractors: Extractors, temporary: pytest.TempPathFactory
    ) -> None:
        self.settings, self.config, self.name, self._temporary = Settings(config), config, item.nodeid, temporary
        self._properties, self._extractors = item.user_properties, extractors
        self._calls: dict[str, int] = {}

    def load(self, bundle: PathLike | None, backend: str | None) -> FeatureExtractor:
        """Open the bundle that the call or the settings name. Raises ``PhregError`` if there is none."""
        path = self.settings.needed_path("bundle", bundle, "the path of a bundle")
        return self.load_reference(path, backend)

    def load_reference(self, bundle: Path, backend: str | None) -> FeatureExtractor:
        """Open another bundle on the same backend."""
        name = self.settings.text("backend", backend) or "auto"
        return self._extractors.load(bundle, name, self.settings.count("threads"))

    def label(self, assertion: str, extractor: FeatureExtractor) -> str:
        """Name a call's files and properties, and record its bundle and backend.

        The name is "parity", and "parity-2" for a second call in the test.
        """
        self._calls[assertion] = self._calls.get(assertion, 0) + 1
        number = self._calls[assertion]
        label = assertion if number == 1 else f"{assertion}-{number}"
        self.record(label, {"bundle": str(extractor.bundle.folder), "backend": extractor.backend})
        return label

    def record(self, label: str, figures: Mapping[str, object]) -> None:
        """Add JUnit properties, ``phreg.LABEL.FIGURE``, as the fixture ``record_property`` does; None is left out.

        That fixture warns where JUnit files are of pytest's default family.
        """
        for name, value in figures.items():
            if value is not None:
                self._properties.append((f"phreg.{label}.{name}", value))  # type: ignore[arg-type]

    def folder(self) -> Path:
        """Return the folder for this test's artifacts, which may not be there yet."""
        root = self.settings.path("artifacts")
        if root is None:
            root = self._default_folder()
        name = re.sub(r"[^\w.\[\]=-]+", "-", self.name).strip("-")
        return Path(root) / name[-LONGEST_NAME:]

    def _default_folder(self) -> Path:
        """A folder in pytest's cache or, where that is turned off or cannot be written, in its temporary folder."""
        cache = getattr(self.config, "cache", None)
        try:
            if cache is not None:
                return Path(cache.mkdir(FOLDER))
        except OSError:
            pass
        return self._temporary.getbasetemp() / FOLDER


class Assertion:
    """A fixture that a test calls: the call's arguments, else the settings, say what is asserted."""

    def __init__(self, context: CaseContext) -> None:
        self._context = context


def refusing(call: Callable[P, None]) -> Callable[P, None]:
    """Turn a ``PhregError``, which bad input causes, into a failure of the test without traceback."""

    @wraps(call)
    def refused(*arguments: P.args, **options: P.kwargs) -> None:
        __tracebackhide__ = True
        try:
            call(*arguments, **options)
        except PhregError as error:
            message = str(error)
        else:
            return
        pytest.fail(message, pytrace=False)

    return refused
