"""The scenes that emoji64 and its judge are measured on: kept out of training, or of art that never entered it."""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from random import Random

from tools.emoji.art import Art
from tools.emoji.compose import Composer, Plan, Variety, places
from tools.emoji.pretrain import STAGES
from tools.emoji.world import caption, load_world

NOUNS = 200  # that the judge chooses from
SEED = 7
VARIETY = STAGES[-1]


def plans_kept_for_tests(art: Art, pairs: int) -> tuple[list[Plan], list[Plan]]:
    """All scenes of one subject, and `pairs` of two, that pre-training never composed, each composed once."""
    composer = Composer(art, SEED, VARIETY)

    def kept(numbers: Sequence[int]) -> list[str]:
        drawn = [composer.cutouts[number] for number in numbers]
        return places([cutout.subject for cutout in drawn], drawn[0].style, withheld=True)

    numbers = range(len(composer.cutouts))
    singles = [composer.plan_single(number, place) for number in numbers for place in kept([number])]
    return singles, _pairs(composer, numbers, pairs, lambda both: kept(both)[:1])


def plans_of_unseen_art(art: Art, pairs: int) -> tuple[list[Plan], list[Plan]]:
    """Every concept subject in its held-out art at every place, and `pairs` of such a subject and another.

    Pre-training saw neither these cut-outs nor their prompts ("a 3d dog …"): it knows the nouns in other styles, and
    the styles on other nouns.
    """
    held = {(c.subject, c.style) for c in art.cutouts if c.held_out}
    composer = _opened(art, range(len(art.cutouts)), VARIETY)
    numbers = [number for number, c in enumerate(composer.cutouts) if (c.subject, c.style) in held]
    singles = [composer.plan_single(number, place) for number in numbers for place in everywhere()]
    return singles, _pairs(composer, numbers, pairs, lambda _: [composer.rng.choice(everywhere())])


def _pairs(
    composer: Composer, numbers: Container[int], count: int, allowed: Callable[[Sequence[int]], list[str]]
) -> list[Plan]:
    """`count` scenes of two subjects in one style, at least one of these cut-outs, where it is allowed."""
    rng, plans = Random(SEED), list[Plan]()
    while len(plans) < count:
        both = [rng.randrange(len(composer.cutouts)) for _ in range(2)]
        left, right = (composer.cutouts[number] for number in both)
        if left.style == right.style and left.subject != right.subject and any(n in numbers for n in both):
            plans += [composer.plan_pair(both[0], both[1], place) for place in allowed(both)]
    return plans


def canonical(plan: Plan) -> str:
    """The plan's caption, its style always said."""
    return say(plan.subjects, plan.style, plan.place)


def say(subjects: Sequence[str], style: str, place: str) -> str:
    """The caption of these subjects in a style, in a scene or before a colour."""
    scenes = load_world().scenes
    return caption(subjects, style, scenes.get(place, f"on a {place} background"))


def nouns_to_choose_from(wide: Art) -> list[str]:
    """NOUNS subjects: the world's, and others that the judge knows."""
    world = [subject.name for subject in load_world().subjects]
    others = sorted({c.subject for c in wide.cutouts if not c.held_out} - set(world))
    return [*world, *Random(SEED).sample(others, NOUNS - len(world))]


def plans_of(art: Art, keep: Iterable[tuple[str, str]], count: int, variety: Variety) -> list[Plan]:
    """Up to `count` scenes, all captions different, of the given (subject, style) cut-outs, held out or not."""
    wanted = set(keep)
    composer = _opened(art, [i for i, c in enumerate(art.cutouts) if (c.subject, c.style) in wanted], variety)
    every = [(number, place) for number in range(len(composer.cutouts)) for place in everywhere()]
    return [composer.plan_single(i, place) for i, place in composer.rng.sample(every, min(count, len(every)))]


def _opened(art: Art, numbers: Sequence[int], variety: Variety) -> Composer:
    """A source of scenes of these cut-outs as if none were held out."""
    cutouts = tuple(replace(art.cutouts[number], held_out=False, tier=0) for number in numbers)
    return Composer(Art(art.images[list(numbers)], cutouts), SEED, variety)


def everywhere() -> list[str]:
    """All scenes and background colours."""
    return [*load_world().scenes, *load_world().colours]
