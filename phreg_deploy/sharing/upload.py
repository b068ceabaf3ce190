"""Upload files to the Hugging Face hub in one commit."""

from __future__ import annotations

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token

from phreg_deploy import __version__
from phreg_deploy.bundle.manifest import MANIFEST
from phreg_deploy.cards.metadata import CARD
from phreg_deploy.errors import PhregError
from phreg_deploy.hub.failures import LOG_IN, explained
from phreg_deploy.hub.names import HubName
from phreg_deploy.hub.reports import reported, shown_by
from phreg_deploy.progress import Progress
from phreg_deploy.sharing.contents import Contents, Pushed
from phreg_deploy.student_record import RECORD

# What a repository of the other kind holds.
OTHER = {"student": ("bundle", MANIFEST), "bundle": ("student", RECORD)}


def upload(contents: Contents, name: HubName, private: bool, message: str | None, progress: Progress) -> Pushed:
    """Create the repository and the branch if they are not there, and commit the files; see ``sharing.push``."""
    repository, revision = name.repository, name.revision
    _check_card(contents.card)
    if get_token() is None:
        raise PhregError(f"push: there is no token for the hub; {LOG_IN} with one that may write.")
    api = HfApi(library_name="phreg-deploy", library_version=__version__)
    operations = [CommitOperationAdd(CARD, contents.card.encode())]
    operations += [CommitOperationAdd(file, path) for file, path in contents.paths.items()]
    with explained(repository, revision, "pushed"), shown_by(progress), reported(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        _check_repository(api, contents.kind, repository, private, revision)
        commit = api.create_commit(
            repository,
            operations,
            commit_message=message or f"Add a {contents.kind} of phreg-deploy {__version__}",
            revision=revision,
        )
    return contents.pushed(name, commit.oid, commit.commit_url)


def _check_repository(api: HfApi, kind: str, repository: str, private: bool, revision: str | None) -> None:
    """Raise ``PhregError`` if the repository is public against the user's will, or holds what would be read first."""
    info = api.model_info(repository, revision=revision)
    if private and not info.private:
        raise PhregError(
            f"push: {repository} is there already and public; make it private on the hub, or choose another name."
        )
    other, mark = OTHER[kind]
    if any(sibling.rfilename == mark for sibling in info.siblings or []):
        raise PhregError(f"push: {repository} holds a {other}; a {kind} needs a repository or a branch of its own.")


def _check_card(card: str) -> None:
    """Raise ``PhregError`` if the metadata of the card is no YAML, or malformed."""
    try:
        ModelCard(card)
    # PyYAML's errors are no ValueErrors, and huggingface_hub reads fields without checking their types.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise PhregError(f"push: the metadata of {CARD} cannot be read ({reason}); correct it, or remove it.") from None
