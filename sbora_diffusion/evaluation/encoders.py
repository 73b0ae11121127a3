"""The judges: models that turn images and texts into embeddings whose cosines are the scores."""

import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.hub import cache_if_offline, why

T = TypeVar("T")

BATCH = 32
OPEN_CLIP = "open_clip:"
_LEGACY_EOS = 2  # in older CLIP configurations: not the end's id; transformers then looks for the largest id


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoder:
    """A CLIP-like model: images and texts in one space.

    Attributes:
        id: the name it was loaded by.
        weights: 16 hexadecimal digits of the SHA-256 of its weights, by name, in float32.
        embed_images, embed_texts: one batch to (n, d); what `images` and `texts` are made of.
    """

    id: str
    weights: str
    embed_images: Callable[[Sequence[Image.Image]], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d) float32 unit rows on the CPU, n > 0."""
        return _unit_rows(self.embed_images, images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) float32 unit rows on the CPU, n > 0; too long texts are cut."""
        return _unit_rows(self.embed_texts, texts)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageEncoder:
    """A model of images alone, such as DINO; attributes as of `Encoder`."""

    id: str
    weights: str
    embed_images: Callable[[Sequence[Image.Image]], Tensor]

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d) float32 unit rows on the CPU, n > 0."""
        return _unit_rows(self.embed_images, images)


def load_encoder(name: str) -> Encoder:
    """Load a CLIP model in float32, on the GPU if there is one.

    Args:
        name: "emoji-clip" (ships with the package), a folder or hub id of a transformers CLIPModel, or
            "open_clip:NAME/PRETRAINED" with a tag of open_clip or the path of a checkpoint.
    """
    if name.startswith(OPEN_CLIP):
        return _load_open_clip(name)
    folder = files("sbora_diffusion") / "emoji" / "clip" if name == "emoji-clip" else Path(name)
    if name == "emoji-clip" and not folder.is_dir():
        raise SboraError("the emoji-clip weights are not in this installation", "reinstall the package")
    with _explained(name, "give emoji-clip, a folder or hub id of a CLIPModel, or open_clip:NAME/PRETRAINED"):
        return _load_clip(name, str(folder) if folder.is_dir() else name)


def load_vision(name: str) -> ImageEncoder:
    """Load a vision model of transformers in float32: DINO, DINOv2 or any other that AutoModel knows.

    The embedding is the class token of the last hidden state where the model has one, else its pooler's output.

    Args:
        name: a folder or hub id.
    """
    with _explained(name, "give a folder or hub id of a transformers vision model, such as facebook/dino-vits16"):
        processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
        model, missing = _pretrained(AutoModel, name)
    if hasattr(model.config, "text_config"):
        raise SboraError(f"{name!r} reads texts too, expected a vision model", "load it as the encoder")
    has_class_token = any(key.endswith("cls_token") for key, _ in model.named_parameters())
    pooler = {key for key in missing if has_class_token and key.startswith("pooler.")}  # checkpoints leave it out
    _check_complete(name, missing - pooler)

    def embed_images(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        output = model(pixel_values=pixels.to(model.device))
        return output.last_hidden_state[:, 0] if has_class_token else output.pooler_output.flatten(1)

    weights = {key: weight for key, weight in model.state_dict().items() if key not in pooler}
    return ImageEncoder(id=name, weights=_digest(weights), embed_images=embed_images)


def preprocess(images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """CLIP's own preprocessing: the short side to `size`, bicubic, the central square, normalised by channel.

    Offsets are rounded as torchvision does, which CLIP was trained with; transformers' processors round down.

    Args:
        mean, std: of the channels' values in [0, 1].

    Returns:
        (n, 3, size, size) float32.
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


def _load_clip(name: str, path: str) -> Encoder:
    model, missing = _pretrained(CLIPModel, path)
    _check_complete(name, missing)
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

    return Encoder(id=name, weights=_digest(model.state_dict()), embed_images=embed_images, embed_texts=embed_texts)


def _load_open_clip(name: str) -> Encoder:
    architecture, _, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
    if not (architecture and pretrained):
        raise SboraError(f"got encoder {name!r}, expected open_clip:NAME/PRETRAINED", "name the weights too")
    open_clip = _import_open_clip()
    with (
        _explained(name, "take a pair that open_clip.list_pretrained() gives, or NAME and the path of a checkpoint"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", "QuickGELU mismatch")  # the wrong activation: numbers that mean nothing
        model, transform = open_clip.create_model_from_pretrained(architecture, pretrained=pretrained)
        tokenize = open_clip.get_tokenizer(architecture)
    device = _device()
    model.eval().requires_grad_(False).to(device)

    def embed_images(images: Sequence[Image.Image]) -> Tensor:
        return model.encode_image(torch.stack([transform(image) for image in images]).to(device))

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(texts)).to(device))

    return Encoder(id=name, weights=_digest(model.state_dict()), embed_images=embed_images, embed_texts=embed_texts)


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


@contextmanager
def _explained(name: str, hint: str) -> Iterator[None]:
    try:
        with cache_if_offline():
            yield
    except SboraError:
        raise
    except Exception as error:  # loaders of strangers' files raise all kinds: OSError, KeyError, SafetensorError, …
        raise SboraError(f"could not load encoder {name!r}: {why(error, name)}", hint) from error


def _pretrained(kind: Any, path: str) -> tuple[Any, set[str]]:
    """A transformers model ready for use, and the names of the weights that its files lack."""
    model, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval().requires_grad_(False).to(_device()), set(report["missing_keys"])


def _check_complete(name: str, missing: set[str]) -> None:
    if missing:
        raise SboraError(
            f"{name!r} is no complete encoder: it lacks {len(missing)} weights, such as {min(missing)}",
            "give the folder or hub id of a whole model",
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, weight in sorted(weights.items()):
        digest.update(f"{key} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().reshape(-1).numpy().data)
    return digest.hexdigest()[:16]


@torch.no_grad()
def _unit_rows(embed: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
    """(n, d): embedded in batches of `BATCH`, normalised."""
    batches = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    return F.normalize(torch.cat(batches).float(), dim=-1).cpu()
