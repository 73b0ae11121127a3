"""What a training shows: preview grids while it runs, and one sheet of before and after."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.text import say_plainly


class Preview:
    """The preview prompts of a training, drawn from the same seeds each time.

    Attributes:
        named: the prompts with the token.

    Args:
        writes: whether the images are to be stored, which one of several processes does.
    """

    def __init__(self, base: Base, concept: Concept, config: TrainConfig, folder: Path, writes: bool = True) -> None:
        self._base, self._concept, self._config, self._folder, self._writes = base, concept, config, folder, writes
        self.named = [prompt.replace("{token}", concept.token) for prompt in config.output.preview_prompts]
        self._plain = [say_plainly(prompt, concept.token, concept.class_noun) for prompt in self.named]
        self._before: list[Image.Image] = []

    def generate_before(self) -> None:
        """Remember what the base model itself makes of the class noun."""
        self._before = self._images(self._plain)

    def generate(self, step: int) -> Path:
        """A grid of the prompts with the token, in the run folder."""
        title = f"{self._concept.token} after {step} steps"
        return self._save(f"preview-{step:06d}.png", [(title, self._labelled(self.named))])

    def generate_after(self) -> tuple[Path, float]:
        """The sheet of before and after, and how much the class without the token moved.

        Returns:
            The image's path, and the mean absolute difference of the plain prompts' pixels, from 0 to 1.
        """
        after = self._images(self._plain)
        pairs = zip(self._before, after, strict=True)
        drift = float(np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() / 255 for a, b in pairs]))
        images = [(image.caption, load_image(image.path)) for image in self._concept.images[:5]]
        noun = self._concept.class_noun
        rows = [
            ("reference images", images),
            (f"before: {self._base.id}'s own {noun}", list(zip(self._plain, self._before, strict=True))),
            (f"after: {self._concept.token}", self._labelled(self.named)),
            (f"after, without the token (pixels moved by {drift:.1%})", list(zip(self._plain, after, strict=True))),
        ]
        return self._save("before-after.png", rows), drift

    def _labelled(self, prompts: Sequence[str]) -> list[tuple[str, Image.Image]]:
        return list(zip(prompts, self._images(prompts), strict=True))

    def _images(self, prompts: Sequence[str]) -> list[Image.Image]:
        config = self._config
        seeds = [config.seed + number for number in range(len(prompts))]
        return generate(
            self._base, prompts, seeds=seeds, steps=config.output.sampling_steps, guidance=config.output.guidance
        )

    def _save(self, name: str, rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> Path:
        path = self._folder / name
        if self._writes:
            sheet(rows).save(path)
        return path
