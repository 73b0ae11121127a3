"""Access to the model hub: without a network, fail immediately or use the cache."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants


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
