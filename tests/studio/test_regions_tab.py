"""The fields of the Regions tab: chips write tokens, tokens select chips, an image restores its boxes."""

from pathlib import Path
from typing import Any

import pytest

from sbora_diffusion.inference.regions import parse_region
from sbora_diffusion.studio.box_canvas import box, fractions
from sbora_diffusion.studio.regions_tab import (
    generate_images,
    load_settings,
    refresh_choices,
    select_named,
    show_boxes,
    write_tokens,
)
from sbora_diffusion.studio.session import Session
from sbora_diffusion.utils.errors import SboraError

from .test_session import settings


@pytest.mark.parametrize(
    ("prompt", "selected", "expected"),
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
    session: Session, tiny_folder: Path, prompt: str, selected: list[str], expected: str
) -> None:
    assert write_tokens(session, str(tiny_folder), prompt, selected) == expected


def test_tokens_select_chips(session: Session, tiny_folder: Path) -> None:
    assert select_named(session, str(tiny_folder), "a <dog> and an <owl>", []) == ["dog"]
    assert select_named(session, str(tiny_folder), "a house", ["cat"]) == ["cat"]


def test_another_base_has_other_concepts(session: Session, tiny_folder: Path) -> None:
    text, bases, chips = refresh_choices(session, str(tiny_folder), ["dog", "gone"])
    assert text == "Tokens: `<cat>` `<dog>`"
    assert str(tiny_folder) in bases["choices"]
    assert (chips["choices"], chips["value"]) == (["cat", "dog"], ["dog"])
    assert refresh_choices(session, "emoji64", ["dog"])[2]["value"] == []
    assert [update["visible"] for update in show_boxes([{}, {}])] == [True, True, False, False]


def fields(tiny_folder: Path, boxes: list[dict[str, Any]], prompts: list[str], selected: list[list[str]]) -> list[Any]:
    strengths = {"dog": 0.5, "other": 1.0}
    return [boxes, "at night", str(tiny_folder), "red", 7, 2, 2.5, strengths, *prompts, *selected]


def test_an_image_restores_all_fields(session: Session, tiny_folder: Path) -> None:
    boxes = [box(0, 5, 10, 40, 80), box(1, 55, 10, 33, 80)]
    given = fields(tiny_folder, boxes, ["a <dog>", "a cat", "", ""], [["dog"], ["cat"], [], []])
    *_, (gallery, note) = generate_images(session, 1, *given)
    assert note.startswith("1 of 1 · ")
    back = list(load_settings(session, gallery["value"][0][0]))
    assert [back[1], back[2]["value"], *back[3:7]] == given[1:7]
    assert back[0] == boxes
    assert back[7] == {"dog": 0.5, "cat": 1.0}
    assert back[8:12] == given[8:12]
    assert [chips["value"] for chips in back[12:]] == given[12:]
    again = generate_images(session, 1, *back[:2], str(tiny_folder), *back[3:12], *given[12:])
    *_, (second, _) = again
    assert Path(second["value"][0][0]).read_bytes() == Path(gallery["value"][0][0]).read_bytes()


def test_boxes_keep_their_places() -> None:
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
def test_invalid_boxes(session: Session, tiny_folder: Path, boxes: list[Any], message: str) -> None:
    given = fields(tiny_folder, boxes, ["a <dog>", " ", "", ""], [[], [], [], []])
    with pytest.raises(SboraError, match=message):
        list(generate_images(session, 1, *given))


def test_an_image_without_boxes(session: Session) -> None:
    *_, paths = session.generate(settings(session), 1)
    with pytest.raises(SboraError, match="has no regions"):
        load_settings(session, str(paths[0]))
