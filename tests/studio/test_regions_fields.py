"""The fields of the Regions tab: chips write tokens, tokens switch chips on, an image brings its boxes back."""

from pathlib import Path
from typing import Any

import pytest

from sbora_diffusion.inference.regions import parse_region
from sbora_diffusion.studio.box_canvas import box, fractions
from sbora_diffusion.studio.regions_fields import draw, named, read, renewed_regions, visible, written
from sbora_diffusion.studio.session import Workshop
from sbora_diffusion.utils.errors import SboraError

from .test_session import settings


@pytest.mark.parametrize(
    ("prompt", "picked", "expected"),
    [
        ("", ["dog"], "a <dog>"),
        ("a <dog> asleep", ["dog"], "a <dog> asleep"),
        ("a <dog> asleep", ["dog", "cat"], "a <dog> asleep and a <cat>"),
        ("a <dog> asleep and a <cat>", ["dog"], "a <dog> asleep"),
        ("a <dog> and a <cat>", ["cat"], "a <cat>"),
        ("a 3d <dog>", [], "a 3d"),
        ("a mug", [], "a mug"),
    ],
)
def test_chips_write_tokens(
    workshop: Workshop, tiny_folder: Path, prompt: str, picked: list[str], expected: str
) -> None:
    assert written(workshop, str(tiny_folder), prompt, picked) == expected


def test_tokens_switch_chips_on(workshop: Workshop, tiny_folder: Path) -> None:
    assert named(workshop, str(tiny_folder), "a <dog> and an <owl>", []) == ["dog"]
    assert named(workshop, str(tiny_folder), "a house", ["cat"]) == ["cat"]


def test_another_base_has_other_concepts(workshop: Workshop, tiny_folder: Path) -> None:
    said, bases, chips = renewed_regions(workshop, str(tiny_folder), ["dog", "gone"])
    assert said == "Concepts: `<cat>` `<dog>`"
    assert str(tiny_folder) in bases["choices"]
    assert (chips["choices"], chips["value"]) == (["cat", "dog"], ["dog"])
    assert renewed_regions(workshop, "emoji64", ["dog"])[2]["value"] == []
    assert [update["visible"] for update in visible([{}, {}])] == [True, True, False, False]


def fields(tiny_folder: Path, boxes: list[dict[str, Any]], prompts: list[str], picked: list[list[str]]) -> list[Any]:
    return [boxes, str(tiny_folder), "at night", "red", 7, 2, 2.5, {"dog": 0.5, "other": 1.0}, *prompts, *picked]


def test_a_image_brings_all_fields_back(workshop: Workshop, tiny_folder: Path) -> None:
    boxes = [box(0, 5, 10, 40, 80), box(1, 55, 10, 33, 80)]
    given = fields(tiny_folder, boxes, ["a <dog>", "a cat", "", ""], [["dog"], ["cat"], [], []])
    *_, (gallery, note) = draw(workshop, 1, *given)
    assert note == "1 of 1"
    back = list(read(workshop, gallery["value"][0][0]))
    assert [back[1]["value"], *back[2:7]] == [str(tiny_folder), *given[2:7]]
    assert back[0] == boxes
    assert back[7] == {"dog": 0.5, "cat": 1.0}
    assert back[8:12] == given[8:12]
    assert [chips["value"] for chips in back[12:]] == given[12:]
    again = draw(workshop, 1, back[0], str(tiny_folder), *back[2:12], *given[12:])
    *_, (second, _) = again
    assert Path(second["value"][0][0]).read_bytes() == Path(gallery["value"][0][0]).read_bytes()


def test_boxes_are_where_they_were() -> None:
    region = parse_region("0.29,0.07,0.57,0.58: a")
    (place,) = fractions([box(0, 29, 7, 28, 51)])
    assert place == pytest.approx(region.box)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "there is no box"),
        ([box(0, 0, 0, 50, 100), box(1, 50, 0, 50, 100)], "box 2 has no prompt"),
        ([{"left": 1}], "the boxes cannot be read"),
    ],
)
def test_what_cannot_be_drawn(workshop: Workshop, tiny_folder: Path, boxes: list[Any], message: str) -> None:
    given = fields(tiny_folder, boxes, ["a <dog>", " ", "", ""], [[], [], [], []])
    with pytest.raises(SboraError, match=message):
        list(draw(workshop, 1, *given))


def test_a_image_without_boxes(workshop: Workshop) -> None:
    *_, paths = workshop.draw(settings(workshop), 1)
    with pytest.raises(SboraError, match="has no regions"):
        read(workshop, str(paths[0]))
