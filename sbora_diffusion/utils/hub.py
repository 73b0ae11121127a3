"""Access to the model hub: without a network, fail immediately or use the cache."""

import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from sbora_diffusion.utils.errors import SboraError

ALLOW_PICKLES = "SBORA_ALLOW_PICKLES"  # environment variable; 1 reads weights in pickle files, too
PICKLE_HINT = f"convert it to safetensors, or set {ALLOW_PICKLES}=1 if you trust where it comes from"
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def only_safetensors() -> bool | None:
    """Return `use_safetensors` for the libraries: None, with pickles as a fallback, only if the user allows it."""
    return None if os.environ.get(ALLOW_PICKLES) == "1" else True


def check_no_pickles(*folders: Path) -> None:
    """SboraError if a folder has weights in pickle files only, which can run code when they are read."""
    for folder in folders if only_safetensors() else ():
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        pickles = [path for path in files if path.suffix in PICKLES]
        if pickles and not any(path.suffix in (".safetensors", ".gguf") for path in files):
            raise SboraError(f"{pickles[0]} is a pickle file, which can run code when it is read", PICKLE_HINT)


def pickle_hint(error: Exception) -> str | None:
    """Return what to do if a library found no safetensors file, else None."""
    return PICKLE_HINT if only_safetensors() and "safetensors" in str(error) else None


def can_be_reached() -> bool:
    """Return whether the hub's host name resolves; True behind a proxy, which resolves names itself."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies().keys() & {"https", "all"}:
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port)
    except OSError:
        return False
    return True


def why(error: Exception, name: str = "") -> str:
    """Return in one line why a model could not be loaded; if `name` is a local path, the hub is not mentioned."""
    if isinstance(error, OSError) and not (name and Path(name).exists()) and not can_be_reached():
        return "neither a folder nor in the hub's cache, and the hub cannot be reached"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def cache_if_offline() -> Iterator[None]:
    """Keep the hub's libraries from retrying for a minute to reach a hub whose host name does not resolve."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not can_be_reached()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
