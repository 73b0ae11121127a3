"""Train the autoencoder: 128 x 128 images to 16 x 16 x 16 latents of zero mean and unit variance.

One command: `python -m tools.emoji.vae [--data DIR] [--steps N]`; run it again to resume.
"""

# diffusers' annotations are too wide, or wrong:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false, reportOperatorIssue=false

import copy
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tools.emoji import loop
from tools.emoji.art import WIDE_ART, load_art
from tools.emoji.compose import RESOLUTION, Composer, Variety, image_grid
from tools.emoji.optimizer import MuonAdamW

log = logging.getLogger(__name__)

COMMITTED = Path(__file__).parent / "checkpoints" / "vae.safetensors"  # what the denoiser is trained on
LATENT_CHANNELS = 16
CHANNELS = (24, 48, 96, 160)
POOL = 4096  # compositions that crops are taken from
UNSEEN = 128  # compositions of the report
MEASURED = 512  # compositions that latents are normalised on
FRESH = 4  # of them replaced a step
CROP = 64  # pixels of a crop's side
EQUIVARIANT = 0.25  # share of steps in which half-size latents must give half-size images
AVERAGE = 0.999  # decay of the averaged weights
EVERYTHING = Variety(tiers=99, size=(30, 56), shift=6, flip=0.5, pairs=0.4)


def new_vae() -> AutoencoderKL:
    """Build the autoencoder: 4.4M parameters, f = 8, no attention, because details are local."""
    levels = len(CHANNELS)
    vae = AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # start with a sharp posterior: log-variance -6 for every image
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6
    return vae.to(memory_format=torch.channels_last)


def committed_vae() -> AutoencoderKL:
    """Load the averaged weights that are in the repository, whose latents are normalised."""
    vae = new_vae()
    vae.load_state_dict(load_file(COMMITTED))
    return vae.eval()


def detail_weights(images: Tensor) -> Tensor:
    """Weigh pixels near edges more than flat ones: (n, 1, h, w), mean 1, up to about 4 times the sky's weight."""
    grey = images.mean(1, keepdim=True)
    edges = F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=3).abs(), (0, 1, 0, 0))
    near = F.avg_pool2d(F.max_pool2d(edges, 5, 1, 2), 3, 1, 1).clamp(max=0.5)
    weights = 1 + 6 * near
    return weights / weights.mean()


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, equivariant: bool) -> Tensor:
    """Weigh squared, absolute and gradient errors and the KL divergence of (n, 3, h, w) images in [-1, 1].

    Args:
        equivariant: add the error of half-size latents decoded against half-size images, which keeps latents smooth
            and easier to generate (EQ-VAE, Kouzelis et al. 2025, arXiv:2502.09509, eq. 6).
    """
    with loop.arithmetic(images.device.type):
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        difference = vae.decode(latents).sample.float() - images
        half = vae.decode(F.avg_pool2d(latents, 2)).sample.float() - F.avg_pool2d(images, 2) if equivariant else None
    weights = detail_weights(images)
    gradient = sum(difference.diff(dim=dim).abs().mean() for dim in (2, 3))
    error = 4 * (weights * difference.pow(2)).mean() + 0.25 * (weights * difference.abs()).mean() + 0.25 * gradient
    if half is not None:
        error = error + half.pow(2).mean() + 0.25 * half.abs().mean()
    return error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> tuple[float, Tensor]:
    """Measure the mean peak signal-to-noise ratio in dB over images; return the reconstructions, too."""
    rebuilt = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(16)])
    rebuilt = rebuilt.clamp(-1, 1)
    error = ((rebuilt - images) / 2).pow(2).mean((1, 2, 3))
    return float((-10 * error.log10()).mean()), rebuilt


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the 1 x 1 convolutions, so that `scaling_factor` is 1."""
    latents = torch.cat([vae.encode(part).latent_dist.sample() for part in images.split(16)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encode, decode, half = vae.quant_conv, vae.post_quant_conv, LATENT_CHANNELS
    encode.weight[:half] /= deviation.view(-1, 1, 1, 1)
    encode.bias[:half] = (encode.bias[:half] - mean) / deviation
    encode.bias[half:] -= 2 * deviation.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation.view(1, -1, 1, 1)


class Pool:
    """Composed images, (POOL, 3, 128, 128) uint8, of which a few are replaced at every step."""

    def __init__(self, composer: Composer) -> None:
        self._composer = composer
        self._images = torch.cat([self._compose(64) for _ in range(POOL // 64)])
        self._next = 0

    def _compose(self, count: int) -> Tensor:
        return ((self._composer.batch(count)[0] + 1) * 127.5).round().byte()

    def refresh(self, count: int = FRESH) -> None:
        """Replace the oldest images."""
        rows = torch.arange(self._next, self._next + count) % len(self._images)
        self._images[rows] = self._compose(count)
        self._next = (self._next + count) % len(self._images)

    def images(self, count: int) -> Tensor:
        """Choose (count, 3, 128, 128) float32 images in [-1, 1] at random."""
        return self._images[torch.randint(0, len(self._images), (count,))].float() / 127.5 - 1

    def crops(self, count: int, size: int = CROP) -> Tensor:
        """Cut one window from each of `count` images: of two random windows the one that shows more."""
        crops = []
        for image in self.images(count):
            offsets = torch.randint(0, RESOLUTION - size + 1, (2, 2)).tolist()
            windows = [image[:, top : top + size, left : left + size] for top, left in offsets]
            crops.append(max(windows, key=lambda window: float(window.diff(dim=2).abs().mean())))
        return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def concept_images(folder: Path) -> Tensor:
    """Load up to two images of each concept, (n, 3, 128, 128) in [-1, 1]: only looked at, never learned from."""
    images = []
    for path in sorted(folder.glob("*/images/[12].png")):
        image = Image.open(path).convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        images.append(pixels.view(RESOLUTION, RESOLUTION, 3).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(images)


def main() -> None:
    """Train the autoencoder on crops, then on whole images, and store its averaged weights as DATA/vae."""
    parser = loop.arguments(main.__doc__ or "", steps=40_000, batch=12, learning_rate=2e-3)
    parser.add_argument("--concepts", type=Path, default=Path("concepts"), help="concept folders to report on")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its default")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    vae = new_vae().train()
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = MuonAdamW(vae, args.learning_rate)
    checkpoint = args.data / "vae.pt"
    state = loop.load_state(checkpoint) or {"step": 0}
    if not state["step"] and COMMITTED.exists():
        for network in (vae, average):
            network.load_state_dict(load_file(COMMITTED))
        log.info("starting from %s", COMMITTED)
    if state["step"]:
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(args.seed + state["step"])
    art = load_art(args.data, WIDE_ART)
    pool = Pool(Composer(art, args.seed + state["step"], EVERYTHING))
    unseen = Composer(art, 10_000, EVERYTHING).batch(UNSEEN)[0]  # a seed that no training has
    concepts = concept_images(args.concepts)

    for step, _ in loop.count_steps(state["step"], args.steps, "vae"):
        whole = step > 0.9 * args.steps
        images = pool.images(args.batch // 4) if whole else pool.crops(args.batch)
        pool.refresh()
        optimizer.set_rate(loop.cosine(step, args.steps, warmup=50, hold=0.5))
        loss = reconstruction_loss(vae, images, bool(torch.rand(()) < EQUIVARIANT))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            rate = max(1 - AVERAGE, 9 / (10 + step))
            for kept, current in zip(average.parameters(), vae.parameters(), strict=True):
                kept.lerp_(current, rate)
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            report(args.data, step + 1, loss, average, unseen, concepts)
            parts = {"vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            loop.save_state(checkpoint, {"step": step + 1, **parts})
    normalise_latents(average, pool.images(MEASURED))
    log.info("final PSNR on unseen compositions: %.2f dB", psnr(average, unseen)[0])
    average.save_pretrained(args.data / "vae")


def report(data: Path, step: int, loss: Tensor, vae: AutoencoderKL, unseen: Tensor, concepts: Tensor) -> None:
    """Log the averaged weights' PSNR on unseen compositions and on concepts; save a sheet of the latter."""
    (quality, _), (of_concepts, rebuilt) = psnr(vae, unseen), psnr(vae, concepts)
    log.info("step %d loss %.4f PSNR unseen %.2f dB, concepts %.2f dB", step, loss.item(), quality, of_concepts)
    sheet = torch.stack([concepts, rebuilt], 1).flatten(0, 1)
    loop.save_sheet(data / "samples" / f"vae-{step:06d}.png", image_grid(sheet, 16, 1))


if __name__ == "__main__":
    main()
