"""Downloads from the hub: what a user can act on becomes one sentence."""

import re
from contextlib import contextmanager
from urllib.error import URLError

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Nothing in the cache, and no connection or an offline mode.
UNREACHABLE = (LocalEntryNotFoundError, httpx.TransportError, URLError, ConnectionError, TimeoutError)
# diffusers and transformers report a missing file as a bare OSError.
MISSING_FILE = re.compile(r"file named|could not find the necessary `safetensors` weights", re.IGNORECASE)


@contextmanager
def fetched(name: str, source: str, revision: str | None = None):
    """Turn download errors inside the block into a one-sentence FileNotFoundError. All other errors propagate."""
    try:
        yield
    except Exception as error:
        message = download_error(name, source, revision, error)
        if message is None:
            raise
        raise FileNotFoundError(message) from error


def download_error(name: str, source: str, revision: str | None, error: BaseException) -> str | None:
    """One sentence on why weights could not be fetched, and what to do; None for an error of another kind."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    text = " ".join(map(str, chain))

    def has(*kinds) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if has(GatedRepoError):
        return f"the weights of {name!r} are gated: accept their licence on the hub's page of {source}, then `hf auth login`"
    if has(RevisionNotFoundError):
        return f"{source} has no revision {revision!r}: leave it out, or take one from the hub's page"
    if has(RepositoryNotFoundError):
        return f"the hub has no {source!r}: it was renamed or removed; give ek.load the new name or a local folder"
    if has(*UNREACHABLE):
        remedy = "set HF_HUB_OFFLINE=0" if constants.HF_HUB_OFFLINE else "go online once"
        return (
            f"the weights of {name!r} ({source}) are not on this machine and could not be fetched: {remedy}, or give "
            "ek.load a folder that holds the pipeline in diffusers' format with safetensors"
        )
    if has(EntryNotFoundError) or (isinstance(chain[0], OSError) and MISSING_FILE.search(text)):
        file = re.search(r"[\w.-]+\.(?:json|safetensors|bin)", text)
        return (
            f"{source} is no pipeline in diffusers' format with safetensors: it has no {file[0] if file else 'weights'}"
        )
    if has(HfHubHTTPError):
        return f"the hub refused to send {source}: {text.splitlines()[0][:200]}"
    return None
