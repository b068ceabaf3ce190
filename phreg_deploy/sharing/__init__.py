"""Push a student or a bundle to the Hugging Face hub.

Needs the extra ``hub`` (huggingface_hub). Importing this module imports nothing of it.
"""

from __future__ import annotations

from pathlib import Path

from phreg_deploy.extras import HUB, require
from phreg_deploy.hub.names import parse_hub_name
from phreg_deploy.progress import SILENT, Progress
from phreg_deploy.sharing.contents import Pushed, list_contents

__all__ = ["Pushed", "push"]


def push(
    folder: Path | str,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Pushed:
    """Upload a student or a bundle in one commit; ``hf-hub:REPOSITORY`` then stands for it.

    Only the files that a reader needs are uploaded, the model card and its picture: no TensorRT engines. A card that
    is there is kept, with ``path/to/this/folder`` replaced by the name on the hub; one is written if there is none.

    Args:
        folder: a student's folder or a bundle; a bundle's hashes are verified first.
        repository: ``org/name``; it is created if it is not there.
        private: create it private; an existing one must be private then.
        revision: a branch, which is created if it is not there; None for the main branch.
        message: of the commit.
        dry_run: check the folder and list what would be uploaded, without network.

    Raises:
        PhregError: neither a student nor a bundle, or a damaged one; a malformed name; a repository that holds the
            other of both, or is public where a private one is asked for; no token, no rights or no network.
        BackendMissing: the extra ``hub`` is not installed.
    """
    name = parse_hub_name(f"{repository}@{revision}" if revision else repository)
    contents = list_contents(folder, name)
    require("`phreg-deploy push`", hub=HUB)
    from phreg_deploy.sharing.upload import upload

    if dry_run:
        return contents.pushed(name)
    return upload(contents, name, private, message, progress)
