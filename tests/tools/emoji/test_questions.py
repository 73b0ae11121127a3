"""What emoji64 is asked for: scenes kept for tests, and scenes of art that pre-training never saw."""

from dataclasses import replace

from tools.emoji import questions
from tools.emoji.art import Art
from tools.emoji.compose import Composer, places


def test_only_combinations_kept_for_tests_are_asked_for(art: Art) -> None:
    singles, pairs = questions.plans_kept_for_tests(art, 3)
    assert len(pairs) == 3
    assert all(len(set(p.subjects)) == 2 for p in pairs)
    assert all(p.place in places(p.subjects, p.style, withheld=True) for p in [*singles, *pairs])
    assert ("dog", "3d") not in {(p.subjects[0], p.style) for p in [*singles, *pairs]}


def test_training_never_composes_what_is_kept(art: Art) -> None:
    singles, pairs = questions.plans_kept_for_tests(art, 20)
    kept = {(tuple(sorted(p.subjects)), p.style, p.place) for p in [*singles, *pairs]}
    composer = Composer(art, 0, questions.VARIETY)
    trained = {(tuple(sorted(p.subjects)), p.style, p.place) for p in (composer.plan() for _ in range(2000))}
    assert len(trained) > 100
    assert not kept & trained


def test_unseen_art_is_asked_for_at_every_place_and_in_pairs(art: Art) -> None:
    singles, pairs = questions.plans_of_unseen_art(art, 12)
    assert {(p.subjects, p.style) for p in singles} == {(("dog",), "3d")}
    assert sorted(p.place for p in singles) == sorted(questions.everywhere())
    assert len(pairs) == 12
    assert all("dog" in p.subjects and len(set(p.subjects)) == 2 and p.style == "3d" for p in pairs)
    assert {p.subjects.index("dog") for p in pairs} == {0, 1}  # on either side


def test_plans_of_opens_held_out_art(art: Art) -> None:
    held = Art(art.images, tuple(replace(cutout, held_out=True) for cutout in art.cutouts))
    plans = questions.plans_of(held, [("owl", "3d")], 99, questions.VARIETY)
    assert len(plans) == 14
    assert {p.subjects for p in plans} == {("owl",)}
    assert len({p.place for p in plans}) == 14
