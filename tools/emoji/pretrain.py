"""Train the base model's denoiser and text encoder on composed scenes, widening the world as fast as nouns are bound.

One command: `python -m tools.emoji.pretrain [--data DIR] [--steps N]`; run it again to resume, with more
steps to go on. Each report prints the loss with right, swapped and empty nouns, and draws a sheet of samples.
"""

# diffusers' annotations are too wide, or wrong:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

import copy
import logging
import shutil
from argparse import Namespace
from collections import deque
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tools.emoji import loop, model
from tools.emoji.art import load_art
from tools.emoji.compose import Composer, Variety, image_grid, render
from tools.emoji.optimizer import MuonAdamW
from tools.emoji.vae import committed_vae
from tools.emoji.world import caption, load_world

log = logging.getLogger(__name__)

STAGES = (
    Variety(tiers=1),
    Variety(tiers=2),
    Variety(tiers=2, pairs=0.5, size=(46, 53), shift=2, styleless=0.1),
)
GATE = 0.12  # widen when swapping the noun costs this much loss at t = 850
POOL = 8_000  # latents kept; each is shown a handful of times before it is replaced
FRESH = 64  # latents replaced at once
REUSE = 12  # how often a latent is shown on average
AVERAGE_EVERY = 5  # steps between updates of the averaged weights, whose memory is 1000 steps
PROBES = 96  # images that the noun gap is measured on
SAMPLING_STEPS = 20
EMPTY = 0.1  # captions dropped for classifier-free guidance


class Latents:
    """A pool of encoded compositions that is slowly replaced by new ones."""

    def __init__(self, data: Path, seed: int) -> None:
        self._art = load_art(data)
        self._vae = AutoencoderKL.from_pretrained(data / "vae").eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
        self._seed = seed
        self._items: deque[tuple[Tensor, Tensor]] = deque(maxlen=POOL)

    def open(self, stage: int) -> None:
        """Compose from the given stage on, starting with half a pool of it."""
        self.composer = Composer(self._art, self._seed + 1000 * stage, STAGES[stage])
        for _ in range(POOL // 2 // FRESH):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Replace the oldest FRESH latents."""
        images, plans = self.composer.batch(FRESH)
        with loop.arithmetic():
            latents = self._vae.encode(images).latent_dist.sample()
        self._items.extend(zip(latents.half(), self.tokens([plan.caption for plan in plans]), strict=True))

    def tokens(self, captions: list[str]) -> Tensor:
        """(len(captions), 24) int64 token ids."""
        return self._tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids  # fmt: skip

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Random latents (count, channels, 16, 16) float32 and token ids (count, 24)."""
        chosen = [self._items[int(i)] for i in torch.randint(len(self._items), (count,))]
        return torch.stack([latent for latent, _ in chosen]).float(), torch.stack([ids for _, ids in chosen])

    @torch.no_grad()
    def probe(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh single-subject latents, their token ids, and the ids with the noun exchanged."""
        rng = Random(seed)
        nouns = sorted({cutout.subject for cutout in self.composer.cutouts})
        numbers = [rng.randrange(len(self.composer.cutouts)) for _ in range(count)]
        plans = [self.composer.plan_single(number) for number in numbers]
        others = [rng.choice([noun for noun in nouns if noun != plan.subjects[0]]) for plan in plans]
        swapped = [p.caption.replace(p.subjects[0], other) for p, other in zip(plans, others, strict=True)]
        latents = self._vae.encode(render(plans)).latent_dist.mode()
        return latents, self.tokens([plan.caption for plan in plans]), self.tokens(swapped)


class Diffusion:
    """The forward process of the shipped scheduler: noisy latents and v targets."""

    def __init__(self) -> None:
        kept = model.new_scheduler().alphas_cumprod.clamp(1e-8, 1)
        self.signal, self.noise = kept.sqrt(), (1 - kept).sqrt()

    def loss(self, networks: nn.ModuleDict, latents: Tensor, ids: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error on v (Salimans & Ho 2022, eq. 10); fp32 weights, products as in `loop.arithmetic`."""
        signal, amount = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        with loop.arithmetic():
            states = networks["text_encoder"](ids).last_hidden_state
            predicted = networks["unet"](signal * latents + amount * noise, t, states).sample
        return (predicted.float() - (signal * noise - amount * latents)).pow(2).mean()


@torch.no_grad()
def noun_gap(networks: nn.ModuleDict, latents: Latents, diffusion: Diffusion, seed: int) -> tuple[float, str]:
    """How much the loss at t = 850 rises when the noun is exchanged, and a line about several t."""
    truth, right, swapped = latents.probe(PROBES, seed)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    empty = latents.tokens([""]).expand_as(right)
    gaps, words = [], []
    for t in (850, 700, 500):
        losses = [
            diffusion.loss(networks, truth, ids, torch.full((PROBES,), t), noise).item()
            for ids in (right, swapped, empty)
        ]
        gaps.append(losses[1] - losses[0])
        words.append("t{} right {:.3f} swapped {:.3f} empty {:.3f}".format(t, *losses))
    return gaps[0], " | ".join(words)


def sample_sheet(data: Path, networks: nn.ModuleDict, tiers: int) -> Tensor:
    """32 images (32, 3, height, width) in [-1, 1]: 3d subjects in scenes, concept nouns in other styles, pairs."""
    world = load_world()
    open_subjects = [s for s in world.subjects if s.tier < tiers and not s.is_concept]
    places = [*world.scenes.values(), "on a yellow background"]
    step = max(1, len(open_subjects) // 22)
    prompts = [caption([s.name], "3d", places[i % 7]) for i, s in enumerate(open_subjects[::step][:22])]
    prompts += [caption([noun], "cartoon", "on the beach") for noun in ("dog", "cat", "penguin", "horse")]
    prompts += [
        caption(pair, "3d", place) for pair in (("owl", "red apple"), ("crown", "frog")) for place in places[1:4]
    ]
    pipeline = model.assemble(data, networks["unet"], networks["text_encoder"])
    generator = torch.Generator().manual_seed(0)
    with loop.arithmetic():
        images = pipeline(
            prompts, num_inference_steps=SAMPLING_STEPS, guidance_scale=3.0, generator=generator, output_type="pt"
        )
    return images.images.float() * 2 - 1


def training_step(
    networks: nn.ModuleDict, optimizer: MuonAdamW, diffusion: Diffusion, latents: Latents, batch: int
) -> Tensor:
    """One optimiser step on a batch of stratified timesteps; returns the loss."""
    truth, ids = latents.batch(batch)
    dropped = torch.rand(batch, 1) < EMPTY
    ids = torch.where(dropped, latents.tokens([""]), ids)
    t = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long().clamp(max=999)
    loss = diffusion.loss(networks, truth, ids, t, torch.randn_like(truth))
    loss.backward()
    nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def report(
    args: Namespace, step: int, average: nn.ModuleDict, latents: Latents, diffusion: Diffusion, stage: int
) -> float:
    """Print the noun gap, draw samples; returns the gap."""
    gap, line = noun_gap(average, latents, diffusion, seed=step)
    log.info("step %d stage %d gap %.3f | %s", step, stage, gap, line)
    sheet = sample_sheet(args.data, average, STAGES[stage].tiers)
    loop.save_sheet(args.data / "samples" / f"base-{step:06d}.png", image_grid(sheet, 8))
    return gap


class Trainee:
    """The networks in training, their averaged copy, the optimiser, and how far they are."""

    def __init__(self, tokenizer: CLIPTokenizer, learning_rate: float) -> None:
        self.networks = nn.ModuleDict({"unet": model.new_unet(), "text_encoder": model.new_text_encoder(tokenizer)})
        self.average = copy.deepcopy(self.networks).eval().requires_grad_(False)
        self.optimizer = MuonAdamW(self.networks, learning_rate)
        self.step = self.stage = 0

    def start_from_package(self) -> None:
        """Start from the packaged weights where shapes agree, at the last stage, with a new optimiser."""
        shipped = StableDiffusionPipeline.from_pretrained(model.WEIGHTS)
        for networks in (self.networks, self.average):
            new = model.warm_start(networks["unet"], shipped.unet.state_dict())
            networks["text_encoder"].load_state_dict(shipped.text_encoder.state_dict())
        log.info("not in the packaged weights: %s", ", ".join(new))
        self.stage = len(STAGES) - 1

    def load(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint."""
        self.step, self.stage = state["step"], state["stage"]
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def state(self) -> dict[str, Any]:
        """A checkpoint."""
        parts = {name: getattr(self, name).state_dict() for name in ("networks", "average", "optimizer")}
        return {"step": self.step, "stage": self.stage, **parts}

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights, faster at first."""
        rate = max(0.001 * AVERAGE_EVERY, 9 / (10 + self.step / AVERAGE_EVERY))
        for kept, current in zip(self.average.parameters(), self.networks.parameters(), strict=True):
            kept.lerp_(current, rate)


def main() -> None:
    """Train the denoiser and the text encoder; checkpoints and samples go to the data folder."""
    parser = loop.arguments(main.__doc__ or "", steps=16_000, batch=32, learning_rate=1e-3)
    parser.add_argument(
        "--from-package", action="store_true", help="without a checkpoint, start from the weights that ship"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.manual_seed(args.seed)
    if not (args.data / "vae").is_dir():
        committed_vae().save_pretrained(args.data / "vae")
    if args.from_package:  # whose embeddings are by these ids
        shutil.copytree(model.WEIGHTS / "tokenizer", args.data / "tokenizer", dirs_exist_ok=True)
    trainee = Trainee(CLIPTokenizer.from_pretrained(args.data / "tokenizer"), args.learning_rate)
    checkpoint = args.data / "base.pt"
    if stored := loop.load_state(checkpoint):
        trainee.load(stored)
    elif args.from_package:
        trainee.start_from_package()
    torch.manual_seed(args.seed + trainee.step)
    diffusion, latents = Diffusion(), Latents(args.data, args.seed + trainee.step)
    latents.open(trainee.stage)

    losses: list[Tensor] = []
    for step, _ in loop.count_steps(trainee.step, args.steps, "base"):
        trainee.optimizer.set_rate(loop.cosine(step, args.steps, warmup=100, hold=0.65))
        losses.append(training_step(trainee.networks, trainee.optimizer, diffusion, latents, args.batch))
        trainee.step = step + 1
        if step % AVERAGE_EVERY == 0:
            trainee.update_average()
        if step % (FRESH * REUSE // args.batch) == 0:
            latents.refresh()
        if trainee.step % args.report_every == 0 or trainee.step == args.steps:
            log.info("loss %.4f", torch.stack(losses).mean())
            losses.clear()
            gap = report(args, trainee.step, trainee.average, latents, diffusion, trainee.stage)
            if gap > GATE and trainee.stage + 1 < len(STAGES):
                trainee.stage += 1
                latents.open(trainee.stage)
            loop.save_state(checkpoint, trainee.state())


if __name__ == "__main__":
    main()
