"""What the server gives away, and the messages and HTML of the page."""

import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sbora_diffusion.adapters.certificate import certify
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.cli.app import app
from sbora_diffusion.library.library import Library
from sbora_diffusion.studio.merge_tab import certificate_list, ledger_bar

pytest.importorskip("gradio")


def status(url: str | urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_files_of_the_page_are_served(address: str, here: Path) -> None:
    (here / "secret.txt").write_text("secret")
    assert status(address) == 200
    for path in ("/etc/passwd", here / "secret.txt", here / "adapters/dog.safetensors", here / "runs/studio.json"):
        assert status(f"{address}/gradio_api/file={path}") in (403, 404), path
    assert status(f"{address}/gradio_api/file={here}/adapters/../secret.txt") in (400, 403, 404)


def test_uploads_are_limited(address: str) -> None:
    def upload(size: int) -> int:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        request = urllib.request.Request(f"{address}/gradio_api/upload", head + bytes(size) + b"\r\n--x--\r\n")
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        return status(request)

    assert upload(1000) == 200
    assert upload(21 * 2**20) == 413


@pytest.mark.usefixtures("address")
def test_one_studio_per_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    answer = CliRunner().invoke(app, ["ui"])
    assert answer.exit_code == 1
    assert f"error: another studio is running in {here}" in answer.stderr


def test_messages_are_escaped_sentences() -> None:
    from sbora_diffusion.studio.messages import sentence

    assert sentence("got <dog> & co") == "Got &lt;dog&gt; &amp; co."
    assert sentence("Why?") == "Why?"


def test_errors_become_messages() -> None:
    import gradio as gr

    from sbora_diffusion.studio.messages import show_errors

    def fail(_: int) -> None:
        raise ZeroDivisionError("secret details")

    def stream(_: int) -> object:
        yield 1
        raise OSError(28, "No space left on device", "/secret")

    with pytest.raises(gr.Error) as caught:
        show_errors(fail)(1)
    assert "secret" not in str(caught.value)
    answers = show_errors(stream)(1)
    assert next(answers) == 1
    with pytest.raises(gr.Error, match=r"No space left on device\. See the terminal"):
        next(answers)


def test_ledger_and_certificate(emoji_concepts: Path, tmp_path: Path) -> None:
    library = Library(shutil.copytree(emoji_concepts, tmp_path / "adapters"))
    bar = ledger_bar(library.ledgers()[0], ["dog"])
    assert bar.index(">dog</span>") < bar.index(">cat</span>")
    assert bar.count("class='faded'") == 1
    assert "cat 4:8" in bar
    pair: list[Adapter] = [library.load(name) for name in ("dog", "cat")]
    merge(pair, [1.0, 1.0], "sum").save(library.path("both"))
    merged = ledger_bar(library.ledgers()[0], ["dog"])
    assert merged.replace("<span>both, merged</span>", "") == bar
    facts = certificate_list(certify(pair))
    assert "✓ the sum is the same in any order, bit for bit" in facts
    assert "– not guaranteed: that concepts do not disturb each other" in facts
    assert "✗ not disjoint: 288 columns in 72 of 72 layers" in certificate_list(certify([pair[0], pair[0]]))
