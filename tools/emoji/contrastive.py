"""Train emoji-clip, the judge of emoji64's images: a small CLIPModel on composed scenes of 700 subjects.

One command: `python -m tools.emoji.contrastive [--data DIR] [--steps N]`; run it again to resume. At the
end the model is written in transformers' format to --out.
"""

# transformers' annotations are too wide, or wrong:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from tools.emoji import loop
from tools.emoji.art import WIDE_ART, Art, load_art
from tools.emoji.compose import RESOLUTION, Composer, Plan, Variety, places, render
from tools.emoji.model import PACKAGED
from tools.emoji.optimizer import MuonAdamW
from tools.emoji.phrases import paraphrase
from tools.emoji.tokenizer import LENGTH, forget_origin

log = logging.getLogger(__name__)

CLIP = PACKAGED / "clip"
VARIETY = Variety(tiers=99, size=(30, 56), shift=7, flip=0.5, pairs=0.0)
PAIRS = 0.4  # of a batch
IDENTITY = 0.5  # weight of the loss that tells individuals apart
TEMPERATURE = 0.1  # of that loss
UNSEEN = 500  # scenes that recall is measured on
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def new_clip(tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """5.4M parameters: 64 patches of 8 pixels and 24 tokens, both 192 wide, into 192 dimensions."""
    size = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 4, "projection_dim": 192}
    text = size | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = size | {"num_hidden_layers": 6, "image_size": RESOLUTION, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=192))
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.2)
    torch.nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.05)
    return model


@dataclass(frozen=True, eq=False)
class Batch:
    """Images (n, 3, 64, 64) in [-1, 1], what each says, and which cut-out it shows (-1: several)."""

    images: Tensor
    captions: list[str]
    individuals: Tensor


class Scenes:
    """Batches of composed scenes in which every word of a caption is needed to tell it from the others.

    Each single subject is there in two styles, both of them in the same two places; pairs come in rings of four, of one
    style and in one place, so that each subject of a pair is in two of them.
    """

    def __init__(self, art: Art, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.composer = Composer(art, seed, VARIETY)
        self._rng = Random(seed)
        self._tokenizer = tokenizer
        self._by_subject: dict[str, list[int]] = {}
        self._by_style: dict[str, list[int]] = {}
        for number, cutout in enumerate(self.composer.cutouts):
            self._by_subject.setdefault(cutout.subject, []).append(number)
            self._by_style.setdefault(cutout.style, []).append(number)

    def batch(self, count: int) -> Batch:
        """About `count` scenes."""
        pairs = [plan for _ in range(round(count * PAIRS / 4)) for plan in self._ring()]
        subjects = self._rng.sample(sorted(self._by_subject), (count - len(pairs)) // 4)
        singles = [view for subject in subjects for view in self._views(subject)]
        plans = [*(self.composer.plan_single(number, place) for number, place in singles), *pairs]
        individuals = torch.tensor([*(number for number, _ in singles), *[-1] * len(pairs)])
        return Batch(render(plans), [self.say(plan) for plan in plans], individuals)

    def _views(self, subject: str) -> list[tuple[int, str]]:
        """Cut-outs of a subject in two styles (some have only one) and places for them."""
        drawn = self._rng.sample(self._by_subject[subject], min(2, len(self._by_subject[subject])))
        common = _common([((subject,), self.composer.cutouts[number].style) for number in drawn])
        return [(number, place) for place in self._rng.sample(common, 2) for number in drawn]

    def _ring(self) -> list[Plan]:
        """Four pairs of four subjects, the right one of each the left one of the next."""
        style = self._rng.choice([style for style, drawn in sorted(self._by_style.items()) if len(drawn) >= 4])
        drawn = self._rng.sample(self._by_style[style], 4)
        pairs = list(zip(drawn, drawn[1:] + drawn[:1], strict=True))
        subjects = [tuple(self.composer.cutouts[number].subject for number in pair) for pair in pairs]
        common = _common([(names, style) for names in subjects])
        if not common:
            return self._ring()
        place = self._rng.choice(common)
        return [self.composer.plan_pair(left, right, place) for left, right in pairs]

    def say(self, plan: Plan) -> str:
        """Some caption of a scene."""
        return paraphrase(plan.subjects, plan.style, plan.place, self._rng)

    def ids(self, captions: list[str]) -> Tensor:
        """(len(captions), 24) int64."""
        return self._tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _common(scenes: Sequence[tuple[Sequence[str], str]]) -> list[str]:
    """The places in which all of these subjects, each in its style, may be composed for training."""
    allowed = [places(subjects, style, withheld=False) for subjects, style in scenes]
    return [place for place in allowed[0] if all(place in others for others in allowed[1:])]


def normalised(images: Tensor) -> Tensor:
    """[-1, 1] -> CLIP's normalisation."""
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / deviation


def embed(model: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (n, 192) of images and of texts."""
    with loop.arithmetic():
        images = model.visual_projection(model.vision_model(normalised(images)).pooler_output)
        texts = model.text_projection(model.text_model(ids).pooler_output)
    return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)


def contrastive_loss(images: Tensor, texts: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021, fig. 3); equal captions share the target."""
    target = (ids[:, None] == ids[None]).all(-1).float()
    target /= target.sum(1, keepdim=True)
    logits = scale.exp().clamp(max=100) * images @ texts.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def identity_loss(images: Tensor, individuals: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2): views of one cut-out close, all others away."""
    images, individuals = images[individuals >= 0], individuals[individuals >= 0]
    itself = torch.eye(len(images), dtype=torch.bool)
    logits = (images @ images.T / TEMPERATURE).masked_fill(itself, float("-inf"))
    same = (individuals[:, None] == individuals) & ~itself
    return -(logits.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def training_step(model: CLIPModel, optimizer: MuonAdamW, scenes: Scenes, count: int) -> Tensor:
    """One optimiser step; returns the loss."""
    batch = scenes.batch(count)
    ids = scenes.ids(batch.captions)
    images, texts = embed(model, batch.images, ids)
    loss = contrastive_loss(images, texts, ids, model.logit_scale)
    loss = loss + IDENTITY * identity_loss(images, batch.individuals)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def unseen_plans(composer: Composer, count: int) -> list[Plan]:
    """At most `count` scenes of one cut-out each, in combinations of subject, style and place kept for tests."""
    kept = [
        (number, place)
        for number, cutout in enumerate(composer.cutouts)
        for place in places([cutout.subject], cutout.style, withheld=True)
    ]
    return [composer.plan_single(number, place) for number, place in composer.rng.sample(kept, min(count, len(kept)))]


@torch.no_grad()
def recall(model: CLIPModel, scenes: Scenes, plans: list[Plan]) -> dict[str, float]:
    """Share of scenes whose own caption is the nearest, or among the five nearest, of all; and the other way round."""
    images, texts = embed(model, render(plans), scenes.ids([plan.caption for plan in plans]))
    similar = images @ texts.T
    right = {
        name: (matrix > matrix.diagonal()[:, None]).sum(1)
        for name, matrix in (("image_to_text", similar), ("text_to_image", similar.T))
    }
    return {f"{name}_r{k}": (rank < k).float().mean().item() for name, rank in right.items() for k in (1, 5)}


def save(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write an fp16 CLIPModel folder with its tokenizer and image processor."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    forget_origin(out)
    side = {"height": RESOLUTION, "width": RESOLUTION}
    CLIPImageProcessorPil(size={"shortest_edge": RESOLUTION}, crop_size=side).save_pretrained(out)


def main() -> None:
    """Train emoji-clip; checkpoints go to the data folder, the model to --out."""
    parser = loop.arguments(main.__doc__ or "", steps=1500, batch=192, learning_rate=1e-3)
    parser.add_argument("--out", type=Path, default=CLIP)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.data / "tokenizer")
    model = new_clip(tokenizer).train()
    optimizer = MuonAdamW(model, args.learning_rate)
    checkpoint = args.data / "clip.pt"
    state: dict[str, Any] = loop.load_state(checkpoint) or {"step": 0}
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    art = load_art(args.data, WIDE_ART)
    scenes = Scenes(art, tokenizer, args.seed + state["step"])
    losses: list[Tensor] = []
    for step, _ in loop.count_steps(state["step"], args.steps, "emoji-clip"):
        optimizer.set_rate(loop.cosine(step, args.steps, warmup=50))
        losses.append(training_step(model, optimizer, scenes, args.batch))
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            unseen = unseen_plans(Composer(art, 10_000 + step, VARIETY), UNSEEN)
            found = recall(model, scenes, unseen)
            shares = " ".join(f"{name} {share:.3f}" for name, share in found.items())
            log.info("step %d loss %.3f %s", step + 1, torch.stack(losses).mean(), shares)
            losses.clear()
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            loop.save_state(checkpoint, state)
    save(model.eval(), tokenizer, args.out)


if __name__ == "__main__":
    main()
