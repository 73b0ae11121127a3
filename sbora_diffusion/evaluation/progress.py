"""Scores of a concept while it is being trained."""

from collections.abc import Callable

from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.judges.registry import load_judge
from sbora_diffusion.evaluation.metrics.alignment import overall
from sbora_diffusion.evaluation.run import quick_score
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.recipes.config import TrainConfig


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
