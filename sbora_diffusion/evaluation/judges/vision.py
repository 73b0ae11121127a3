"""Vision models without text, such as DINO, as judges of image similarity: "vision:ID"."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from sbora_diffusion.evaluation.judges import base
from sbora_diffusion.evaluation.judges.base import Images, Metric, References, Scorer, Scores
from sbora_diffusion.evaluation.metrics import image_alignment
from sbora_diffusion.utils.errors import SboraError

METRICS = {"vision": Metric(title="vision", is_main=True, compared_as="Vision", in_table=True)}


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageEncoder:
    """A vision model as a judge; attributes as of `clip.Encoder`."""

    id: str
    weights: str
    embed_images: Callable[[Sequence[Image.Image]], Tensor]
    kind: str = "vision"
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)

    def images(self, images: Images) -> Tensor:
        """Return (n, d) float32 unit rows on the CPU, n > 0."""
        return base.unit_rows(self.embed_images, images)

    def prepare(self, references: References) -> Scorer:
        """Embed every concept's reference images."""
        embedded = {concept: self.images(images) for concept, images in references.items()}

        def score(
            images: Images, _prompts: Sequence[str], _tokens: Mapping[str, str], shown: Sequence[str]
        ) -> dict[str, Scores]:
            rows = self.images(images)
            return {concept: {"vision": image_alignment(rows, embedded[concept])} for concept in shown}

        return score


def load(name: str) -> ImageEncoder:
    """Load a vision model of transformers, by its folder or hub id: DINO, DINOv2 or any other that AutoModel knows.

    The embedding is the class token of the last hidden state where the model has one, else its pooler's output.
    """
    with base.load_errors(name, "give a folder or hub id of a transformers vision model, such as facebook/dino-vits16"):
        processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
        model, missing = base.load_pretrained(AutoModel, name)
    if hasattr(model.config, "text_config"):
        raise SboraError(f"{name!r} has a text encoder too, expected a vision model", "give it as the encoder")
    has_class_token = any(key.endswith("cls_token") for key, _ in model.named_parameters())
    pooler = {key for key in missing if has_class_token and key.startswith("pooler.")}  # checkpoints leave it out
    base.check_complete(name, missing - pooler)

    def embed_images(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        output = model(pixel_values=pixels.to(model.device))
        return output.last_hidden_state[:, 0] if has_class_token else output.pooler_output.flatten(1)

    weights = {key: weight for key, weight in model.state_dict().items() if key not in pooler}
    return ImageEncoder(id=name, weights=base.digest(weights), embed_images=embed_images)
