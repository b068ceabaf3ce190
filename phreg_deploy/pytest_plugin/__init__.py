"""A plugin for pytest: ``assert_parity``, ``assert_artifact_rate``, ``assert_latency`` and ``assert_miou`` of a bundle.

pytest loads this module in every run once phreg-deploy is installed (entry point ``pytest11``), so it imports nothing
but pytest and the options. A fixture imports the rest when a test asks for it. PYTEST_DONT_REWRITE, since nothing here
is asserted by the statement.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from phreg_deploy.pytest_plugin.options import OPTIONS, SETTINGS

if TYPE_CHECKING:
    from phreg_deploy.pytest_plugin.artifact_rate import AssertArtifactRate
    from phreg_deploy.pytest_plugin.context import CaseContext, Extractors
    from phreg_deploy.pytest_plugin.latency import AssertLatency
    from phreg_deploy.pytest_plugin.miou import AssertMiou
    from phreg_deploy.pytest_plugin.parity import AssertParity


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options and ini options. pytest before 8.4 has no numbers in ini files, so they are read as text."""
    group = parser.getgroup("phreg-deploy", "phreg-deploy: tests of a bundle")
    numbers = pytest.version_tuple >= (8, 4)
    for name, (kind, text) in SETTINGS.items():
        if name in OPTIONS:
            metavar = {"backend": "NAME", "reference": "PATH", "bundle": "PATH"}.get(name, "DIR")
            group.addoption(f"--phreg-{name}", dest=f"phreg_{name}", metavar=metavar, help=text)
        written = kind if numbers else "string"
        parser.addini(f"phreg_{name}", text, type=written, default=None)  # type: ignore[arg-type]


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a path in a word of its own: pytest then looks for its ini file beside that path, not beside the tests.

    It does so for the options of every plugin, because it reads the ini file before it loads plugins.
    """
    words = [*config.invocation_params.args, *shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    for name in OPTIONS:
        if f"--phreg-{name}" in words:
            raise pytest.UsageError(f"got --phreg-{name} VALUE, expected an equals sign: --phreg-{name}=VALUE.")


@pytest.fixture(scope="session")
def phreg_extractors() -> Iterator[Extractors]:
    """The bundles that are open; each is loaded once in a session."""
    from phreg_deploy.pytest_plugin.context import Extractors

    with Extractors() as extractors:
        yield extractors


@pytest.fixture
def phreg_context(
    request: pytest.FixtureRequest, phreg_extractors: Extractors, tmp_path_factory: pytest.TempPathFactory
) -> CaseContext:
    """What the assertions of one test share."""
    from phreg_deploy.pytest_plugin.context import CaseContext

    return CaseContext(request.config, request.node, phreg_extractors, tmp_path_factory)


@pytest.fixture
def assert_parity(phreg_context: CaseContext) -> AssertParity:
    """Assert that a bundle answers as its exam says and, with ``reference``, as a student or another bundle does."""
    from phreg_deploy.pytest_plugin.parity import AssertParity

    return AssertParity(phreg_context)


@pytest.fixture
def assert_artifact_rate(phreg_context: CaseContext) -> AssertArtifactRate:
    """Assert that few patch tokens of photographs are norm outliers."""
    from phreg_deploy.pytest_plugin.artifact_rate import AssertArtifactRate

    return AssertArtifactRate(phreg_context)


@pytest.fixture
def assert_latency(phreg_context: CaseContext) -> AssertLatency:
    """Assert that a bundle is fast enough on this machine, or not slower than in an earlier report."""
    from phreg_deploy.pytest_plugin.latency import AssertLatency

    return AssertLatency(phreg_context)


@pytest.fixture
def assert_miou(phreg_context: CaseContext) -> AssertMiou:
    """Assert the mean IoU of a bundle's head on images with masks."""
    from phreg_deploy.pytest_plugin.miou import AssertMiou

    return AssertMiou(phreg_context)
