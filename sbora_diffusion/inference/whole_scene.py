"""Regions that are told what else is in the image."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import TOKEN
from sbora_diffusion.inference.regions import Region
from sbora_diffusion.utils.text import say_plainly


def whole_scene(prompt: str, regions: Sequence[Region], nouns: Mapping[str, str]) -> tuple[str, list[Region]]:
    """The prompt and the regions', each saying all of the image; a concept is named in its own region only.

    "on the beach" with the regions "a <dog>" and "a <cat>" becomes "a dog and a cat on the beach" with "a <dog> and a
    cat on the beach" and "a dog and a <cat> on the beach": a model that hears of one subject in each half draws two
    large ones that run into each other (docs/regions.md).

    Args:
        prompt: what is said of the whole image; may be empty, and stays as it is in every region.
        nouns: the class noun of each token.
    """
    told = [_plainly(region.prompt, nouns) for region in regions]

    def scene(subjects: Sequence[str]) -> str:
        return " ".join([" and ".join(subjects), prompt]).strip()

    own = [scene([*told[:n], region.prompt, *told[n + 1 :]]) for n, region in enumerate(regions)]
    return scene(told), [replace(region, prompt=words) for region, words in zip(regions, own, strict=True)]


def _plainly(prompt: str, nouns: Mapping[str, str]) -> str:
    for token in set(TOKEN.findall(prompt)).intersection(nouns):
        prompt = say_plainly(prompt, token, nouns[token])
    return prompt


def class_nouns(adapters: Iterable[Adapter]) -> dict[str, str]:
    """The class noun of each token that these bring."""
    return {token: noun for adapter in adapters for token, noun in adapter.spec.tokens.items()}
