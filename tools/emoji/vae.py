"""Train emoji64's autoencoder: 64 x 64 images to 16 x 16 x 8 latents of zero mean and unit variance.

One command: `python -m tools.emoji.vae [--data DIR]`; run it again to resume.
"""

# diffusers' annotations are too wide, or wrong:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

import logging

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from tools.emoji import loop
from tools.emoji.art import load_art
from tools.emoji.compose import RESOLUTION, Composer, Variety, image_grid

log = logging.getLogger(__name__)

LATENT_CHANNELS = 8
POOL = 6000  # compositions that crops are taken from
EVERYTHING = Variety(tiers=99, size=(30, 56), shift=6, flip=0.5, pairs=0.4)


def new_vae() -> AutoencoderKL:
    """1.6M parameters, f = 4, no attention: 64-pixel images need no global context."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # start the posterior sharp: log-variance -6, whatever the image
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6
    return vae


def reconstruction_loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """L1 + 0.5 gradient L1 + 0.5 MSE + 1e-4 KL per latent value, for (n, 3, h, w) images in [-1, 1]."""
    with loop.arithmetic(images.device.type):
        posterior = vae.encode(images).latent_dist
        difference = vae.decode(posterior.sample()).sample.float() - images
    gradient = sum(difference.diff(dim=dim).abs().mean() for dim in (2, 3))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return difference.abs().mean() + 0.5 * gradient + 0.5 * difference.pow(2).mean() + 1e-4 * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> tuple[float, Tensor]:
    """Mean peak signal-to-noise ratio in dB over images, and the reconstructions."""
    rebuilt = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((rebuilt - images) / 2).pow(2).mean((1, 2, 3))
    return float((-10 * error.log10()).mean()), rebuilt


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the 1 x 1 convolutions, so that `scaling_factor` is 1."""
    latents = vae.encode(images).latent_dist.sample()
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode, decode, half = vae.quant_conv, vae.post_quant_conv, LATENT_CHANNELS
    encode.weight[:half] /= deviation.view(-1, 1, 1, 1)
    encode.bias[:half] = (encode.bias[:half] - mean) / deviation
    encode.bias[half:] -= 2 * deviation.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation.view(1, -1, 1, 1)


def _random_crops(images: Tensor, size: int) -> Tensor:
    top, left = (int(torch.randint(0, (RESOLUTION - size) // 4 + 1, ())) * 4 for _ in range(2))
    return images[..., top : top + size, left : left + size]


def main() -> None:
    """Train the autoencoder on random crops, then on whole images, and store it as DATA/vae."""
    parser = loop.arguments(main.__doc__ or "", steps=6000, batch=16, learning_rate=2e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.manual_seed(args.seed)
    composer = Composer(load_art(args.data), args.seed, EVERYTHING)
    pool = torch.cat([composer.batch(100)[0] for _ in range(POOL // 100)])
    unseen = Composer(load_art(args.data), args.seed + 1, EVERYTHING).batch(128)[0]

    vae = new_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = args.data / "vae.pt"
    state = loop.load_state(checkpoint) or {"step": 0}
    if state["step"]:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
    for step, progress in loop.count_steps(state["step"], args.steps, "vae"):
        whole = step > 0.9 * args.steps  # crops are three times faster at equal gain a step
        images = pool[torch.randint(0, len(pool), (args.batch // 3 if whole else args.batch,))]
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * loop.cosine(step, args.steps, warmup=30)
        loss = reconstruction_loss(vae, images if whole else _random_crops(images, 32))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            quality, rebuilt = psnr(vae, unseen)
            progress.console.print(f"step {step + 1} loss {loss.item():.4f} psnr {quality:.2f} dB")
            sheet = torch.cat([unseen[:16], rebuilt[:16]])
            loop.save_sheet(args.data / "samples" / f"vae-{step + 1:06d}.png", image_grid(sheet, 16))
            loop.save_state(
                checkpoint, {"step": step + 1, "vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            )
    vae.eval()
    normalise_latents(vae, pool[:512])
    log.info("final psnr on unseen compositions: %.2f dB", psnr(vae, unseen)[0])
    vae.save_pretrained(args.data / "vae")


if __name__ == "__main__":
    main()
