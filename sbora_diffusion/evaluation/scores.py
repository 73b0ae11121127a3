"""What a judge says of images, one by one: do they show what the prompt says, and whom of all the concepts?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.evaluation import alignment
from sbora_diffusion.evaluation.encoders import Encoder, ImageEncoder
from sbora_diffusion.utils.errors import SboraError

METRICS = {  # in the order of reports -> what tables call them
    "text_mos": "text (mos)",
    "text_cd": "text (cd)",
    "text_cosine": "text (cosine)",
    "image": "image",
    "image_mos": "image (mos)",
    "image_mos_first_reference": "image (mos, first reference)",
    "vision": "vision",
    "success": "success",
}
_CHUNK = 32  # images in memory at a time

Scores = dict[str, Tensor]  # metric -> (n,) float32, one number an image


@dataclass(frozen=True, eq=False, kw_only=True)
class Judge:
    """An encoder that has seen the references of every concept; with a vision model, that one too."""

    encoder: Encoder
    references: dict[str, Tensor]  # concept -> (m, d)
    vision: ImageEncoder | None
    vision_references: dict[str, Tensor]  # the same by the vision model, empty without one


def instruct(encoder: Encoder, references: Mapping[str, Sequence[Image.Image]], vision: ImageEncoder | None) -> Judge:
    """Show the judge every concept's reference images.

    Raises:
        SboraError: a concept without any.
    """
    for concept, images in references.items():
        if not images:
            raise SboraError(f"the concept {concept} has no reference images")
    return Judge(
        encoder=encoder,
        references={concept: encoder.images(list(images)) for concept, images in references.items()},
        vision=vision,
        vision_references={c: vision.images(list(images)) for c, images in references.items()} if vision else {},
    )


def reference_images(concepts: Iterable[Concept]) -> dict[str, list[Image.Image]]:
    """All images of each concept's folder, by the concept's name."""
    return {concept.name: [load_image(image.path) for image in concept.images] for concept in concepts}


def score(
    images: Iterable[Image.Image],
    prompts: Sequence[str],
    judge: Judge,
    tokens: Mapping[str, str],
    shown: Sequence[str],
) -> dict[str, Scores]:
    """Judge images by the published protocols (alignment.py), for each concept that they are to show.

    `success` is 1 where the image resembles the concept more than any other of the judge's concepts, except those
    that are to be in the same image; it is left out if there is no other. A merge that drops or copies a concept
    cannot do well on it.

    Args:
        images: n of them; few are in memory at a time if they come one by one.
        prompts: the n texts that they were made from.
        tokens: token -> class noun, for the tokens in the prompts.
        shown: the concepts that each image is to show.

    Returns:
        For each of `shown` its metrics, (n,) each; the text's are the same for all of them.
    """
    views, sights = _embed(images, judge)
    if len(views) != len(prompts) or not prompts:
        raise SboraError(f"got {len(views)} images and {len(prompts)} prompts, expected as many of both, at least one")
    texts = {how: _embed_texts(judge, [plain(p, tokens) for p in prompts]) for how, plain in _PLAIN.items()}
    text: Scores = {
        "text_mos": alignment.text_alignment(views, texts["mos"]),
        "text_cd": alignment.text_alignment(views, texts["cd"]),
        "text_cosine": alignment.cosine(views, texts["cd"]),
    }
    return {concept: text | _resemblance(views, sights, judge, concept, shown) for concept in shown}


_PLAIN = {"mos": alignment.mos_text, "cd": alignment.cd_text}


def _resemblance(views: Tensor, sights: Tensor | None, judge: Judge, concept: str, shown: Sequence[str]) -> Scores:
    own = judge.references[concept]
    scores = {
        "image": alignment.image_alignment(views, own),
        "image_mos": alignment.mos_image_alignment(views, own),
        "image_mos_first_reference": alignment.mos_first_reference(views, own),
    }
    if sights is not None:
        scores["vision"] = alignment.image_alignment(sights, judge.vision_references[concept])
    others = [references for name, references in judge.references.items() if name not in shown]
    if others:
        scores["success"] = alignment.succeeds(alignment.class_rank(views, [own, *others]), 0).float()
    return scores


def _embed(images: Iterable[Image.Image], judge: Judge) -> tuple[Tensor, Tensor | None]:
    """(n, d) by the encoder, and by the vision model if there is one."""
    remaining, views, sights = iter(images), [torch.empty(0)], []
    while chunk := list(islice(remaining, _CHUNK)):
        views.append(judge.encoder.images(chunk))
        if judge.vision:
            sights.append(judge.vision.images(chunk))
    return torch.cat(views[1:] or views), torch.cat(sights) if sights else None


def _embed_texts(judge: Judge, texts: Sequence[str]) -> Tensor:
    """(n, d); each distinct text is encoded once, for prompts repeat with every seed."""
    distinct = list(dict.fromkeys(texts))
    return judge.encoder.texts(distinct)[[distinct.index(text) for text in texts]]
