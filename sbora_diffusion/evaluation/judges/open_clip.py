"""open_clip's models as judges: "open_clip:NAME/PRETRAINED"."""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.evaluation.judges.base import default_device, digest, load_errors
from sbora_diffusion.evaluation.judges.clip import METRICS, Encoder
from sbora_diffusion.utils.errors import SboraError

__all__ = ["METRICS", "load"]


def load(name: str) -> Encoder:
    """Load "NAME/PRETRAINED", with a tag of open_clip or the path of a checkpoint."""
    architecture, _, pretrained = name.partition("/")
    full_name = f"open_clip:{name}"
    if not (architecture and pretrained):
        raise SboraError(f"got encoder {full_name!r}, expected open_clip:NAME/PRETRAINED", "name the weights too")
    open_clip = _import_open_clip()
    hint = "take a pair that open_clip.list_pretrained() gives, or NAME and the path of a checkpoint"
    with load_errors(full_name, hint), warnings.catch_warnings():
        warnings.filterwarnings("error", "QuickGELU mismatch")  # the wrong activation makes scores meaningless
        model, transform = open_clip.create_model_from_pretrained(architecture, pretrained=pretrained)
        tokenize = open_clip.get_tokenizer(architecture)
    device = default_device()
    model.eval().requires_grad_(False).to(device)

    def embed_images(images: Sequence[Image.Image]) -> Tensor:
        return model.encode_image(torch.stack([transform(image) for image in images]).to(device))

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(texts)).to(device))

    weights = digest(model.state_dict())
    return Encoder(id=full_name, weights=weights, embed_images=embed_images, embed_texts=embed_texts)


def _import_open_clip() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise SboraError(
            "open_clip is not installed", 'install it in an environment of its own: pip install "sbora-diffusion[clip]"'
        ) from error
    except RuntimeError as error:  # torchvision registers its compiled operators at import
        raise SboraError(
            f"open_clip cannot be imported: {error}", "install a torchvision that was built for this torch"
        ) from error
