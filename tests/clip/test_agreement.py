"""One and the same checkpoint, read by transformers and by open_clip, gives the same embeddings to 1e-4."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip  # pyright: ignore[reportMissingImports]
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sbora_diffusion.evaluation.judges import load_judge
from sbora_diffusion.evaluation.judges.clip import Encoder, preprocess
from sbora_diffusion.utils.errors import SboraError

SIZE, PATCH, WIDTH, HEADS, LAYERS, JOINT = 32, 8, 32, 2, 2, 16
START, END = "<|startoftext|>", "<|endoftext|>"
SIZES = [(32, 32), (33, 32), (35, 32), (32, 39), (64, 64), (45, 61), (100, 33), (201, 131), (20, 31), (16, 16)]
TEXTS = [
    "a photo of a dog",
    "A photo depicts  a DOG, near the Eiffel tower!",
    "two cats' 3d cartoon; it's 12:30 — déjà vu",
    " ".join(["a very long prompt about a penguin on the beach"] * 20),
    "🦊",
    "",
]


def architecture(quick_gelu: bool) -> str:
    return "tiny-quickgelu" if quick_gelu else "tiny"


def register(folder: Path, quick_gelu: bool) -> None:
    """Make a tiny architecture known to open_clip."""
    text = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    vision = {
        "image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "head_width": WIDTH // HEADS, "layers": LAYERS
    }  # fmt: skip
    config = {"embed_dim": JOINT, "quick_gelu": quick_gelu, "text_cfg": text, "vision_cfg": vision}
    path = folder / f"{architecture(quick_gelu)}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)


def random_state(quick_gelu: bool) -> dict[str, Tensor]:
    """Weights of open_clip's model, far enough from its initial values that inputs are told apart."""
    torch.manual_seed(0)
    model = open_clip.create_model(architecture(quick_gelu))
    return {key: weight + 0.15 * torch.randn_like(weight) for key, weight in model.state_dict().items()}


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layouts to those of transformers' CLIPModel."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for kind in ("weight", "bias"):
        renamed |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items()}
        for number in range(LAYERS):
            renamed |= _layer(state, f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}", kind)
            renamed |= _layer(
                state, f"visual.transformer.resblocks.{number}", f"vision_model.encoder.layers.{number}", kind
            )
    return {key: weight.contiguous() for key, weight in renamed.items()}


def _layer(state: dict[str, Tensor], old: str, new: str, kind: str) -> dict[str, Tensor]:
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed = {f"{new}.{theirs}.{kind}": state[f"{old}.{ours}.{kind}"] for ours, theirs in parts.items()}
    joint = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
    return renamed | {f"{new}.self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", joint, strict=True)}


def save_transformers(folder: Path, state: dict[str, Tensor], quick_gelu: bool) -> str:
    both: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
    }
    text = both | {"eos_token_id": 49407}
    vision = both | {"image_size": SIZE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT))
    model.load_state_dict(to_transformers(state))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)  # OpenAI's mean and standard deviation
    return str(folder)


def _tokenizer() -> CLIPTokenizer:
    """CLIP's own vocabulary, which open_clip ships."""
    simple: Any = open_clip.SimpleTokenizer()
    vocabulary: dict[str, int] = dict(simple.encoder)
    vocabulary[START] = vocabulary.pop("<start_of_text>")
    vocabulary[END] = vocabulary.pop("<end_of_text>")
    merges: Any = list(simple.bpe_ranks)  # a list of pairs, whatever the annotation of CLIPTokenizer says
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=END, unk_token=END)


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Encoder]:
    """The checkpoint as transformers and as open_clip read it."""
    folder = tmp_path_factory.mktemp("clip")
    register(folder, request.param)
    state = random_state(request.param)
    torch.save(state, folder / "tiny.pt")
    ours = load_judge(save_transformers(folder / "transformers", state, request.param))
    theirs = load_judge(f"open_clip:{architecture(request.param)}/{folder / 'tiny.pt'}")
    assert isinstance(ours, Encoder)
    assert isinstance(theirs, Encoder)
    return ours, theirs


def images() -> list[Image.Image]:
    """Noise with a colour of its own, of every size in `SIZES`."""
    generator = np.random.default_rng(0)
    noise = (generator.random((height, width, 3)) * generator.random(3) * 255 for width, height in SIZES)
    return [Image.fromarray(values.astype(np.uint8)) for values in noise]


def test_images_agree(pair: tuple[Encoder, Encoder]) -> None:
    ours, theirs = (encoder.images(images()) for encoder in pair)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert told_apart(ours)


def test_texts_agree(pair: tuple[Encoder, Encoder]) -> None:
    ours, theirs = (encoder.texts(TEXTS) for encoder in pair)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert told_apart(ours)


def told_apart(embeddings: Tensor) -> bool:
    """Whether a mixed-up row would have been noticed."""
    return bool((torch.pdist(embeddings) > 0.01).all())


@pytest.mark.parametrize("size", [32, 224])
def test_preprocessing_is_open_clips_own(size: int) -> None:
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform: Any = open_clip.image_transform(size, is_train=False, mean=mean, std=std)
    for image in images():
        assert_close(preprocess([image], size, mean, std)[0], transform(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["open_clip:no-such-model/openai", "open_clip:ViT-B-32/no-such-weights"])
def test_what_open_clip_does_not_know(name: str) -> None:
    with pytest.raises(SboraError, match="could not load encoder") as caught:
        load_judge(name)
    assert "list_pretrained" in str(caught.value.hint)


def test_weights_of_the_other_activation_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OpenAI's were trained with QuickGELU; under plain ViT-B-32 open_clip only warns, and the numbers are off."""
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(tmp_path / "never read"))
    monkeypatch.setattr("open_clip.factory.load_checkpoint", lambda *_, **__: None)
    with pytest.raises(SboraError, match="QuickGELU mismatch"):
        load_judge("open_clip:ViT-B-32/openai")
