"""A CLIP with random weights and emoji64's tokenizer, for what must be loaded by the real code."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

TOKENIZER = Path(__file__).parents[1] / "sbora_diffusion/emoji/weights/tokenizer"


def save_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """16×16 pixels, embeddings of 8 numbers."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision: dict[str, Any] = {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))  # far from the initial values, which embed everything alike
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder
