"""What people put into a folder of images is used as they mean it, or named in a warning."""

import os
from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image

from sbora_diffusion.data.concept import load_concept
from sbora_diffusion.data.folder import image_files, mask_file
from sbora_diffusion.utils.errors import SboraError


@pytest.fixture
def mug(tmp_path: Path) -> Path:
    """A folder with one image, a.jpg."""
    return with_images(tmp_path / "mug", "a.jpg")


def with_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(folder / name, "PNG")
    return folder


def captions(folder: Path) -> list[str]:
    return [image.caption for image in load_concept(str(folder), []).images]


def unused(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The names in the warning about a folder."""
    image_files(folder)
    messages = [line.message for line in caplog.records if line.levelname == "WARNING"]
    assert all(message.startswith(f"not used in {folder}: ") for message in messages)
    return [name for message in messages for name in message.partition(f"{folder}: ")[2].split(", ")]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.jpg.txt", "a.jpg.caption"])
def test_caption_files(mug: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (mug / name).write_text("\ufeffa blue <mug>\non a table ", encoding="utf-8")
    assert captions(mug) == ["a blue <mug> on a table"]
    assert not caplog.records


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_in_metadata(mug: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    with_images(mug, "b.png")
    (mug / "metadata.jsonl").write_text(f'{{"file_name": "a.jpg", "{key}": "a {{token}} at night"}}\n\n')
    assert captions(mug) == ["a <mug> at night", "a photo of a <mug>"]
    assert not caplog.records


@pytest.mark.parametrize(
    "line", ["[", "[1]", '{"text": "a <mug>"}', '{"file_name": "a.jpg", "text": 1}', "[" * 100_000]
)
def test_metadata_that_cannot_be_read(mug: Path, line: str) -> None:
    (mug / "metadata.jsonl").write_text("\n" + line)
    with pytest.raises(SboraError, match=r"cannot read line 2 of .*metadata\.jsonl"):
        captions(mug)


def test_two_captions_for_one_image(mug: Path) -> None:
    for name in ("a.txt", "a.caption"):
        (mug / name).write_text("a <mug>")
    with pytest.raises(SboraError, match=r"a\.jpg has 2 captions, a\.caption and a\.txt"):
        captions(mug)


def test_a_caption_file_for_two_images(mug: Path) -> None:
    with_images(mug, "a.png")
    (mug / "a.jpg.txt").write_text("one <mug>")
    (mug / "a.png.txt").write_text("another <mug>")
    assert captions(mug) == ["one <mug>", "another <mug>"]
    (mug / "a.txt").write_text("a <mug>")
    with pytest.raises(SboraError, match=r"2 images share the caption file .*a\.txt"):
        captions(mug)


@pytest.mark.parametrize("name", ["b.jfif", "b.JPE", "b.JPEG", "b.Png", "b.WEBP"])
def test_images_by_every_usual_extension(mug: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with_images(mug, name)
    assert [path.name for path in image_files(mug)] == ["a.jpg", name]
    assert not caplog.records


def test_what_is_not_used_is_named(mug: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        "IMG_1.HEIC",
        "b.DNG",
        "c.avif",
        "d.gif",
        "e.tiff",
        "notes.txt",
        ".hidden.gif",
        "LICENSE",
        "README.md",
    ):
        (mug / name).touch()
    (mug / "f.jpg").symlink_to("/nowhere/f.jpg")
    os.mkfifo(mug / "pipe.png")
    with_images(mug, "more/1.png", "more/deep/2.png", "empty/x.txt")
    assert unused(mug, caplog) == [
        "IMG_1.HEIC", "b.DNG", "c.avif", "d.gif", "e.tiff", "the folder empty", "f.jpg (a broken link)",
        "the folder more (2 images)", "notes.txt", "pipe.png",
    ]  # fmt: skip


def test_images_beside_the_folder_of_images_are_named(mug: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_images(mug, "images/1.png", "images/2.png", "images/more/3.png", "masks/1.png")
    (mug / "concept.toml").write_text('class_noun = "cup"')
    (mug / "images/2.txt").write_text("a <mug>")
    assert unused(mug, caplog) == ["the folder more (1 images)", "a.jpg"]


@pytest.mark.parametrize(
    "name",
    ["a.mask.png", "a.Mask.PNG", "a-masklabel.png", "a_mask.png", "a-mask.jpg", "masks/a.png", "mask/a.webp"],
)
def test_masks_by_the_names_of_other_tools(mug: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with_images(mug, name)
    assert [path.name for path in image_files(mug)] == ["a.jpg"]
    if name != "a.Mask.PNG":
        assert mask_file(mug / "a.jpg") == mug / name
        assert not caplog.records
    else:  # no mask is found, and it is no image
        assert "a.Mask.PNG" in caplog.text


def test_an_image_of_a_mask(tmp_path: Path) -> None:
    folder = with_images(tmp_path / "carnival", "red_mask.png", "gold-mask.png", "lost.mask.png")
    assert [path.name for path in image_files(folder)] == ["gold-mask.png", "red_mask.png"]


def test_the_folder_of_folders_names_the_one_to_give(tmp_path: Path) -> None:
    with_images(tmp_path / "img" / "10_sks mug", "1.png")
    with pytest.raises(SboraError, match=r"got the folder 10_sks mug \(1 images\)") as caught:
        image_files(tmp_path / "img")
    assert caught.value.hint == f"give the folder {tmp_path / 'img' / '10_sks mug'}"


def test_a_shipped_concept_beside_ones_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_images(tmp_path / "dog", "a.png")
    monkeypatch.chdir(tmp_path)
    assert load_concept("dog").images[0].path.parent != tmp_path / "dog"
    assert "there is a folder dog, too; for that one: --concept ./dog" in caplog.text
    caplog.clear()
    assert load_concept("./dog").images[0].path == Path("dog/a.png")
    assert not caplog.records


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_as_every_system_composes_them(tmp_path: Path, form: str) -> None:
    folder = with_images(tmp_path / form / normalize(form, "café"), normalize(form, "été.png"), "a.png")  # type: ignore[arg-type]
    (folder / "concept.toml").write_text('[captions]\n"été.png" = "in summer, {token}"', encoding="utf-8")
    (folder / "a.txt").write_text(normalize("NFD", "a <café>"), encoding="utf-8")
    concept = load_concept(str(folder))
    assert (concept.name, concept.token, concept.class_noun) == ("café", "<café>", "café")
    assert sorted(image.caption for image in concept.images) == ["a <café>", "in summer, <café>"]


@pytest.mark.parametrize("word", ["कुत्ता", "Собака", "כלב", "หมา", "犬", "köpek"])
def test_names_in_other_scripts(tmp_path: Path, word: str) -> None:
    concept = load_concept(str(with_images(tmp_path / word, "a.png")))
    assert (concept.token, concept.class_noun) == (f"<{word.lower()}>", word.lower())
