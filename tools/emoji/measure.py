"""How good emoji64 and its judge are: right subjects, styles and places, recall, and telling individuals apart.

One command: `python -m tools.emoji.measure [--data DIR] [--out FILE]` (2 CPU cores: about ten minutes). It
asks emoji64 for scenes that pre-training never composed (questions.py), shows them and really composed ones to
emoji-clip, and writes a JSON of all figures with a sheet of the images beside it.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.evaluation.judges.clip import Encoder
from sbora_diffusion.evaluation.judges.clip import load as load_encoder
from sbora_diffusion.evaluation.metrics import image_alignment, roc_auc
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.training.checkpoint import versions
from tools.emoji import loop
from tools.emoji.art import WIDE_ART, Art, default_data_dir, load_art
from tools.emoji.compose import SIDE, Plan, image_grid, render
from tools.emoji.questions import (
    SEED,
    VARIETY,
    canonical,
    everywhere,
    nouns_to_choose_from,
    plans_kept_for_tests,
    plans_of,
    plans_of_unseen_art,
    say,
)
from tools.emoji.world import load_world

log = logging.getLogger(__name__)

PAIRS, UNSEEN_PAIRS = 250, 100
BATCH = 32
HALVES = ((0, 20, 34, 54), (30, 20, 64, 54))  # left, top, right, bottom, in 64ths of the image's side


class Judgement:
    """Whether the judge, given everything else, picks the right word among all candidates.

    The subjects of a pair are looked at one by one, each in its half of the image, enlarged: in whole images
    emoji-clip finds both in 28 % of real pairs only, in halves in 80 %.
    """

    def __init__(self, encoder: Encoder, nouns: Sequence[str]) -> None:
        self._encoder, self._nouns = encoder, nouns
        self._known: dict[tuple[str, ...], Tensor] = {}

    def of(self, plans: Sequence[Plan], images: Sequence[Image.Image]) -> dict[str, list[bool]]:
        """For each plan: is the subject right (of two: both), the style, the place?"""
        embeddings = self._encoder.images(images)
        right: dict[str, list[bool]] = {"subject": [], "style": [], "place": []}
        for plan, image, embedding in zip(plans, images, embeddings, strict=True):
            views = embedding[None] if len(plan.subjects) == 1 else self._encoder.images(halves(image))
            found = [self._subject(plan, name, view) for name, view in zip(plan.subjects, views, strict=True)]
            right["subject"].append(all(found))
            world = load_world()
            styles = [say(plan.subjects, style, plan.place) for style in world.styles]
            right["style"].append(self._first(embedding, styles, list(world.styles).index(plan.style)))
            said = [say(plan.subjects, plan.style, place) for place in everywhere()]
            right["place"].append(self._first(embedding, said, everywhere().index(plan.place)))
        return right

    def _subject(self, plan: Plan, name: str, embedding: Tensor) -> bool:
        """The right noun, style and place given."""
        said = [say([noun], plan.style, plan.place) for noun in self._nouns]
        return self._first(embedding, said, self._nouns.index(name))

    def _first(self, embedding: Tensor, texts: Sequence[str], which: int) -> bool:
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._encoder.texts(texts)
        return int((self._known[key] @ embedding).argmax()) == which


def halves(image: Image.Image) -> list[Image.Image]:
    """What is left and what is right in an image of two subjects, as large as an image of one."""
    unit = image.width / SIDE
    return [
        image.resize(image.size, Image.Resampling.BICUBIC, (left * unit, top * unit, right * unit, bottom * unit))
        for left, top, right, bottom in HALVES
    ]


def images_of(base: Base, plans: Sequence[Plan]) -> list[Image.Image]:
    """One generated image a plan, with the plan's number as its seed."""
    images: list[Image.Image] = []
    for start in range(0, len(plans), BATCH):
        chunk = plans[start : start + BATCH]
        images += generate(base, [canonical(plan) for plan in chunk], seeds=range(start, start + len(chunk)))
        log.info("%d of %d images", len(images), len(plans))
    return images


def composed(plans: Sequence[Plan]) -> list[Image.Image]:
    """What the plans really look like."""
    pixels = ((render(plans) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


def share(right: Sequence[bool]) -> dict[str, float]:
    """Share, number of trials, and the Wilson 95 % interval."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def shares(singles: dict[str, list[bool]], pairs: dict[str, list[bool]]) -> dict[str, dict[str, float]]:
    """The four figures of a set of images; style and place over both kinds."""
    return {
        "subject": share(singles["subject"]),
        "both subjects of a pair": share(pairs["subject"]),
        "style": share(singles["style"] + pairs["style"]),
        "place": share(singles["place"] + pairs["place"]),
    }


def recall(encoder: Encoder, plans: Sequence[Plan]) -> dict[str, float]:
    """Retrieval among these plans' captions and images, R@1 and R@5 in both directions."""
    similar = encoder.images(composed(plans)) @ encoder.texts([canonical(plan) for plan in plans]).T
    found = {"n": float(len(plans))}
    for name, matrix in (("image to text", similar), ("text to image", similar.T)):
        rank = (matrix > matrix.diagonal()[:, None]).sum(1)
        found |= {f"{name} R@{k}": round((rank < k).float().mean().item(), 4) for k in (1, 5)}
    return found


def telling_apart(encoder: Encoder, wide: Art) -> dict[str, float]:
    """For each concept: ROC AUC of its own images against other individuals of its class.

    Scores are mean cosines to the concept's remaining images. Positives: each of its five images. Negatives: scenes
    of the class noun's other art and of its siblings (world.toml) in all four styles.
    """
    judge, found = load_world().judge, {}
    for subject in load_world().subjects:
        if not subject.is_concept:
            continue
        concept = load_concept(subject.name.replace(" ", "-"), default_roots())
        own = encoder.images([load_image(image.path) for image in concept.images])
        others = [subject.name, *(label.lower() for label in judge.siblings.get(subject.name, []))]
        keep = [(c.subject, c.style) for c in wide.cutouts if c.subject in others]
        keep = [pair for pair in keep if pair != (subject.name, "3d")]  # that one is the concept itself
        negatives = encoder.images(composed(plans_of(wide, keep, 60, VARIETY)))
        held = [image_alignment(own[[i]], torch.cat([own[:i], own[i + 1 :]])) for i in range(len(own))]
        found[concept.name] = round(roc_auc(torch.cat(held), image_alignment(negatives, own)), 4)
    return found | {"mean": round(sum(found.values()) / len(found), 4)}


def measure_judge(encoder: Encoder, wide: Art) -> dict[str, dict[str, float]]:
    """Every figure of the judge alone, on really composed images."""
    world = load_world()
    trained = [(c.subject, c.style) for c in wide.cutouts if not c.held_out]
    never = [(c.subject, c.style) for c in wide.cutouts if c.subject in world.judge.held_out]
    concepts = [(c.subject, c.style) for c in wide.cutouts if world.held_out(c.subject, c.style)]
    return {
        "500 scenes of known subjects": recall(encoder, plans_of(wide, trained, 500, VARIETY)),
        "500 scenes of 20 subjects never seen": recall(encoder, plans_of(wide, never, 500, VARIETY)),
        "400 scenes of the concepts' unseen art": recall(encoder, plans_of(wide, concepts, 400, VARIETY)),
        "same individual against others of its class, ROC AUC": telling_apart(encoder, wide),
    }


def measure_base(base: Base, encoder: Encoder, data: Path, sheet: Path) -> dict[str, dict[str, Any]]:
    """The shares of generated and, as the ceiling, of really composed images; draws some of the former."""
    art, found, shown = load_art(data), {}, list[Image.Image]()
    judgement = Judgement(encoder, nouns_to_choose_from(load_art(data, WIDE_ART)))
    for kind, (singles, pairs) in {
        "scenes kept for tests": plans_kept_for_tests(art, PAIRS),
        "scenes of unseen art": plans_of_unseen_art(art, UNSEEN_PAIRS),
    }.items():
        made, made_pairs = images_of(base, singles), images_of(base, pairs)
        found[kind] = {
            "generated": shares(judgement.of(singles, made), judgement.of(pairs, made_pairs)),
            "composed (the ceiling)": shares(
                judgement.of(singles, composed(singles)), judgement.of(pairs, composed(pairs))
            ),
        }
        shown += [*made[:: max(1, len(made) // 48)][:48], *made_pairs[:16]]
    side = base.resolution
    tensors = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(side, side, 3) for p in shown]
    loop.save_sheet(sheet, image_grid(torch.stack(tensors).permute(0, 3, 1, 2) / 127.5 - 1, 16))
    return found


def main() -> None:
    """Measure the packaged emoji64 and emoji-clip."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, default=default_data_dir())
    parser.add_argument("--out", type=Path, default=Path("eval/results/emoji64.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    base, encoder, wide = load_base("emoji64"), load_encoder("emoji-clip"), load_art(args.data, WIDE_ART)
    content = {
        "command": "python -m tools.emoji.measure",
        "seed": SEED,
        "sampling": {"steps": 20, "guidance": 3.0},
        "base": base.fingerprint,
        "judge": encoder.weights,
        "versions": versions(),
        "emoji-clip": measure_judge(encoder, wide),
        "emoji64": measure_base(base, encoder, args.data, args.out.with_suffix(".png")),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    log.info("%s", json.dumps({key: content[key] for key in ("emoji-clip", "emoji64")}, indent=1))


if __name__ == "__main__":
    main()
