"""Find the folder of a name; a repository on the hub is downloaded into the hub's own cache first."""

from __future__ import annotations

import functools
import glob
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from phreg_deploy.errors import PhregError, write_error
from phreg_deploy.extras import HUB, require
from phreg_deploy.files.temporary import temporary
from phreg_deploy.hub.failures import explained
from phreg_deploy.hub.names import HubName, is_hub_name, parse_hub_name
from phreg_deploy.hub.reports import reported
from phreg_deploy.json_files import read_json

MANIFEST, CONFIG = "manifest.json", "config.json"
# Tell what a repository holds; each is small.
FACTS = (MANIFEST, CONFIG, "phreg.json")
WEIGHTS = "model.safetensors"
# Weights of a graph of more than 2 GB.
BESIDE = "weights.bin"
# A detached signature, see ``signing``.
SIGNATURE = "model.sig"


def local_path(name: Path | str) -> Path:
    """Return the folder on this machine that a name stands for; every name but ``hf-hub:...`` is a path itself.

    A repository with ``manifest.json`` is a bundle: the files that its manifest names are downloaded. Any other one is
    a student or a timm model: ``config.json``, ``model.safetensors`` and ``phreg.json`` are, where they are there. Of
    both, the signature is too.

    The files stay in the cache of huggingface_hub (``HF_HOME``). Within one process a name stands for one commit.
    Without network, or with ``HF_HUB_OFFLINE=1``, the commit that was downloaded last is used.

    Raises:
        PhregError: the name is malformed; nothing is there; access is refused; the hub cannot be reached.
        BackendMissing: the extra ``hub`` is not installed.
    """
    text = str(name)
    return _download(text) if is_hub_name(text) else Path(name)


@functools.lru_cache(maxsize=64)
def _download(text: str) -> Path:
    name = parse_hub_name(text)
    require(text, hub=HUB)
    folder = _fetch(name, name.revision, FACTS)
    if os.path.isfile(folder / MANIFEST):
        wanted: Sequence[str] = (*_bundle_files(folder / MANIFEST, name), SIGNATURE)
    elif os.path.isfile(folder / CONFIG):
        wanted = (WEIGHTS, SIGNATURE)
    else:
        raise PhregError(
            f"hub: {name} holds neither {MANIFEST} nor {CONFIG}; expected a bundle, a student or a timm model."
        )
    # The folder is named after the commit: both parts are of the same one.
    folder = _fetch(name, folder.name, wanted)
    if os.path.islink(folder / BESIDE):
        _replace_link(folder / BESIDE)
    return folder


def _replace_link(path: Path) -> None:
    """Replace a symbolic link in the cache by the file itself: OpenVINO reads no weights from outside the folder."""
    partial = temporary(path, "writing")
    try:
        try:
            os.link(path.resolve(), partial)
        # A file system without hard links.
        except OSError:
            shutil.copyfile(path, partial)
        os.replace(partial, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        # If another process has put the same file there already, the system leaves both names.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _fetch(name: HubName, revision: str | None, files: Sequence[str]) -> Path:
    """Download the files that the repository has of ``files``, and return the folder of the commit."""
    from huggingface_hub import snapshot_download

    with explained(name.repository, name.revision, "downloaded"), reported(name.repository):
        try:
            return Path(
                snapshot_download(
                    name.repository,
                    revision=revision,
                    allow_patterns=[glob.escape(file) for file in files],
                    library_name="phreg-deploy",
                )
            )
        except OSError as error:
            # Errors of the client are OSErrors too, without a number.
            if error.errno is None or isinstance(error, ConnectionError):
                raise
            raise write_error(error, Path(error.filename or "the cache of the hub")) from error


def _bundle_files(path: Path, name: HubName) -> list[str]:
    """List the files that a manifest names. ``Bundle.read`` checks the manifest itself later."""
    try:
        files = read_json(path)["files"]
        names = [str(file) for file in files]
    except (OSError, ValueError, TypeError, KeyError):
        raise PhregError(f"hub: {MANIFEST} of {name} is damaged; export and push the bundle again.") from None
    return [file for file in names if file == os.path.basename(file)]
