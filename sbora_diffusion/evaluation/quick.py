"""Score a concept that is applied to the base model at the moment, for example while it is trained."""

from collections.abc import Callable, Sequence

import torch

from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.images import reference_images
from sbora_diffusion.evaluation.judges import load_judge
from sbora_diffusion.evaluation.judges.base import Judge, prepare
from sbora_diffusion.evaluation.metrics import overall
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.recipes.config import TrainConfig

BATCH = 8  # images generated at once


def make_scorer(base: Base, concept: Concept, config: TrainConfig) -> Callable[[], dict[str, float]]:
    """Return a function that scores images of the preview prompts, with two seeds each, by `eval_encoder`."""
    encoder = load_judge(config.output.eval_encoder)
    prompts = [prompt.replace("{token}", concept.token) for prompt in config.output.preview_prompts]
    sampling = Sampling(steps=config.output.sampling_steps, guidance=config.output.guidance)

    def score() -> dict[str, float]:
        scores = quick_score(base, concept, encoder, prompts, (config.seed, config.seed + 1), sampling)
        kept = {"text": scores["text_cosine"], "image": scores["image"]}
        return kept | {"overall": overall(**kept)}

    return score


@torch.no_grad()
def quick_score(
    base: Base, concept: Concept, judge: Judge, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> dict[str, float]:
    """Return the mean of each of the judge's metrics, without those that need other concepts, such as success.

    Nothing is written, neither into the model nor to disk, and no global random number generator is used.

    Args:
        prompts: with the concept's token in them; an image of each is generated with every seed.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = []
    for start in range(0, len(jobs), BATCH):
        texts, each = zip(*jobs[start : start + BATCH], strict=True)
        images += generate(base, texts, seeds=each, **vars(sampling))
    scorer = prepare([judge], reference_images([concept]))
    tokens = {concept.token: concept.class_noun}
    scores = scorer(images, [prompt for prompt, _ in jobs], tokens, [concept.name])[concept.name]
    return {metric: values.mean().item() for metric, values in scores.items()}
