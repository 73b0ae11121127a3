"""The embedded base model's networks in diffusers' Stable Diffusion format, and the folder that ships with the package.

One command: `python -m tools.emoji.model [--data DIR] [--out DIR]` turns a checkpoint into that folder.
"""

# diffusers' annotations are too wide, or wrong:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

from tools.emoji import loop
from tools.emoji.art import default_data_dir
from tools.emoji.tokenizer import LENGTH, forget_origin
from tools.emoji.vae import LATENT_CHANNELS

log = logging.getLogger(__name__)

TEXT_WIDTH = 192
PACKAGED = Path(__file__).parents[2] / "sbora_diffusion" / "emoji"
WEIGHTS = PACKAGED / "weights"


def new_unet() -> UNet2DConditionModel:
    """Build the U-Net: cross-attention at 16 x 16, 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )


@torch.no_grad()
def warm_start(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy what agrees in name and shape from another U-Net; new attention starts as the identity.

    Returns:
        Names of the parameters that were not copied.
    """
    own = unet.state_dict()
    new = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    unet.load_state_dict({name: weights[name] for name in own if name not in new}, strict=False)
    for name, module in unet.named_modules():
        if name.endswith(".proj_out") and f"{name}.weight" in new:
            module.weight.zero_()
            module.bias.zero_()
    return new


def new_text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """A 4-layer CLIP text model whose embeddings are wide enough to tell nouns apart from the first step."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    torch.nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.5)
    torch.nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.2)
    return encoder


def new_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR and trailing steps (Lin et al. 2024, arXiv:2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def assemble(data: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> StableDiffusionPipeline:
    """Build a pipeline of these networks and the data folder's autoencoder and tokenizer."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(data / "vae").eval(),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(data / "tokenizer"),
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Write the averaged weights of DATA/base.pt as an fp16 diffusers pipeline folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, default=default_data_dir())
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    state = loop.load_state(args.data / "base.pt")
    if state is None:
        parser.error(f"no checkpoint in {args.data}: run python -m tools.emoji.pretrain first")
    tokenizer = CLIPTokenizer.from_pretrained(args.data / "tokenizer")
    networks = torch.nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    networks.load_state_dict(state["average"])
    pipeline = assemble(args.data, networks["unet"], networks["text_encoder"]).to(torch.float16)
    pipeline.save_pretrained(args.out, safe_serialization=True)
    forget_origin(args.out / "tokenizer")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    log.info("step %d -> %s, %.1f MB", state["step"], args.out, size / 1e6)


if __name__ == "__main__":
    main()
