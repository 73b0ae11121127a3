"""The world's vocabulary is consistent and captions are grammatical."""

import pytest

from tools.emoji.art import SVG_SETS
from tools.emoji.scenes import PAINTERS
from tools.emoji.world import caption, load_world


@pytest.mark.parametrize(
    ("subjects", "style", "place", "want"),
    [
        (["owl", "red apple"], "drawing", "in the snow", "a drawing of an owl and a red apple in the snow"),
        (["red apple", "owl"], "drawing", "in the snow", "a drawing of a red apple and an owl in the snow"),
        (["unicorn"], None, "at night", "a unicorn at night"),
        (["owl"], None, "at sea", "an owl at sea"),
        (["owl"], "3d", "on the beach", "a 3d owl on the beach"),
        (["umbrella"], "cartoon", "on a red background", "a cartoon umbrella on a red background"),
        (["<owl>"], "3d", "on the grass", "a 3d <owl> on the grass"),
        (["<owl>"], None, "on the grass", "a <owl> on the grass"),
    ],
)
def test_caption(subjects: list[str], style: str | None, place: str, want: str) -> None:
    assert caption(subjects, style, place) == want


def test_every_style_and_scene_can_be_drawn() -> None:
    world = load_world()
    assert list(world.scenes) == list(PAINTERS)
    assert set(world.styles) == {"3d", *SVG_SETS}
    assert all(phrase.count("{}") == 1 for phrase in world.styles.values())


def test_subjects_have_names_of_their_own() -> None:
    subjects = load_world().subjects
    assert len({subject.name for subject in subjects}) == len({subject.label for subject in subjects}) == len(subjects)
    assert sum(subject.is_concept for subject in subjects) == 16
    assert {subject.tier for subject in subjects} == {0, 1, 2}


def test_only_fluent_art_of_concepts_is_held_out() -> None:
    world = load_world()
    held = [style for style in world.styles if world.held_out("pumpkin", style)]
    assert held == ["3d", "flat"]
    assert not any(world.held_out("owl", style) for style in world.styles)
