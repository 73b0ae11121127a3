"""Composed images show what their captions say, where they say it, and repeat with their seed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.emoji.art import Art
from tools.emoji.compose import CANVAS, Composer, Placed, Plan, Variety, image_grid, places, render
from tools.emoji.world import load_world


def composer(art: Art, **variety: float) -> Composer:
    return Composer(art, seed=0, variety=Variety(**variety), variants=2)  # pyright: ignore[reportArgumentType]


def placed(pixels: Tensor, x: float = 32, y: float = 32, size: float = 32, flipped: bool = False) -> Tensor:
    """One cut-out on a white background, (3, 128, 128) in [-1, 1]."""
    background = torch.full((3, CANVAS, CANVAS), 255, dtype=torch.uint8)
    plan = Plan(background, (Placed(pixels, x, y, size, flipped),), "", ("owl",), "3d", "white")
    return render([plan])[0]


def colour(*rgba: int) -> Tensor:
    return torch.tensor(rgba, dtype=torch.uint8).view(4, 1, 1).expand(4, CANVAS, CANVAS)


def test_batches_repeat_with_the_seed(art: Art) -> None:
    variety = Variety(tiers=3, pairs=0.3, flip=0.5, styleless=0.5)
    first, second, other = (Composer(art, seed, variety, variants=2).batch(6) for seed in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert [plan.caption for plan in first[1]] == [plan.caption for plan in second[1]]
    assert not torch.equal(first[0], other[0])
    assert (first[0].shape, first[0].dtype) == ((6, 3, 128, 128), torch.float32)
    assert first[0].min() >= -1
    assert first[0].max() <= 1


def test_held_out_art_and_closed_tiers_never_enter(art: Art) -> None:
    for tiers, subjects in ((1, {"dog", "owl", "red apple"}), (2, {"dog", "owl", "red apple", "turtle"})):
        some = composer(art, tiers=tiers, pairs=0.5)
        shown = {(subject, plan.style) for plan in (some.plan() for _ in range(300)) for subject in plan.subjects}
        assert {subject for subject, _ in shown} == subjects
        assert ("dog", "3d") not in shown
        assert ("dog", "drawing") in shown


def test_combinations_kept_for_tests_are_never_composed(art: Art) -> None:
    some = composer(art, tiers=2, pairs=0.5)
    plans = [some.plan() for _ in range(400)]
    assert not [p for p in plans if p.place in places(p.subjects, p.style, withheld=True)]
    assert len({p.place for p in plans}) == 14


def test_about_a_tenth_of_all_combinations_is_kept_for_tests() -> None:
    world = load_world()
    kept = [len(places([s.name], style, withheld=True)) for s in world.subjects for style in world.styles]
    assert 0.08 < sum(kept) / (14 * len(kept)) < 0.12
    assert places(["owl", "dog"], "3d", withheld=True) == places(["dog", "owl"], "3d", withheld=True)
    both = [*places(["owl"], "3d", withheld=True), *places(["owl"], "3d", withheld=False)]
    assert sorted(both) == sorted([*world.scenes, *world.colours])


def test_a_cut_out_lands_where_it_is_placed() -> None:
    image = placed(colour(255, 0, 0, 255), x=20, y=40, size=16)
    red = torch.tensor([1.0, -1, -1]).view(3, 1, 1)
    assert torch.allclose(image[:, 66:94, 26:54], red.expand(3, 28, 28), atol=1e-5)
    outside = torch.ones(128, 128, dtype=torch.bool)
    outside[62:98, 22:58] = False
    assert torch.equal(image[:, outside], torch.ones(3, int(outside.sum())))


def test_transparency_is_premultiplied() -> None:
    image = placed(colour(102, 0, 0, 153))  # (1, 0, 0) at 40 % over (1, 1, 1), the alpha 60 %: 0.4 + 1 * (1 - 0.6)
    middle = (image[:, 32, 32] + 1) / 2
    torch.testing.assert_close(middle, torch.tensor([0.8, 0.4, 0.4]), atol=1e-5, rtol=0)


def test_flipping_mirrors() -> None:
    halves = colour(255, 0, 0, 255).clone()
    halves[0, :, : CANVAS // 2], halves[2, :, : CANVAS // 2] = 0, 255
    torch.testing.assert_close(placed(halves, flipped=True), placed(halves).flip(-1), atol=1e-5, rtol=0)


def test_the_second_part_covers_the_first() -> None:
    white = torch.full((3, CANVAS, CANVAS), 255, dtype=torch.uint8)
    parts = tuple(Placed(colour(*rgba), 32, 32, 32, False) for rgba in ((255, 0, 0, 255), (0, 0, 255, 255)))
    image = render([Plan(white, parts, "", ("owl", "owl"), "3d", "white")])[0]
    torch.testing.assert_close(image[:, 32, 32], torch.tensor([-1.0, -1, 1]), atol=1e-5, rtol=0)


def test_pairs_share_a_style_and_stand_in_the_order_of_the_caption(art: Art) -> None:
    some = composer(art, pairs=1)
    for plan in (some.plan() for _ in range(50)):
        left, right = plan.parts
        assert left.x < right.x
        first, second = plan.subjects
        assert plan.caption.index(first) < plan.caption.rindex(second)
        assert " and a" in plan.caption


@pytest.mark.parametrize("plain", [0, 1])
def test_plain_backgrounds(art: Art, plain: float) -> None:
    world = load_world()
    some = composer(art, plain=plain)
    for plan in (some.plan() for _ in range(30)):
        assert plan.place in (world.colours if plain else world.scenes)
        assert plan.caption.endswith(f"on a {plan.place} background" if plain else world.scenes[plan.place])
        assert bool((plan.background == plan.background[:, :1, :1]).all()) == bool(plain)


def test_captions_without_style(art: Art) -> None:
    some = composer(art, styleless=1)
    words = " ".join(some.plan().caption for _ in range(50))
    assert "3d" not in words
    assert "drawing" not in words


def test_image_grid_tiles_row_by_row() -> None:
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    sheet = image_grid(images, columns=2, scale=3)
    assert (sheet.shape, sheet.dtype) == ((36, 36, 3), np.uint8)
    assert [int(sheet[y, x, 0]) for y, x in ((0, 0), (0, 18), (18, 0), (18, 18), (0, 12))] == [0, 128, 255, 200, 200]
