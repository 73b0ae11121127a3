"""The interface of every judge, and what their loaders share."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.hub import cache_if_offline, why

T = TypeVar("T")

BATCH = 32

Images = Sequence[Image.Image]  # may decode each image only when it is accessed
References = Mapping[str, Images]  # concept -> its reference images
Scores = dict[str, Tensor]  # metric -> (n,) float32, one score for each image


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One score that a judge gives an image."""

    title: str  # heading of its column in an evaluation's tables
    is_main: bool = False  # whether the summary shows it
    compared_as: str = ""  # its heading in comparisons of methods; "" leaves it out there
    in_table: bool = False  # whether a comparison's main table shows it, besides the paired differences


class Scorer(Protocol):
    """Score images against the references that the judge was prepared with."""

    def __call__(
        self, images: Images, prompts: Sequence[str], tokens: Mapping[str, str], shown: Sequence[str], /
    ) -> dict[str, Scores]:
        """Return the scores of n > 0 images of n prompts for each concept in `shown`, names of the references.

        All of `shown` are to be in every image. `tokens`: token -> class noun, for the tokens in the prompts.
        """
        ...


class Judge(Protocol):
    """A model that scores images. A module of this package has a function `load(name) -> Judge`, and METRICS."""

    @property
    def kind(self) -> str: ...  # what reports call this kind of judge; an evaluation has one judge of a kind
    @property
    def id(self) -> str: ...  # the name that it was loaded by
    @property
    def weights(self) -> str: ...  # 16 hexadecimal digits of a digest of its weights
    @property
    def metrics(self) -> Mapping[str, Metric]: ...  # what it scores, in the order of tables

    def prepare(self, references: References, /) -> Scorer:
        """Look at every concept's reference images, of which there is at least one for each, and return a scorer."""
        ...


def prepare(judges: Sequence[Judge], references: References) -> Scorer:
    """Prepare judges of different kinds, and return a scorer that gives the scores of all of them.

    Raises:
        SboraError: a concept without reference images, two judges of one kind; by the scorer: not as many images as
            prompts, or none.
    """
    for concept, images in references.items():
        if not images:
            raise SboraError(f"the concept {concept} has no reference images")
    if len({judge.kind for judge in judges}) < len(judges):
        raise SboraError(f"got the judges {', '.join(judge.id for judge in judges)}, expected one of each kind")
    scorers = [judge.prepare(references) for judge in judges]

    def score(
        images: Images, prompts: Sequence[str], tokens: Mapping[str, str], shown: Sequence[str]
    ) -> dict[str, Scores]:
        if len(images) != len(prompts) or not prompts:
            got = f"got {len(images)} images and {len(prompts)} prompts"
            raise SboraError(f"{got}, expected one prompt for each image and at least one image")
        found = [scorer(images, prompts, tokens, shown) for scorer in scorers]
        return {concept: {k: v for scores in found for k, v in scores[concept].items()} for concept in shown}

    return score


@contextmanager
def load_errors(name: str, hint: str) -> Iterator[None]:
    """Raise whatever goes wrong while a judge is loaded as a one-line SboraError."""
    try:
        with cache_if_offline():
            yield
    except SboraError:
        raise
    except Exception as error:  # loaders of other people's files raise all kinds: OSError, KeyError, SafetensorError, …
        raise SboraError(f"could not load encoder {name!r}: {why(error, name)}", hint) from error


def load_pretrained(kind: Any, path: str) -> tuple[Any, set[str]]:
    """Load a transformers model for inference, and return it with the names of weights that its files lack."""
    model, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval().requires_grad_(False).to(default_device()), set(report["missing_keys"])


def check_complete(name: str, missing: set[str]) -> None:
    if missing:
        raise SboraError(
            f"{name!r} is incomplete: {len(missing)} weights are missing, such as {min(missing)}",
            "give the folder or hub id of a whole model",
        )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def digest(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of weights, with their names and shapes."""
    sha256 = hashlib.sha256()
    for key, weight in sorted(weights.items()):
        sha256.update(f"{key} {tuple(weight.shape)}".encode())
        sha256.update(weight.cpu().reshape(-1).numpy().data)
    return sha256.hexdigest()[:16]


@torch.no_grad()
def unit_rows(embed: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
    """Embed n > 0 items in batches of `BATCH`; return (n, d) float32 rows of norm 1 on the CPU."""
    batches = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    return F.normalize(torch.cat(batches).float(), dim=-1).cpu()
