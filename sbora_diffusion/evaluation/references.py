"""The concepts that images are compared with: their reference images."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from PIL import Image

from sbora_diffusion.data.concept import Concept, default_roots, known_concepts, load_concept
from sbora_diffusion.data.images import load_image


def all_concepts(extra: Iterable[str | Concept] = ()) -> list[Concept]:
    """Return all known concepts and `extra` ones, which replace known ones of their name."""
    with _warnings_only("sbora_diffusion.data.concept"):  # which logs the same notice for every concept
        known = [load_concept(name, default_roots()) for name in known_concepts(default_roots())]
    named = [load_concept(each, default_roots()) if isinstance(each, str) else each for each in extra]
    return list({concept.name: concept for concept in [*known, *named]}.values())


def reference_images(concepts: Iterable[Concept]) -> dict[str, list[Image.Image]]:
    """Read all images of each concept's folder, by the concept's name."""
    return {concept.name: [load_image(image.path) for image in concept.images] for concept in concepts}


@contextmanager
def _warnings_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
