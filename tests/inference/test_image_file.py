"""Settings that travel inside images."""

import errno
import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sbora_diffusion.inference.image_file import Settings, read_settings, save_numbered
from sbora_diffusion.utils.errors import SboraError

MADE = Settings(
    base="emoji64",
    prompt="a <dog> – ünd ein 🐧",
    negative_prompt="rain",
    seed=7,
    steps=20,
    guidance=2.5,
    concepts={"dog": 0.75, "cat": 1.0},
    regions=("0,0,0.5,1: a <dog>",),
)
IMAGE = Image.new("RGB", (8, 8), "red")


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = save_numbered(IMAGE, tmp_path / "new", MADE)
    assert path.name == "0001-a-dog-ünd-ein.png"
    assert read_settings(path) == MADE
    with Image.open(path) as file:
        assert file.convert("RGB").tobytes() == IMAGE.tobytes()


@settings(max_examples=30, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=200), strength=st.floats(-3, 3))
def test_any_text_comes_back(prompt: str, strength: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = Settings(
        base="b", prompt=prompt, negative_prompt=prompt, seed=0, steps=1, guidance=1.0, concepts={"x": strength}
    )
    assert read_settings(save_numbered(IMAGE, tmp_path_factory.mktemp("any"), made)) == made


@pytest.mark.parametrize("has_links", [True, False])
def test_a_image_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    """Also where it is to take a name that another process has just given away."""
    link = os.link

    def taken_first(source: Path, target: Path) -> None:
        if target.name.startswith("0001-"):
            target.write_bytes(b"theirs")
        if not has_links:
            raise PermissionError(errno.EPERM, "no hard links here")
        link(source, target)
        assert read_settings(target) == MADE

    monkeypatch.setattr("os.link", taken_first)
    assert save_numbered(IMAGE, tmp_path, MADE).name == "0002-a-dog-ünd-ein.png"
    assert [path.name[:5] for path in sorted(tmp_path.iterdir())] == ["0001-", "0002-"]
    assert (tmp_path / "0001-a-dog-ünd-ein.png").read_bytes() == b"theirs"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SboraError, match="No space"):
        save_numbered(IMAGE, tmp_path, MADE)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_without_hard_links_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    opened = Path.open

    def open_full(path: Path, mode: str) -> object:
        file = opened(path, mode)
        if path.suffix != ".png":
            return file
        file.close()
        return Full()

    monkeypatch.setattr("os.link", no_links)
    monkeypatch.setattr("pathlib.Path.open", open_full)
    with pytest.raises(SboraError, match="No space"):
        save_numbered(IMAGE, tmp_path, MADE)
    assert not list(tmp_path.iterdir())


def test_numbers_go_on_and_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "0041-other.png").write_bytes(b"kept")
    assert save_numbered(IMAGE, tmp_path, MADE).name.startswith("0042-")
    assert save_numbered(IMAGE, tmp_path, MADE).name.startswith("0043-")
    assert (tmp_path / "0041-other.png").read_bytes() == b"kept"


def test_a_image_of_somebody_else(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "other.png")
    with pytest.raises(SboraError, match=r"other\.png contains no settings"):
        read_settings(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(SboraError, match=r"text\.png is not a readable PNG"):
        read_settings(tmp_path / "text.png")


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"base": 1}', '{"concepts": 3}'])
def test_damaged_settings(text: str, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt("sbora", text)
    IMAGE.save(tmp_path / "odd.png", pnginfo=info)
    with pytest.raises(SboraError, match=r"the settings in odd\.png are damaged"):
        read_settings(tmp_path / "odd.png")
