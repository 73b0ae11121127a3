"""The studio's door: which requests are served, decided for every route before Gradio handles them."""

import asyncio
import binascii
import hmac
import ipaddress
import os
from base64 import b64decode
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from sbora_diffusion.utils.errors import SboraError

MIB = 2**20
MAX_BODY = 4 * MIB  # of a request that is no upload
MAX_UPLOAD = 200 * MIB  # of all files of one upload
MAX_TEMPORARY = 2048 * MIB  # in the temporary folder: the uploads and the images that the page has shown
MAX_FILES = 5000  # there
MIN_PASSWORD = 8
WRONG_PASSWORD_DELAY = 1.0  # seconds
UNUSED = ("/process_recording", "/reload")  # routes of Gradio that the page does not need

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Refusal = tuple[int, str]  # HTTP status and reason


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """Split USER:PASSWORD; the error does not repeat the password."""
    if not text:
        return None
    user, _, password = text.partition(":")
    if not user or len(password) < MIN_PASSWORD:
        raise SboraError(
            "--auth is not USER:PASSWORD with a password that is long enough",
            f"Give a user, a colon and at least {MIN_PASSWORD} characters, for example in the variable SBORA_AUTH.",
        )
    return user, password


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where the studio listens and who may use it.

    Args:
        names: further host names, in lower case, under which it is reached, as behind a proxy.
        auth: user and password; required if other machines can reach it.
        framed_by: origins of pages that may embed it.

    Raises:
        SboraError: other machines can reach it, and there is no password.
    """

    host: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    auth: tuple[str, str] | None = field(default=None, repr=False)
    framed_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.auth is None and (self.names or not is_loopback(self._address)):
            raise SboraError(
                f"the studio at {', '.join([self.host, *self.names])} would have no password: others could use it",
                "Give --auth USER:PASSWORD or set SBORA_AUTH, or serve this machine only: neither --host nor --name.",
            )

    @property
    def _address(self) -> str:
        return self.host.strip("[]")

    def serves(self, name: str) -> bool:
        """Return whether a host name is one of the studio's own.

        On all addresses (0.0.0.0) any address is: a page that rebinds its DNS name arrives with a name.
        """
        if is_loopback(name) or name in (self._address.lower(), *self.names):
            return True
        try:
            return ipaddress.ip_address(self._address).is_unspecified and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def refusal(self, method: str, headers: Headers) -> Refusal | None:
        """Return why a request is refused, None if it may come from the studio's own page or a program."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.serves(_host_name(hosts[0])):
            return 421, "this host name is not the studio's: open it as localhost, by its --host, or add --name NAME"
        if not self._is_own_page(method, headers):
            return 403, "requests of other sites are refused"
        return None

    def _is_own_page(self, method: str, headers: Headers) -> bool:
        for origin in headers.getlist("origin"):
            place = origin.partition("://")[2]
            if place != headers["host"] and _host_name(place) not in self.names:
                return False
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return True
        opened = ("document", "iframe") if self.framed_by else ("document",)
        is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return is_link and headers.get("sec-fetch-dest") in opened

    def admits(self, authorization: str) -> bool:
        """Return whether an Authorization header (HTTP Basic) has the right user and password."""
        if self.auth is None:
            return True
        scheme, _, given = authorization.partition(" ")
        try:
            answer = b64decode(given, validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(answer, ":".join(self.auth).encode())


class Guard:
    """ASGI middleware, outside all others, that lets through what a door admits.

    Args:
        temporary: the folder in which Gradio stores uploads.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], door: Door, temporary: Path) -> None:
        self._app, self._door, self._temporary = app, door, temporary
        self._arriving = 0  # bytes of uploads that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":  # the page uses none
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, self._protected(send))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        refused = self._door.refusal(scope["method"], headers) or await self._unauthorized(scope["path"], headers)
        refused = refused or self._too_large(scope["path"], headers)
        if refused:
            status, reason = refused
            challenge = {"www-authenticate": 'Basic realm="SBoRA studio", charset="UTF-8"'} if status == 401 else None
            await PlainTextResponse(f"{reason}\n", status, challenge)(scope, receive, send)
            return
        length = int(headers.get("content-length", 0))
        self._arriving += length
        try:
            await self._app(scope, receive, send)
        finally:
            self._arriving -= length

    async def _unauthorized(self, path: str, headers: Headers) -> Refusal | None:
        given = headers.get("authorization", "")
        if self._door.admits(given) or path.endswith("/startup-events"):  # Gradio's request to itself
            return None
        if given:
            await asyncio.sleep(WRONG_PASSWORD_DELAY)
        return 401, "user and password are required"

    def _too_large(self, path: str, headers: Headers) -> Refusal | None:
        if path.rstrip("/").endswith(UNUSED):
            return 404, "not found"
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal():
            return 411, "the length of the request is missing"
        is_upload = path.rstrip("/").endswith("/upload")
        most = MAX_UPLOAD if is_upload else MAX_BODY
        if int(length) > most:
            return 413, f"got {int(length) / MIB:.0f} MB, expected at most {most // MIB} MB at once"
        if is_upload:
            number, size = _usage(self._temporary)
            if number >= MAX_FILES or size + self._arriving + int(length) > MAX_TEMPORARY:
                limits = f"{MAX_FILES} files or {MAX_TEMPORARY // MIB} MB"
                return 413, f"the studio's temporary folder is full ({limits}): restart the studio to empty it"
        return None

    def _protected(self, send: Send) -> Send:
        """Add what forbids framing to each response, and remove what lets other sites read it."""
        ancestors = " ".join(self._door.framed_by) or "'none'"

        async def protected(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
                headers["content-security-policy"] = f"frame-ancestors {ancestors}"
                if not self._door.framed_by:
                    headers["x-frame-options"] = "DENY"
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        return protected


def _host_name(place: str) -> str:
    """Return the name in HOST or HOST:PORT in lower case, "" if it is malformed."""
    try:
        parts = urlsplit(f"//{place}")
        is_plain = parts.netloc == place and "@" not in place and (parts.port or 1)
        return (parts.hostname or "") if is_plain else ""
    except ValueError:
        return ""


def _usage(folder: Path) -> tuple[int, int]:
    """Return the number and the total size of the files in a folder."""
    sizes = []
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                sizes.append((Path(root) / file).stat().st_size)
            except OSError:  # it has been removed meanwhile
                continue
    return len(sizes), sum(sizes)
