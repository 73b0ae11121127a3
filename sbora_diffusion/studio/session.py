"""The state behind the page: folders, the concepts of the library, and image generation with them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from sbora_diffusion.adapters.file import Adapter, Spec, read_spec
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.inference.image_file import Settings, save_numbered
from sbora_diffusion.inference.regions import Region, class_nouns, generate_regions, whole_scene
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base
from sbora_diffusion.studio.live_model import LiveModel, known_path
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import tokens_in

T = TypeVar("T")

log = logging.getLogger(__name__)

DEFAULT_BASE = "emoji64"
BATCH = 4  # images generated at once, after the first
MAX_TEXT = 2000  # characters of a prompt or caption: many times what a text encoder reads


@dataclass(frozen=True, kw_only=True)
class Folders:
    """The folders that the commands use, too."""

    adapters: Path = Path("adapters")
    outputs: Path = Path("outputs")
    runs: Path = Path("runs")
    concepts: Path = Path("concepts")
    evaluations: Path = Path("evaluations")


class Session:
    """The library and the model, shared by all visitors.

    Args:
        bases: base models to offer besides emoji64 and those of the concepts in the library.
        is_training: returns whether a training is using the cores, too.
    """

    def __init__(
        self, folders: Folders, bases: tuple[str, ...] = (), is_training: Callable[[], bool] = lambda: False
    ) -> None:
        self.folders = folders
        self.library = Library(folders.adapters)
        self._bases = bases
        self._model = LiveModel(self.library, is_training)

    def specs(self) -> dict[str, Spec]:
        """Return the readable concepts of the library by name."""
        specs = {}
        for name in self.library.names():
            try:
                specs[name] = read_spec(self.library.path(name))
            except SboraError as error:
                log.warning("%s", error)
        return specs

    def bases(self) -> list[str]:
        """Return the base models to choose from."""
        return list(dict.fromkeys([DEFAULT_BASE, *self._bases, *(spec.base_id for spec in self.specs().values())]))

    def base_or_default(self, name: str) -> str:
        """Return the base model if it can be chosen here, else the default."""
        return name if name in self.bases() else DEFAULT_BASE

    def concepts(self, base: str) -> dict[str, Spec]:
        """Return the concepts of a base model by name."""
        return {name: spec for name, spec in self.specs().items() if spec.base_id == base}

    def singles(self, base: str) -> dict[str, Spec]:
        """Return the concepts of a base model that are not merges by name."""
        return {name: spec for name, spec in self.concepts(base).items() if not spec.parents}

    def tokens(self, base: str) -> dict[str, str]:
        """Map tokens to concepts; merges are left out, because their concepts cannot be limited to a box."""
        return {token: name for name, spec in self.singles(base).items() for token in spec.tokens}

    def load(self, name: str) -> Adapter:
        """Load a concept; names from the page cannot escape the library."""
        known_path(self.library, name)
        return self.library.load(name)

    def with_model(self, name: str, strengths: Mapping[str, float], work: Callable[[Base], T]) -> T:
        """Return `work(base)`, called with exactly these concepts written into the base model."""
        self._check_base(name)
        return self._model.run(name, strengths, work)

    def generate(self, settings: Settings, count: int) -> Iterator[list[Path]]:
        """Generate images with seeds from `settings.seed` on; yield the files so far, first after one image."""
        if not settings.prompt.strip():
            raise SboraError("the prompt is empty", "Describe the image, for example: a penguin at night")
        check_length(settings.prompt, settings.negative_prompt)
        self._check_base(settings.base)
        self._check_tokens(settings)

        def sample(seeds: Sequence[int], base: Base) -> list[Image.Image]:
            return generate(base, [settings.prompt] * len(seeds), seeds=seeds, **settings.sampling)

        sizes = [1, *(min(BATCH, count - done) for done in range(1, count, BATCH))]
        yield from self._save_images(settings, settings.concepts, sample, sizes)

    def generate_regions(self, settings: Settings, regions: Sequence[Region], count: int) -> Iterator[list[Path]]:
        """Generate images with regions, in each of which only its own concepts act; yield the files so far.

        A concept acts where a prompt names it or a region lists it. Every region's prompt includes the whole scene.

        Args:
            settings: the strengths of concepts that do not act are ignored; those that are missing are 1.
            regions: with the library's names of concepts.
        """
        check_length(settings.prompt, settings.negative_prompt, *(region.prompt for region in regions))
        self._check_base(settings.base)
        names = self._acting(settings, regions)
        adapters = {name: self.load(name) for name in names}
        strengths = {name: settings.concepts.get(name, 1.0) for name in names}
        settings = replace(settings, concepts=strengths, regions=tuple(region.text for region in regions))
        live = [replace(r, adapters=tuple(adapters[name].spec.name for name in r.adapters)) for r in regions]
        prompt, live = whole_scene(settings.prompt, live, class_nouns(adapters.values()))
        options: dict[str, Any] = {"strengths": list(strengths.values()), **settings.sampling}

        def sample(seeds: Sequence[int], base: Base) -> list[Image.Image]:
            return generate_regions(base, prompt, live, list(adapters.values()), seeds=seeds, **options)

        yield from self._save_images(settings, {}, sample, [1] * count)

    def _save_images(
        self,
        settings: Settings,
        written: Mapping[str, float],
        sample: Callable[[Sequence[int], Base], list[Image.Image]],
        sizes: Sequence[int],
    ) -> Iterator[list[Path]]:
        """Generate and save batches of these sizes, with these concepts written into the base model."""
        paths: list[Path] = []
        for size in sizes:
            seeds = range(settings.seed + len(paths), settings.seed + len(paths) + size)
            images, precision = self.with_model(
                settings.base, written, lambda base, seeds=seeds: (sample(seeds, base), base.precision)
            )
            for seed, image in zip(seeds, images, strict=True):
                paths.append(
                    save_numbered(image, self.folders.outputs, replace(settings, seed=seed, precision=precision))
                )
            yield list(paths)

    def warm_up(self) -> None:
        """Load the default base model and sample once, so that the first click does not have to wait for it."""
        try:
            self.with_model(DEFAULT_BASE, {}, partial(generate, prompts=["a penguin"], seeds=[0], steps=1))
        except SboraError as error:
            log.warning("%s", error)

    def _check_base(self, name: str) -> None:
        if name not in (bases := self.bases()):
            raise SboraError(f"got the base model {name!r}, expected one of {', '.join(bases)}")

    def _acting(self, settings: Settings, regions: Sequence[Region]) -> list[str]:
        """Return the concepts that a prompt names or a region lists."""
        owners = self.tokens(settings.base)
        named = {token for text in (settings.prompt, *(r.prompt for r in regions)) for token in tokens_in(text)}
        if missing := sorted(named - owners.keys()):
            raise _unknown_token(settings.base, missing[0], owners)
        return sorted({owners[token] for token in named}.union(*(region.adapters for region in regions)))

    def _check_tokens(self, settings: Settings) -> None:
        """SboraError for a token of the prompt without its concept."""
        specs = self.concepts(settings.base)
        given = {token for name in settings.concepts if name in specs for token in specs[name].tokens}
        for token in (token for token in tokens_in(settings.prompt) if token not in given):
            owners = [name for name, spec in specs.items() if token in spec.tokens]
            if owners:
                raise SboraError(f"the prompt uses {token}, but its concept is off", f"Select {' or '.join(owners)}.")
            raise _unknown_token(settings.base, token, [token for spec in specs.values() for token in spec.tokens])


def check_length(*texts: str) -> None:
    """SboraError for a prompt or caption that is far longer than what a text encoder reads."""
    if (longest := max(map(len, texts))) > MAX_TEXT:
        raise SboraError(f"got a text of {longest} characters, expected at most {MAX_TEXT}", "Shorten it.")


def _unknown_token(base: str, token: str, known: Iterable[str]) -> SboraError:
    names = ", ".join(dict.fromkeys(known)) or "none"
    return SboraError(f"got the unknown token {token}, known for {base}: {names}", "Train it first.")
