"""The losses of a training, from its settings."""

from sbora_diffusion.data.batches import Data
from sbora_diffusion.methods.live import InjectedConcept
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.losses.attention import AttentionLoss
from sbora_diffusion.training.losses.base import Loss, Objective, Recording, no_recording
from sbora_diffusion.training.losses.denoising import ClassImages, Denoising, PriorPreservation
from sbora_diffusion.training.losses.output_erasure import OutputErasure
from sbora_diffusion.training.losses.output_penalty import OutputPenalty
from sbora_diffusion.utils.errors import SboraError


def make_objectives(
    base: Base, live: InjectedConcept, data: Data, config: TrainConfig, num_processes: int
) -> tuple[list[Objective], Recording]:
    """Return the objectives in the order of their backward passes, and what to record of the concept's forward pass.

    Raises:
        SboraError: a loss on whole batches with several processes.
    """
    weights = config.loss
    on_concept: dict[str, Loss] = {
        "denoising": Denoising(weights.masked_loss),
        "prior": PriorPreservation(weights.prior_weight, own_pass=False),
    }
    others: dict[str, Loss] = {
        "prior_own_pass": PriorPreservation(weights.prior_weight, own_pass=True),
        "class_images": ClassImages(weights.class_weight),
    }
    if data.moments:
        others["output_penalty"] = OutputPenalty(base, live.layers, data.moments, weights.output_penalty)
    erasure = OutputErasure(base, live.layers, weights.erasure_weight) if weights.erasure_weight else None
    if erasure:
        others["output_erasure"] = erasure
    has_masks = any(group.masks is not None for group in data.images)
    attention = AttentionLoss(base, weights.attention_weight) if weights.attention_weight and has_masks else None
    if num_processes > 1 and (erasure or attention):
        raise SboraError(
            "erasure_weight and attention_weight need whole batches, which several processes do not have",
            "train in one process, or set them to 0",
        )
    record = erasure.recording if erasure else no_recording
    if attention:
        on_concept["attention"] = attention
        return [Objective(on_concept, attention.recording), Objective(others)], record
    return [Objective(on_concept | others)], record
