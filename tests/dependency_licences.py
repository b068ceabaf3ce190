"""List every package that the extras bring, with its licence: ``python -m tests.dependency_licences`` writes the table.

The table is in docs/licences.md. It holds what is installed here and what it held before: other systems and versions
of Python get other packages.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib import metadata
from pathlib import Path

import license_expression
from license_expression import AND, OR, ExpressionError
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
# Extras of those who work on the project; their packages are not part of what is served.
TOOLS = ("bench", "dev", "docs", "pytest", "examples")
# Licences whose packages may be used beside, and called from, code under Apache-2.0. MPL-2.0 binds its own files alone.
COMPATIBLE = {"0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT"}
COMPATIBLE |= {"MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib"}
# NVIDIA's libraries are under NVIDIA's own terms: a user installs them, and nothing here contains them.
NVIDIA = "LicenseRef-NVIDIA-Proprietary"
# Packages that are not installed here, by their own metadata; cuda-toolkit states none, and brings NVIDIA's libraries.
# sigstore-models states its licence in a file alone.
STATED = {"cuda-toolkit": NVIDIA, "tensorrt": NVIDIA, "onnxruntime-gpu": "MIT", "nncf": "Apache-2.0"}
STATED |= {"sigstore-models": "MIT"}
# What packages write in place of an SPDX expression.
SPELLINGS = {
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "osi approved :: apache software license": "Apache-2.0",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "nvidia proprietary software": NVIDIA,
    "other/proprietary license": NVIDIA,
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
}


spdx = functools.cache(license_expression.get_spdx_licensing)
requires = functools.cache(metadata.requires)


def name_of(text: str) -> str:
    """Return the normalised name of a package."""
    return re.sub(r"[-_.]+", "-", text).lower()


def extras() -> dict[str, list[Requirement]]:
    """Return the requirements of each extra of pyproject.toml; the base installation's are under ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(text) for text in texts] for extra, texts in groups.items()}


def installed_below(requirements: list[Requirement]) -> set[str]:
    """Return the installed packages that requirements bring, directly or through others."""
    found: set[tuple[str, str]] = set()
    waiting = [(req, "") for req in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (name_of(requirement.name), wanted)
            try:
                needs = requires(requirement.name)
            except metadata.PackageNotFoundError:
                break
            if key not in found:
                found.add(key)
                waiting += [(Requirement(text), wanted) for text in needs or ()]
    return {name for name, _ in found}


def licence_of(name: str) -> str:
    """Return a package's licence as an SPDX expression, or the package's own words if they are no such expression."""
    if name in STATED:
        return STATED[name]
    about = metadata.metadata(name)
    classifiers = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    for text in (about.get("License-Expression"), about.get("License"), *classifiers):
        line = (text or "").strip().splitlines()[0:1]
        stated = SPELLINGS.get(line[0].strip().lower(), line[0].strip()) if line else ""
        if stated and is_expression(stated):
            return stated
    return "; ".join(classifiers) or str(about.get("License"))[:60]


def is_expression(text: str) -> bool:
    try:
        return bool(text == NVIDIA or not spdx().unknown_license_keys(text))
    except ExpressionError:
        return False


def is_compatible(expression: str) -> bool:
    """Whether an SPDX expression allows use beside Apache-2.0: every part of AND does, or any part of OR."""
    if expression == NVIDIA:
        return True

    def allowed(node: object) -> bool:
        if isinstance(node, AND):
            return all(map(allowed, node.args))
        if isinstance(node, OR):
            return any(map(allowed, node.args))
        return str(node).split(" WITH ")[0] in COMPATIBLE

    try:
        return allowed(spdx().parse(expression))
    except ExpressionError:
        return False


def rows() -> dict[str, tuple[str, list[str]]]:
    """Return, by package, its licence and the extras that bring it."""
    found: dict[str, list[str]] = {}
    for extra, requirements in extras().items():
        stated = {name_of(requirement.name) for requirement in requirements} & set(STATED)
        for name in installed_below(requirements) | stated:
            found.setdefault(name, []).append(extra)
    return {name: (licence_of(name), used) for name, used in sorted(found.items())}


def written() -> dict[str, tuple[str, list[str]]]:
    """Return what the table of the page holds."""
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.M)[2:]
    return {name: (licence, [extra.replace("base", "") for extra in used.split(", ")]) for name, licence, used in lines}


def main() -> None:
    text = PAGE.read_text()
    head = text[: text.index("| package |")] if "| package |" in text else text
    table = ["| package | licence | brought by |", "| --- | --- | --- |"]
    for name, (licence, used) in sorted({**written(), **rows()}.items()):
        table.append(f"| {name} | {licence} | {', '.join(extra or 'base' for extra in used)} |")
    PAGE.write_text(head + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
