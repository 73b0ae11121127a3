"""Whether the hub can be reached, and that nobody waits for one that cannot."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants, is_offline_mode

from sbora_diffusion.utils.hub import cache_if_offline, can_be_reached, why

PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether names have addresses."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for proxy in PROXIES:
        monkeypatch.delenv(proxy, raising=False)

    def look_up(*_: object) -> list:
        raise socket.gaierror(-2, "Name or service not known")

    def have_addresses(known: bool) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", (lambda *_: []) if known else look_up)

    return have_addresses


def test_no_address(names: Callable[[bool], None]) -> None:
    names(False)
    assert not can_be_reached()
    with cache_if_offline():
        assert is_offline_mode()
    assert not is_offline_mode()


def test_address(names: Callable[[bool], None]) -> None:
    names(True)
    assert can_be_reached()
    with cache_if_offline():
        assert not is_offline_mode()


def test_a_proxy_looks_names_up(names: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    names(False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert can_be_reached()


def test_offline_by_choice(names: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    names(True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with cache_if_offline():
        assert is_offline_mode()
    assert is_offline_mode()


def test_why(names: Callable[[bool], None], tmp_path: Path) -> None:
    names(False)
    assert why(OSError("no file named config.json\nat all"), str(tmp_path)) == "no file named config.json"
    assert why(OSError("no"), str(tmp_path / "none")).endswith("the hub cannot be reached")
    assert why(OSError("We couldn't connect\nCheck")).endswith("the hub cannot be reached")
    assert why(KeyError("unet")) == "'unet'"
    names(True)
    assert why(OSError("no file\nat all")) == "no file"
    assert why(OSError()) == "OSError"
