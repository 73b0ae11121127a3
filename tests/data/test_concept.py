"""Concept folders, shipped or the user's own: found, completed with defaults, and every defect told in one line."""

from pathlib import Path

import pytest
from PIL import Image

from sbora_diffusion.data.concept import default_roots, known_concepts, load_concept
from sbora_diffusion.utils.errors import SboraError


def folder_of(folder: Path, *images: str, toml: str | None = None, **texts: str) -> Path:
    """A folder of plain images; `texts` are .txt files by stem."""
    folder.mkdir(parents=True)
    for name in images:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(folder / name)
    for stem, text in texts.items():
        (folder / f"{stem}.txt").write_text(text, encoding="utf-8")
    if toml is not None:
        (folder / "concept.toml").write_text(toml, encoding="utf-8")
    return folder


def captions(folder: Path) -> list[str]:
    return [image.caption for image in load_concept(str(folder), []).images]


def test_folder_without_description(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "Red_Teapot 2", "b.png", "a.JPG", "c.webp")
    concept = load_concept(str(folder), [])
    assert (concept.name, concept.token, concept.class_noun) == ("red_teapot-2", "<red_teapot-2>", "red teapot")
    assert [image.path.name for image in concept.images] == ["a.JPG", "b.png", "c.webp"]
    assert {image.caption for image in concept.images} == {"a photo of a <red_teapot-2>"}


def test_class_noun_argument_wins(tmp_path: Path) -> None:
    plain = folder_of(tmp_path / "rex", "a.png")
    described = folder_of(tmp_path / "other", "a.png", toml='class_noun = "cat"')
    assert load_concept(str(plain), [], "dog").class_noun == "dog"
    assert load_concept(str(described), [], "dog").class_noun == "dog"
    assert load_concept(str(described), []).class_noun == "cat"


def test_other_alphabets(tmp_path: Path) -> None:
    concept = load_concept(str(folder_of(tmp_path / "Мой пёс", "a.png")), [])
    assert (concept.token, concept.class_noun) == ("<мой-пёс>", "мой пёс")


def test_hidden_and_other_files_are_no_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "dog", "a.png", ".b.png", notes="not a caption")
    (folder / "c.png").mkdir()
    assert captions(folder) == ["a photo of a <dog>"]


def test_captions_from_toml_then_text_then_template(tmp_path: Path) -> None:
    toml = 'token = "<rex>"\ntemplate = "my {token}"\n[captions]\n"a.png" = "a <rex> on a sofa"'
    folder = folder_of(
        tmp_path / "dog", "a.png", "b.png", "c.png", toml=toml, a="unused", b="\ufeffa {token}\nat home\n"
    )
    assert captions(folder) == ["a <rex> on a sofa", "a <rex> at home", "my <rex>"]


def test_lookup_prefers_the_first_root_and_a_name_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = [tmp_path / "one", tmp_path / "two"]
    for place in (*roots, tmp_path):
        folder_of(
            place / "dog", "a.png", toml=f'class_noun = "{place.name}"' if place in roots else 'class_noun = "own"'
        )
    assert load_concept("dog", roots).class_noun == "one"
    assert load_concept("dog", roots[1:]).class_noun == "two"
    assert load_concept("./dog", []).class_noun == "own"
    assert load_concept(str(tmp_path / "dog"), roots).class_noun == "own"
    assert load_concept("dog", [tmp_path / "nothing"]).class_noun == "own"


def test_the_working_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "dog", "a.png")
    monkeypatch.chdir(folder)
    assert load_concept(".", [tmp_path]).token == "<dog>"
    monkeypatch.chdir(tmp_path / "dog")
    with pytest.raises(SboraError, match="no image in"):
        load_concept("..", [tmp_path])


def test_default_roots_hold_the_shipped_concepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"dog", "cat", "birthday-cake"} <= set(known_concepts(default_roots()))
    assert load_concept("dog", default_roots()).token == "<dog>"


@pytest.mark.parametrize("name", ["", "...", "dgo", "no/such/folder"])
def test_missing(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SboraError, match=r"no concept and no folder .*; known concepts: beer-mug, .*tiger") as caught:
        load_concept(name, default_roots())
    assert caught.value.hint is not None
    assert ("did you mean dragon or dog?" in caught.value.hint) == (name == "dgo")


def test_a_file_is_no_concept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "dog", "a.png")
    with pytest.raises(SboraError, match=r"a\.png is no folder"):
        load_concept(str(folder / "a.png"), [])


DEFECTS = {
    "broken": ("name = ", r"cannot read .*concept\.toml: Invalid value"),
    "unknown": ('tokens = "<dog>"', r"unknown key 'tokens' in .*; allowed: name, token, class_noun, template"),
    "number": ("name = 3", r"name in .* must be a string that is not empty, got 3"),
    "empty": ('class_noun = " "', r"class_noun in .* must be a string that is not empty"),
    "list": ("captions = [1]", r"captions in .* must be a table, got \[1\]"),
    "caption-type": ('[captions]\n"a.png" = 1', r"the caption of a\.png in .* must be a string, got 1"),
    "caption-of-none": ('[captions]\n"z.png" = "a <dog>"', r"has a caption for z\.png, but there is no such image"),
    "no-token": ('template = "a dog"', r"caption of .*a\.png lacks the token <no-token>: 'a dog'"),
    "bare-token": ('token = "dog"', r"the token of .* is 'dog'; allowed is one word"),
    "two-words": ('token = "<my dog>"', r"is '<my dog>'; allowed is one word"),
    "two-tokens": ('token = "<a><b>"', r"is '<a><b>'; allowed is one word"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_of_the_description(tmp_path: Path, name: str) -> None:
    toml, message = DEFECTS[name]
    with pytest.raises(SboraError, match=message):
        load_concept(str(folder_of(tmp_path / name, "a.png", toml=toml)), [])


def test_folder_name_without_words(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="2024 suggests no class noun"):
        load_concept(str(folder_of(tmp_path / "2024", "a.png")), [])
    with pytest.raises(SboraError, match="suggests no name"):
        load_concept(str(folder_of(tmp_path / "!!!", "a.png")), [], "dog")


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match=r"no image in .*: got nothing") as caught:
        load_concept(str(folder_of(tmp_path / "dog")), [])
    assert caught.value.hint == "put images there; allowed are .jpg, .jpeg, .jpe, .jfif, .png, .webp"
    folder = folder_of(tmp_path / "cat", notes="")
    (folder / "cat.heic").touch()
    with pytest.raises(SboraError, match=r"got cat\.heic, notes\.txt"):
        load_concept(str(folder), [])


def test_two_images_with_one_caption_file(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match=r"2 images share the caption file .*a\.txt"):
        load_concept(str(folder_of(tmp_path / "dog", "a.png", "a.jpg", a="a <dog>")), [])
    assert len(captions(folder_of(tmp_path / "cat", "a.png", "a.jpg"))) == 2
    toml = '[captions]\n"a.png" = "a <cow>"'
    assert captions(folder_of(tmp_path / "cow", "a.png", "a.jpg", toml=toml, a="my <cow>")) == ["my <cow>", "a <cow>"]


@pytest.mark.parametrize("text", ["", "\n", "a brown dog"])
def test_caption_file_without_token(tmp_path: Path, text: str) -> None:
    with pytest.raises(SboraError, match=r"the caption of .*a\.png lacks the token <dog>"):
        load_concept(str(folder_of(tmp_path / "dog", "a.png", a=text)), [])


def test_caption_file_in_another_encoding(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "dog", "a.png")
    (folder / "a.txt").write_bytes("a <dog> in a café".encode("latin-1"))
    with pytest.raises(SboraError, match=r"cannot read the caption file .*a\.txt"):
        load_concept(str(folder), [])
