"""Other ways to say what a caption says, so that emoji-clip learns meanings instead of one sentence pattern."""

from collections.abc import Sequence
from random import Random

from tools.emoji.world import caption, load_world

PLACES = {
    "grass": ("on the grass", "on a green meadow", "in the green grass"),
    "beach": ("on the beach", "at the beach", "on the sand by the sea"),
    "snow": ("in the snow", "on a snowy day", "in winter with snow"),
    "night": ("at night", "under the moon", "in the dark night"),
    "desert": ("in the desert", "on desert sand", "among sand dunes"),
    "sea": ("at sea", "on the water", "in the blue sea"),
}
COLOUR = ("on a {} background", "in front of a {} background", "on plain {}")
FRAMES = (
    "{}",
    "a photo depicts {}",  # the prefix of the `mos` protocol
    "an image of {}",
    "an image of {}",
    "this is {}",
)
CANONICAL = 0.5  # how often a caption is what pre-training of the base model would say


def paraphrase(subjects: Sequence[str], style: str, place: str, rng: Random) -> str:
    """`["owl"], "3d", "beach"` -> such as `a photo depicts a 3d owl at the beach`.

    Args:
        subjects: one or two nouns; the order of two is exchanged now and then.
        style: left out in a quarter of the paraphrases.
        place: a scene or a plain colour of the world; left out in a tenth of the paraphrases.
    """
    if rng.random() < CANONICAL:
        return caption(subjects, style, _say_place(place, 0))
    nouns = list(subjects) if rng.random() < 0.5 else list(reversed(subjects))
    where = _say_place(place, rng.randrange(3)) if rng.random() < 0.9 else ""
    words = caption(nouns, style if rng.random() < 0.75 else None, where).strip()
    return rng.choice(FRAMES).format(words)


def _say_place(place: str, number: int) -> str:
    return PLACES[place][number] if place in load_world().scenes else COLOUR[number].format(place)
