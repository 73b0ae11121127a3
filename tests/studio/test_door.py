"""The door in front of Gradio's real server: host names, other sites, framing, the password, sizes."""

import asyncio
import base64
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sbora_diffusion.cli.app import app
from sbora_diffusion.utils.errors import SboraError

pytest.importorskip("gradio")

import gradio as gr
from gradio.routes import App
from starlette.testclient import TestClient

from sbora_diffusion.studio import door as door_module
from sbora_diffusion.studio.app import temporary_folder
from sbora_diffusion.studio.door import Door, Guard, is_loopback, parse_auth

HOME = "127.0.0.1:7860"
PUBLIC = Door(host="0.0.0.0", auth=("ann", "secret-word"))
Client = Callable[..., TestClient]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[App, Path]]:
    """Gradio's server of a small page, and its temporary folder."""

    async def build() -> App:  # in a loop: Gradio makes one otherwise, and does not close it
        with gr.Blocks(analytics_enabled=False) as page:
            gr.File()
        page.max_file_size = None  # as `launch` sets it
        return App.create_app(page)

    with temporary_folder(tmp_path_factory.mktemp("runs")) as temporary:
        yield asyncio.run(build()), temporary


@pytest.fixture
def client(server: tuple[App, Path]) -> Client:
    """Build a client of the server behind a door."""
    shutil.rmtree(server[1])
    server[1].mkdir(mode=0o700)

    def build(door: Door | None = None, host: str = HOME) -> TestClient:
        return TestClient(Guard(server[0], door or Door(), server[1]), base_url=f"http://{host}")

    return build


def password(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860", "127.8.8.8"])
def test_own_names_are_served(client: Client, host: str) -> None:
    assert client(host=host).get("/config").status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.4", "0.0.0.0:7860", "",
     "evil@127.0.0.1", "127.0.0.1/evil", "127.0.0.1:port", "[::1", "localhost."],
)  # fmt: skip
def test_other_names_are_refused(client: Client, host: str) -> None:
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        headers = {"Host": host, "Origin": f"http://{host}", "Access-Control-Request-Method": "POST"}
        answer = client().request(method, "/config", headers=headers)
        assert answer.status_code == 421
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_two_host_headers_are_refused(client: Client) -> None:
    assert client().get("/config", headers=[("Host", HOME), ("Host", "evil.example")]).status_code == 421


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", f"http://{HOME}.evil.example", "file://",
     f"http://x@{HOME}", ""],
)  # fmt: skip
def test_other_origins_are_refused(client: Client, origin: str) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for method, path in (("POST", "/gradio_api/upload"), ("POST", "/gradio_api/queue/join"), ("OPTIONS", "/config")):
        answer = client().request(method, path, headers=headers)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_only_link_to_the_page(client: Client, site: str) -> None:
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client().get("/config", headers=link).status_code == 200
    assert client().post("/gradio_api/upload", headers=link).status_code == 403
    for changed in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors"}, {"Sec-Fetch-Dest": "image"}):
        assert client().get("/config", headers=link | changed).status_code == 403
    framed = Door(framed_by=("https://huggingface.co",))
    answer = client(framed).get("/config", headers=link | {"Sec-Fetch-Dest": "iframe"})
    assert answer.headers["content-security-policy"] == "frame-ancestors https://huggingface.co"


def test_the_own_page_is_served_and_cannot_be_framed(client: Client) -> None:
    answer = client().get("/config", headers={"Origin": f"http://{HOME}", "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert "access-control-allow-origin" not in answer.headers


def test_all_addresses_and_names_of_a_proxy(client: Client) -> None:
    allowed = password("ann:secret-word")
    assert client(PUBLIC, "192.168.1.4:7860").get("/config", headers=allowed).status_code == 200
    assert client(PUBLIC, "evil.example").get("/config", headers=allowed).status_code == 421
    proxied = Door(names=("studio.example",), auth=PUBLIC.auth)
    headers = allowed | {"Origin": "https://Studio.example"}
    assert client(proxied, "studio.example").get("/config", headers=headers).status_code == 200
    assert client(proxied).get("/config", headers=headers).status_code == 200  # a proxy that rewrites Host


@pytest.mark.parametrize("given", ["", "ann:wrong-word", "ann:", "bob:secret-word", "ann:secret-word2", ":secret-word"])
def test_wrong_passwords_are_refused(client: Client, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "WRONG_PASSWORD_DELAY", 0)
    page = client(PUBLIC)
    for path in ("/", "/config", "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/theme.css"):
        answer = page.get(path, headers=password(given) if given else {})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
    for broken in ("Basic", "Basic ?", "Basic é", "Bearer x", f"basic {'=' * 9}"):
        assert page.get("/", headers={"Authorization": broken.encode()}).status_code == 401  # pyright: ignore[reportArgumentType]


def test_a_password_is_required_off_the_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == [True] * 4
    for host in ("0.0.0.0", "192.168.1.4", "::", "example.org", ""):
        with pytest.raises(SboraError, match="would have no password"):
            Door(host=host)
    with pytest.raises(SboraError, match="would have no password"):
        Door(names=("studio.example",))
    assert "secret-word" not in repr(PUBLIC)


def test_the_command_checks_the_password() -> None:
    for words in (["--host", "0.0.0.0"], ["--auth", "ann"], ["--auth", ":secret-word"], ["--auth", "ann:2short"]):
        answer = CliRunner().invoke(app, ["ui", *words])
        assert (answer.exit_code, answer.stderr.count("error: ")) == (1, 1)
        assert "secret-word" not in answer.stderr
    assert parse_auth("ann:a:long:word") == ("ann", "a:long:word")
    assert parse_auth("") is None


def upload(client: TestClient, *sizes: int) -> int:
    files = [("files", (f"{number}.png", bytes(size))) for number, size in enumerate(sizes)]
    return client.post("/gradio_api/upload", files=files).status_code


def test_sizes_are_limited(client: Client, server: tuple[App, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    page = client()
    assert upload(page, 1000, 1000) == 200
    assert page.post("/gradio_api/queue/join", content=bytes(door_module.MAX_BODY + 1)).status_code == 413
    assert page.post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
    assert page.post("/gradio_api/process_recording").status_code == 404
    monkeypatch.setattr(door_module, "MAX_UPLOAD", 3000)
    assert upload(page, 2000, 2000) == 413
    monkeypatch.setattr(door_module, "MAX_TEMPORARY", 4000)
    assert (upload(page, 1100), upload(page, 1200)) == (200, 413)
    monkeypatch.setattr(door_module, "MAX_TEMPORARY", 10**6)
    monkeypatch.setattr(door_module, "MAX_FILES", 3)
    assert upload(page, 1) == 413
    assert sum(path.is_file() for path in server[1].rglob("*")) == 3


def test_the_temporary_folder_is_private_and_removed(tmp_path: Path) -> None:
    for _ in range(2):
        with temporary_folder(tmp_path) as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            assert os.environ["GRADIO_TEMP_DIR"] == tempfile.gettempdir() == str(folder)
            (folder / "upload.png").touch()
        assert not folder.exists()
        folder.mkdir(mode=0o755)  # as after a kill
        (folder / "old.png").touch()
    with temporary_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []


def test_a_linked_temporary_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/.studio.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError), temporary_folder(tmp_path / "runs"):
        pass
    assert (tmp_path / "precious").exists()
