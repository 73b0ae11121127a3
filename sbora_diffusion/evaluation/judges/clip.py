"""CLIP models: images and texts in one space, whose cosines are the published alignment scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sbora_diffusion.evaluation import metrics
from sbora_diffusion.evaluation.judges import base
from sbora_diffusion.evaluation.judges.base import Images, Metric, References, Scores
from sbora_diffusion.utils.errors import SboraError

METRICS = {
    "text_mos": Metric(title="text (mos)", is_main=True, compared_as="Text", in_table=True),
    "text_cd": Metric(title="text (cd)", is_main=True),
    "text_cosine": Metric(title="text (cosine)"),
    "image": Metric(title="image", is_main=True, compared_as="Image", in_table=True),
    "image_mos": Metric(title="image (mos)"),
    "image_mos_first_reference": Metric(title="image (mos, first reference)"),
    "success": Metric(title="success", is_main=True, compared_as="Success"),
}
EMOJI_CLIP = "emoji-clip"
_LEGACY_EOS = 2  # in older CLIP configurations: not the end's id; transformers then looks for the largest id


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoder:
    """A CLIP-like model as a judge; `embed_images` and `embed_texts` embed one batch as (n, d)."""

    id: str
    weights: str
    embed_images: Callable[[Sequence[Image.Image]], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]
    kind: str = "encoder"
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)

    def images(self, images: Images) -> Tensor:
        """Return (n, d) float32 unit rows on the CPU, n > 0."""
        return base.unit_rows(self.embed_images, images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return (n, d) float32 unit rows on the CPU, n > 0; texts that are too long are truncated."""
        return base.unit_rows(self.embed_texts, texts)

    def prepare(self, references: References) -> "AlignmentScorer":
        """Embed every concept's reference images."""
        return AlignmentScorer(self, {concept: self.images(images) for concept, images in references.items()})


class AlignmentScorer:
    """Scores images by the published protocols (metrics.py).

    `success` is 1 where the image resembles the concept more than any other concept, except those that are to be in the
    same image; it is left out if there is no other. A merge that drops a concept, or generates a copy of another one,
    cannot score well on it.
    """

    def __init__(self, encoder: Encoder, references: Mapping[str, Tensor]) -> None:
        self.encoder = encoder
        self.references = references  # concept -> (m, d) unit rows

    def __call__(
        self, images: Images, prompts: Sequence[str], tokens: Mapping[str, str], shown: Sequence[str]
    ) -> dict[str, Scores]:
        """See `Scorer`; text metrics are the same for all of `shown`."""
        embedded = self.encoder.images(images)
        mos, cd = (self._texts([text(p, tokens) for p in prompts]) for text in (metrics.mos_text, metrics.cd_text))
        text: Scores = {
            "text_mos": metrics.text_alignment(embedded, mos),
            "text_cd": metrics.text_alignment(embedded, cd),
            "text_cosine": metrics.cosine(embedded, cd),
        }
        return {concept: text | self._resemblance(embedded, concept, shown) for concept in shown}

    def _resemblance(self, images: Tensor, concept: str, shown: Sequence[str]) -> Scores:
        own = self.references[concept]
        scores = {
            "image": metrics.image_alignment(images, own),
            "image_mos": metrics.mos_image_alignment(images, own),
            "image_mos_first_reference": metrics.mos_first_reference(images, own),
        }
        others = [references for name, references in self.references.items() if name not in shown]
        if others:
            scores["success"] = metrics.succeeds(metrics.class_rank(images, [own, *others]), 0).float()
        return scores

    def _texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (n, d); each distinct one only once, as prompts repeat with every seed."""
        distinct = list(dict.fromkeys(texts))
        return self.encoder.texts(distinct)[[distinct.index(text) for text in texts]]


def load(name: str) -> Encoder:
    """Load emoji-clip, or a CLIPModel of transformers by its folder or hub id."""
    folder = files("sbora_diffusion") / "emoji" / "clip" if name == EMOJI_CLIP else Path(name)
    if name == EMOJI_CLIP and not folder.is_dir():
        raise SboraError("the emoji-clip weights are missing from this installation", "reinstall the package")
    path = str(folder) if folder.is_dir() else name
    with base.load_errors(name, "give emoji-clip, a folder or hub id of a CLIPModel, or open_clip:NAME/PRETRAINED"):
        model, missing = base.load_pretrained(CLIPModel, path)
        base.check_complete(name, missing)
        tokenizer = CLIPTokenizer.from_pretrained(path)
        processor: Any = CLIPImageProcessorPil.from_pretrained(path)
    size, text = model.config.vision_config.image_size, model.config.text_config
    if text.eos_token_id not in (_LEGACY_EOS, tokenizer.eos_token_id):
        raise SboraError(
            f"{name!r} ends a text with token {text.eos_token_id}, its tokenizer with {tokenizer.eos_token_id}",
            "give the model its own tokenizer's files",
        )

    def embed_images(images: Sequence[Image.Image]) -> Tensor:
        pixels = preprocess(images, size, processor.image_mean, processor.image_std)
        return model.get_image_features(pixels.to(model.device)).pooler_output

    def embed_texts(texts: Sequence[str]) -> Tensor:
        length = text.max_position_embeddings
        ids = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt").input_ids
        return model.get_text_features(ids.to(model.device)).pooler_output

    return Encoder(id=name, weights=base.digest(model.state_dict()), embed_images=embed_images, embed_texts=embed_texts)


def preprocess(images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Apply CLIP's own preprocessing: the short side to `size`, bicubic, the central square, normalised by channel.

    Offsets are rounded as torchvision does, which CLIP was trained with; transformers' processors round down.
    `mean` and `std` are of the channels' values in [0, 1]. Returns (n, 3, size, size) float32.
    """
    pixels = np.stack([np.asarray(_central_square(image.convert("RGB"), size)) for image in images])
    channels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (channels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _central_square(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))
