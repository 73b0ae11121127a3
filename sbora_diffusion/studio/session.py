"""What the page works with: the folders, the library's concepts, and images drawn with them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from sbora_diffusion.adapters.file import Adapter, Spec, read_spec
from sbora_diffusion.inference.generate import TOKEN, generate
from sbora_diffusion.inference.image_file import Settings, save_numbered
from sbora_diffusion.inference.regions import Region, class_nouns, generate_regions, whole_scene
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base
from sbora_diffusion.studio.live_model import LiveModel, known_path
from sbora_diffusion.utils.errors import SboraError

T = TypeVar("T")

log = logging.getLogger(__name__)

DEFAULT_BASE = "emoji64"
BATCH = 4  # images drawn at once, after the first


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where things lie: the same places as on the command line."""

    adapters: Path = Path("adapters")
    outputs: Path = Path("outputs")
    runs: Path = Path("runs")
    concepts: Path = Path("concepts")
    evaluations: Path = Path("evaluations")


class Workshop:
    """The library and the model. Whoever draws waits for the one before.

    Args:
        bases: base models that may be chosen besides emoji64 and those of the concepts in the library.
        is_training: whether a training has the cores, too.
    """

    def __init__(
        self, folders: Folders, bases: tuple[str, ...] = (), is_training: Callable[[], bool] = lambda: False
    ) -> None:
        self.folders = folders
        self.library = Library(folders.adapters)
        self._bases = bases
        self._model = LiveModel(self.library, is_training)

    def bases(self) -> list[str]:
        """The base models that may be chosen."""
        return list(dict.fromkeys([DEFAULT_BASE, *self._bases, *(spec.base_id for spec in self._specs().values())]))

    def concepts(self, base: str) -> dict[str, Spec]:
        """The library's concepts of a base model, by name."""
        return {name: spec for name, spec in self._specs().items() if spec.base_id == base}

    def base_or_default(self, name: str) -> str:
        """A base model that is wanted, if it may be chosen here."""
        return name if name in self.bases() else DEFAULT_BASE

    def load(self, name: str) -> Adapter:
        """A concept of the library, which a name from the page cannot leave."""
        known_path(self.library, name)
        return self.library.load(name)

    def with_model(self, name: str, strengths: Mapping[str, float], work: Callable[[Base], T]) -> T:
        """What `work` makes of the base model with exactly these concepts in it, alone with it."""
        self._check_base(name)
        return self._model.run(name, strengths, work)

    def draw(self, settings: Settings, count: int) -> Iterator[list[Path]]:
        """Make images with seeds from `settings.seed` on; yields the files so far, first after one image."""
        if not settings.prompt.strip():
            raise SboraError("there is no prompt", "Write what the image should show, such as: a penguin at night")
        self._check_base(settings.base)
        self._check_tokens(settings)
        paths: list[Path] = []
        while len(paths) < count:
            size = min(BATCH, count - len(paths)) if paths else 1
            seeds = range(settings.seed + len(paths), settings.seed + len(paths) + size)
            drawing = partial(
                generate,
                prompts=[settings.prompt] * size,
                seeds=seeds,
                **settings.sampling,
            )
            images, precision = self.with_model(settings.base, settings.concepts, partial(_drawn, drawing))
            for seed, image in zip(seeds, images, strict=True):
                made = replace(settings, seed=seed, precision=precision)
                paths.append(save_numbered(image, self.folders.outputs, made))
            yield list(paths)

    def draw_regions(self, settings: Settings, regions: Sequence[Region], count: int) -> Iterator[list[Path]]:
        """The same with regions: live concepts, those that a prompt names or a region has, each in its own place.

        Every region is told of the whole scene.

        Args:
            settings: its strengths are used where a concept has one; it is written with those of all that act.
            regions: with the library's names of concepts.
        """
        self._check_base(settings.base)
        names = self._acting(settings, regions)
        adapters = {name: self.load(name) for name in names}
        strengths = {name: settings.concepts.get(name, 1.0) for name in names}
        settings = replace(settings, concepts=strengths, regions=tuple(region.text for region in regions))
        live = [replace(r, adapters=tuple(adapters[name].spec.name for name in r.adapters)) for r in regions]
        prompt, live = whole_scene(settings.prompt, live, class_nouns(adapters.values()))
        paths: list[Path] = []
        for seed in range(settings.seed, settings.seed + count):
            drawing = partial(
                generate_regions,
                prompt=prompt,
                regions=live,
                adapters=list(adapters.values()),
                seeds=[seed],
                strengths=list(strengths.values()),
                **settings.sampling,
            )
            (image,), precision = self.with_model(settings.base, {}, partial(_drawn, drawing))
            made = replace(settings, seed=seed, precision=precision)
            paths.append(save_numbered(image, self.folders.outputs, made))
            yield list(paths)

    def tokens(self, base: str) -> dict[str, str]:
        """Which concept brings a token; merges, whose concepts cannot be told apart, are left out."""
        return {token: name for name, spec in self.singles(base).items() for token in spec.tokens}

    def singles(self, base: str) -> dict[str, Spec]:
        """The concepts that are no merges, by name."""
        return {name: spec for name, spec in self.concepts(base).items() if not spec.parents}

    def warm_up(self) -> None:
        """Load the default base model and draw once, so that the first click does not pay for it."""
        try:
            self.with_model(DEFAULT_BASE, {}, partial(generate, prompts=["a penguin"], seeds=[0], steps=1))
        except SboraError as defect:
            log.warning("%s", defect)

    def _specs(self) -> dict[str, Spec]:
        specs = {}
        for name in self.library.names():
            try:
                specs[name] = read_spec(self.library.path(name))
            except SboraError as defect:
                log.warning("%s", defect)
        return specs

    def _check_base(self, name: str) -> None:
        if name not in self.bases():
            raise SboraError(f"got the base model {name!r}, expected one of {', '.join(self.bases())}")

    def _acting(self, settings: Settings, regions: Sequence[Region]) -> list[str]:
        """The concepts that act somewhere: named by a token, or given to a region."""
        owners = self.tokens(settings.base)
        said = {token for text in (settings.prompt, *(r.prompt for r in regions)) for token in TOKEN.findall(text)}
        if missing := sorted(said - owners.keys()):
            raise _untaught(settings.base, missing[0], owners)
        return sorted({owners[token] for token in said}.union(*(region.adapters for region in regions)))

    def _check_tokens(self, settings: Settings) -> None:
        """Says which concept to switch on for a token that nobody brings."""
        specs = self.concepts(settings.base)
        brought = {token for name in settings.concepts if name in specs for token in specs[name].tokens}
        for token in TOKEN.findall(settings.prompt):
            owners = [name for name, spec in specs.items() if token in spec.tokens]
            if token not in brought and owners:
                raise SboraError(
                    f"the prompt says {token}, but its concept is off", f"Switch on {' or '.join(owners)}."
                )
            if token not in brought:
                raise _untaught(settings.base, token, [token for spec in specs.values() for token in spec.tokens])


def _untaught(base: str, token: str, known: Iterable[str]) -> SboraError:
    told = ", ".join(dict.fromkeys(known)) or "none"
    return SboraError(f"nobody has taught {base} the token {token} (known: {told})", "Train it first.")


def _drawn(drawing: Callable[[Base], Sequence[Image.Image]], base: Base) -> tuple[Sequence[Image.Image], str]:
    """Images, and the precision that they were drawn in."""
    return drawing(base), base.precision
