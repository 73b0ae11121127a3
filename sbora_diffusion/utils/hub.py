"""Asking the model hub: a machine without a network is told so at once, and uses what its cache has."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants


def can_be_reached() -> bool:
    """Whether the hub's name has an address; True behind a proxy, which looks names up itself."""
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
    """Why a model could not be loaded, in one line; for what lies on this disk under `name` no hub was asked."""
    if isinstance(error, OSError) and not (name and Path(name).exists()) and not can_be_reached():
        return "neither a folder nor in the hub's cache, and the hub cannot be reached from here"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def cache_if_offline() -> Iterator[None]:
    """Within it, the hub's libraries do not try again and again (for a minute) to reach a hub that has no address."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not can_be_reached()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
