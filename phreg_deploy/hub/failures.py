"""Turn the errors of huggingface_hub into errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phreg_deploy.errors import PhregError

LOG_IN = "run `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(repository: str, revision: str | None, doing: str) -> Iterator[None]:
    """Raise ``PhregError`` for what the hub or its client reports in the block.

    Args:
        repository: ``org/name``.
        revision: a branch, a tag or a commit, None for the main branch.
        doing: what the block does, e.g. "downloaded" or "pushed".
    """
    from huggingface_hub import constants, errors

    address = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError:
        raise PhregError(
            f"hub: {repository} is gated. Ask for access at {address}, then {LOG_IN} with a token of that account."
        ) from None
    except errors.RepositoryNotFoundError:
        raise PhregError(
            f"hub: there is no repository {address}, or it is private. Check its name; if it is private, {LOG_IN}."
        ) from None
    except errors.RevisionNotFoundError:
        raise PhregError(
            f"hub: {repository} has no revision {revision!r}; expected one of the branches, tags or commits at "
            f"{address}/commits/main."
        ) from None
    except errors.LocalEntryNotFoundError:
        raise PhregError(_unreachable(repository, doing, constants.HF_HUB_OFFLINE)) from None
    except errors.OfflineModeIsEnabled:
        raise PhregError(_unreachable(repository, doing, True)) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        message = error.server_message or " ".join(str(error).split())[:300]
        advice = f"{LOG_IN} with a token that may write there" if status in (401, 403) else "Try again later"
        raise PhregError(
            f"hub: {repository} was not {doing}: {address} answered {status}: {message}. {advice}."
        ) from None
    except PhregError:
        raise
    # The clients of different versions raise the types of requests, httpx and httpx2 if there is no network, and hf_xet
    # Python's own.
    except Exception as error:
        module = type(error).__module__.split(".")[0]
        clients = ("requests", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")
        if module not in clients and not isinstance(error, ConnectionError | TimeoutError):
            raise
        raise PhregError(_unreachable(repository, doing, False, type(error).__name__)) from error


def _unreachable(repository: str, doing: str, offline: bool, reason: str = "") -> str:
    if offline:
        return (
            f"hub: {repository} was not {doing}: HF_HUB_OFFLINE is set, and the cache does not hold it. Unset it "
            "for one download, or copy the cache of a machine that has it (HF_HOME)."
        )
    return (
        f"hub: {repository} was not {doing}: the hub cannot be reached{f' ({reason})' if reason else ''}. Check the "
        "network, HF_ENDPOINT and the proxy, or give a folder on this machine."
    )
