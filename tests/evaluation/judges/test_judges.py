"""Judges give the embeddings of the model itself, and errors for what is no judge."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from sbora_diffusion.evaluation.judges import clip, load_judge
from sbora_diffusion.evaluation.judges.base import BATCH
from sbora_diffusion.evaluation.judges.clip import load as load_encoder
from sbora_diffusion.evaluation.judges.clip import preprocess
from sbora_diffusion.evaluation.judges.vision import load as load_vision
from sbora_diffusion.utils.errors import SboraError

SIZE, LENGTH = 16, 12
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH, pad_token=END, unk_token=END)


def tiny_clip(end: int | None = None) -> CLIPModel:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(tiny_tokenizer())
    end = vocabulary - 1 if end is None else end
    text: dict[str, Any] = {"vocab_size": vocabulary, "max_position_embeddings": LENGTH, "eos_token_id": end}
    vision: dict[str, Any] = {"image_size": SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))  # far from the initial values, which embed everything alike
    return model.eval()


def save_clip(folder: Path, model: CLIPModel) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"), tiny_clip())


def image(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(images: list[Image.Image]) -> Tensor:
    """Images of the right size, as the model sees them, value by value."""
    values = np.stack([(np.asarray(p) / 255 - np.array(MEAN)) / np.array(STD) for p in images])
    return torch.from_numpy(values.transpose(0, 3, 1, 2)).float()


def test_images_are_the_models_own_embeddings(clip_folder: str) -> None:
    images = [image(seed) for seed in range(3)]
    embeddings = load_encoder(clip_folder).images(images)
    with torch.no_grad():
        expected = tiny_clip()(input_ids=torch.tensor([[1]]), pixel_values=normalised(images)).image_embeds
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-6)
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (3, 8))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    assert (embeddings @ embeddings.T).fill_diagonal_(0).max() < 0.99  # the test could tell


def test_texts_are_the_models_own_embeddings(clip_folder: str) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    bytewise = {"dog": ["d", "o", "g</w>"], "A cat": ["a</w>", "c", "a", "t</w>"]}
    embeddings = load_encoder(clip_folder).texts(list(bytewise))
    for embedding, tokens in zip(embeddings, bytewise.values(), strict=True):
        ids = torch.tensor([[vocabulary[token] for token in (START, *tokens, END)]])
        with torch.no_grad():
            expected = tiny_clip()(input_ids=ids, pixel_values=torch.zeros(1, 3, SIZE, SIZE)).text_embeds[0]
        torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-6)
    assert embeddings[0] @ embeddings[1] < 0.99


def test_a_long_text_is_cut(clip_folder: str) -> None:
    first, same = load_encoder(clip_folder).texts(["abcdefghij" + "x" * 90, "abcdefghijxyz"])
    torch.testing.assert_close(first, same, rtol=0, atol=1e-6)


def test_batches_change_nothing(clip_folder: str) -> None:
    encoder = load_encoder(clip_folder)
    images = [image(seed, 20 + seed) for seed in range(BATCH + 3)]
    texts = ["x" * (seed % 9 + 1) for seed in range(BATCH + 3)]
    alone = torch.cat([encoder.images([each]) for each in images])
    torch.testing.assert_close(encoder.images(images), alone, rtol=0, atol=2e-6)
    alone = torch.cat([encoder.texts([each]) for each in texts])
    torch.testing.assert_close(encoder.texts(texts), alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("longer", "offset"), [(16, 0), (17, 0), (18, 1), (19, 2), (20, 2), (21, 2), (23, 4)])
def test_preprocessing_cuts_the_central_square(longer: int, offset: int) -> None:
    """As torchvision rounds: halves to the even neighbour."""
    wide = image(0, width=longer)
    square = wide.crop((offset, 0, offset + SIZE, SIZE))
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    expected = normalised([square])
    torch.testing.assert_close(preprocess([wide], SIZE, MEAN, STD), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(preprocess([tall], SIZE, MEAN, STD), expected.mT, rtol=0, atol=1e-6)


def test_preprocessing_scales_the_short_side_without_aliasing() -> None:
    board = np.indices((160, 240)).sum(0) % 2 * 255
    half_red = np.zeros((160, 240, 3), dtype=np.uint8)
    half_red[..., 0], half_red[:, 120:, 1] = board, 255
    pixels = preprocess([Image.fromarray(half_red)], SIZE, [0, 0, 0], [1, 1, 1])[0]
    torch.testing.assert_close(pixels[0], torch.full((SIZE, SIZE), 0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(pixels[1, :, :6], torch.zeros(SIZE, 6), rtol=0, atol=0.01)
    torch.testing.assert_close(pixels[1, :, -6:], torch.ones(SIZE, 6), rtol=0, atol=0.01)


def test_grey_images_and_palettes_are_read_as_rgb(clip_folder: str) -> None:
    grey = image(0, 20, 30).convert("L")
    encoder = load_encoder(clip_folder)
    torch.testing.assert_close(encoder.images([grey]), encoder.images([grey.convert("RGB")]), rtol=0, atol=0)


def test_the_digest_is_of_names_shapes_and_values(clip_folder: str, tmp_path: Path) -> None:
    encoder = load_encoder(clip_folder)
    expected = hashlib.sha256()
    for name, weight in sorted(tiny_clip().state_dict().items()):
        expected.update(f"{name} {tuple(weight.shape)}".encode() + weight.numpy().astype("<f4").tobytes())
    assert (encoder.id, encoder.weights) == (clip_folder, expected.hexdigest()[:16])
    changed = tiny_clip()
    changed.logit_scale.data += 1
    assert load_encoder(save_clip(tmp_path / "changed", changed)).weights != encoder.weights
    half = load_encoder(save_clip(tmp_path / "half", tiny_clip().half()))
    assert half.weights == load_encoder(save_clip(tmp_path / "again", tiny_clip().half().float())).weights
    assert half.images([image(0)]).dtype == torch.float32


def test_vit_gives_its_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIZE, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False).eval()  # as DINO's checkpoints are
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    vision = load_vision(str(tmp_path))
    images = [image(0), image(1)]
    with torch.no_grad():
        hidden = model(pixel_values=normalised(images)).last_hidden_state
    torch.testing.assert_close(vision.images(images), F.normalize(hidden[:, 0], dim=-1), rtol=0, atol=1e-6)
    assert vision.id == str(tmp_path)
    assert vision.weights == load_vision(str(tmp_path)).weights  # the pooler, random each time, does not count


def test_a_model_without_class_token_gives_its_pooler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic")).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    ).save_pretrained(tmp_path)
    with torch.no_grad():
        maps = model(pixel_values=normalised([image(0)])).last_hidden_state  # (1, 8, height, width)
    expected = F.normalize(maps.mean((2, 3)), dim=-1)
    torch.testing.assert_close(load_vision(str(tmp_path)).images([image(0)]), expected, rtol=0, atol=1e-6)


def test_what_is_no_vision_model(clip_folder: str, tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="has a text encoder too"):
        load_vision(clip_folder)
    with pytest.raises(SboraError, match="could not load encoder") as caught:
        load_vision(str(tmp_path))
    assert "vision model" in str(caught.value.hint)


def test_what_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match=re.escape(f"could not load encoder {str(tmp_path)!r}")) as caught:
        load_encoder(str(tmp_path))
    assert "emoji-clip" in str(caught.value.hint)
    save_clip(tmp_path, tiny_clip())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SboraError, match="could not load encoder"):
        load_encoder(str(tmp_path))


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path, tiny_clip())
    tiny_clip().vision_model.save_pretrained(tmp_path)
    tiny_clip().config.save_pretrained(tmp_path)
    with pytest.raises(SboraError, match=r"\d+ weights are missing, such as"):
        load_encoder(str(tmp_path))


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="ends a text with token 7, its tokenizer with 513"):
        load_encoder(save_clip(tmp_path, tiny_clip(end=7)))


def test_older_configurations_name_no_end(clip_folder: str, tmp_path: Path) -> None:
    """As OpenAI's published one: the end is then the largest id of a text."""
    older = load_encoder(save_clip(tmp_path, tiny_clip(end=2)))
    assert torch.equal(older.texts(["dog", "A cat"]), load_encoder(clip_folder).texts(["dog", "A cat"]))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path, tiny_clip())
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(SboraError):
        load_encoder(str(tmp_path))


def test_emoji_clip_comes_with_the_package(clip_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "files", lambda package: tmp_path / package)
    with pytest.raises(SboraError, match="emoji-clip weights are missing from this installation"):
        load_encoder("emoji-clip")
    save_clip(tmp_path / "sbora_diffusion" / "emoji" / "clip", tiny_clip())
    encoder = load_encoder("emoji-clip")
    assert (encoder.id, encoder.weights) == ("emoji-clip", load_encoder(clip_folder).weights)


@pytest.mark.parametrize("name", ["open_clip:", "open_clip:ViT-B-32", "open_clip:ViT-B-32/", "open_clip:/openai"])
def test_open_clip_needs_name_and_weights(name: str) -> None:
    with pytest.raises(SboraError, match="expected open_clip:NAME/PRETRAINED"):
        load_judge(name)


def test_open_clip_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SboraError, match="open_clip is not installed") as caught:
        load_judge("open_clip:ViT-B-32/openai")
    assert 'pip install "sbora-diffusion[clip]"' in str(caught.value.hint)


def test_open_clip_beside_a_torchvision_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open_clip.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SboraError, match="torchvision::nms") as caught:
        load_judge("open_clip:ViT-B-32/openai")
    assert "torchvision that was built for this torch" in str(caught.value.hint)
