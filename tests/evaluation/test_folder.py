"""Folders of images that others made, by number and by name, and what is wrong with some."""

import json
import shutil
from pathlib import Path
from unicodedata import normalize

import pytest
from PIL import Image

from sbora_diffusion.evaluation.folder import score_folder
from sbora_diffusion.evaluation.judges.clip import Encoder
from sbora_diffusion.evaluation.report import Result
from sbora_diffusion.utils.errors import SboraError

from .conftest import COLOURS

TEXTS = ["A red dog", "A blue dog at night"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two red and two blue images of two prompts, and references of a red thing and of a blue one."""
    for name, colour in {
        "images/000-0.png": "red",
        "images/000-1.webp": "blue",
        "images/001-0.jpg": "blue",
        "images/001-1.png": "red",
        "ruby/images/a.png": "red",
        "sky/a.png": "blue",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), COLOURS[colour]).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("A red <TOK>\nA blue <TOK> at night\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def score(judge: Encoder, prompts: str, references: list[str], nouns: list[str]) -> tuple[Result, ...]:
    return score_folder(Path("images"), prompts, [Path(name) for name in references], nouns, [judge]).results


@pytest.mark.usefixtures("here")
def test_images_by_number(judge: Encoder) -> None:
    (result,) = score(judge, "prompts.txt", ["ruby", "sky"], ["dog"])
    assert (result.model, result.concept, result.prompts) == ("images", "ruby", tuple(TEXTS))
    assert [[path.name for path in row] for row in result.images] == [
        ["000-0.png", "000-1.webp"],
        ["001-0.jpg", "001-1.png"],
    ]
    assert result.scores["success"].tolist() == [[1, 0], [0, 1]]
    assert result.scores["image"][0, 0].item() == pytest.approx(1)


def test_images_by_name_score_the_same(here: Path, judge: Encoder) -> None:
    """The layout of CLIPScore and of Custom Diffusion's evaluation: a JSON file tells what each image shows."""
    captions = {"000-0.png": TEXTS[0], "000-1": TEXTS[0], "001-0": TEXTS[1], "001-1.png": TEXTS[1], "more": "x"}
    (here / "captions.json").write_text(json.dumps(captions))
    (named,) = score(judge, "captions.json", ["ruby"], [])
    (numbered,) = score(judge, "prompts.txt", ["ruby/images"], ["dog"])
    assert named.concept == numbered.concept == "ruby"
    assert named.images == numbered.images
    assert {key: values.tolist() for key, values in named.scores.items()} == {
        key: values.tolist() for key, values in numbered.scores.items()
    }
    assert "success" not in named.scores


def test_masks_are_no_references(here: Path, judge: Encoder) -> None:
    before = score(judge, "prompts.txt", ["ruby"], ["dog"])[0].scores["image"]
    Image.new("L", (40, 50), 255).save(here / "ruby/images/a.mask.png")
    assert score(judge, "prompts.txt", ["ruby"], ["dog"])[0].scores["image"].equal(before)


def test_prompts_with_unequal_numbers_of_images(here: Path, judge: Encoder) -> None:
    (here / "images/001-1.png").unlink()
    (result,) = score(judge, "prompts.txt", ["ruby"], ["dog"])
    assert result.prompts == (TEXTS[0], TEXTS[0], TEXTS[1])
    assert result.scores["image"].shape == (3, 1)


def test_two_concepts_in_an_image(here: Path, judge: Encoder) -> None:
    (here / "pairs.txt").write_text("a {0} and a {1}\na {1} and a {0}\n")
    results = score(judge, "pairs.txt", ["ruby", "sky"], ["dog", "cat"])
    assert [(result.concept, result.shown) for result in results] == [
        ("ruby", ("ruby", "sky")),
        ("sky", ("ruby", "sky")),
    ]
    assert results[0].prompts == ("a dog and a cat", "a cat and a dog")


@pytest.mark.parametrize(
    ("prompts", "references", "nouns", "message"),
    [
        ("prompts.txt", ["ruby"], [], "needs 1 concepts in one image, got 0"),
        ("nosuch", ["ruby"], ["dog"], "no suite and no file 'nosuch'"),
        ("prompts.txt", ["nosuch"], ["dog"], "no folder .*nosuch"),
        ("prompts.txt", ["empty"], ["dog"], "no image in .*empty"),
        ("prompts.txt", [], ["dog"], "got the folders of references none, expected"),
        ("prompts.txt", ["ruby", "ruby"], ["dog"], "got the folders of references ruby, ruby, expected"),
        ("one.txt", ["ruby"], ["dog"], "got the image 001-0.jpg, expected .* from 0 to 0"),
        ("few.json", ["ruby"], [], "few.json has no prompt for 000-1.webp"),
        ("bad.json", ["ruby"], [], "cannot read bad.json"),
        ("nosuch.json", ["ruby"], [], "no suite and no file 'nosuch.json'"),
        ("prompts.txt", ["damaged"], ["dog"], "cannot read .*a.png"),
    ],
)
def test_bad_input(
    here: Path, judge: Encoder, prompts: str, references: list[str], nouns: list[str], message: str
) -> None:
    (here / "one.txt").write_text("a <TOK>")
    (here / "few.json").write_text('{"000-0": "a dog"}')
    (here / "bad.json").write_text("{")
    (here / "empty").mkdir()
    shutil.copytree(here / "sky", here / "damaged")
    (here / "damaged/a.png").write_bytes(b"no image")
    with pytest.raises(SboraError, match=message):
        score(judge, prompts, references, nouns)


def test_prompts_without_an_image_are_counted(here: Path, judge: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    (here / "prompts.txt").write_text("A red <TOK>\nA blue <TOK> at night\nA <TOK> in snow\nA <TOK> on sand\n")
    score(judge, "prompts.txt", ["ruby"], ["dog"])
    assert caplog.messages == ["no image of 2 of 4 prompts, such as 'A dog in snow'"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_images_as_every_system_composes_them(here: Path, judge: Encoder, form: str) -> None:
    shutil.rmtree(here / "images")
    (here / "images").mkdir()
    Image.new("RGB", (40, 50), COLOURS["red"]).save(here / "images" / normalize(form, "été.png"))  # type: ignore[arg-type]
    for name in ("été", normalize("NFD", "été.png")):
        (here / "captions.json").write_text(json.dumps({name: TEXTS[0]}))
        (result,) = score(judge, "captions.json", ["ruby"], [])
        assert result.prompts == (TEXTS[0],)
