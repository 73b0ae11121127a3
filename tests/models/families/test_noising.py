"""Forward processes against diffusers' schedulers in generation, and the distribution of flow's noise levels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from sbora_diffusion.models.families.base import Diffusion, FlowMatching
from sbora_diffusion.utils.errors import SboraError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_step_of_flow_from_the_target_arrives_at_the_image() -> None:
    """The scheduler that draws takes the true answer straight back to the latents."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=seeded())
    t, flow = scheduler.timesteps[:1], FlowMatching(3.0)
    noisy = flow.add(latents, noise, t)
    arrived = scheduler.step(flow.target(latents, noise, t), t[0], noisy).prev_sample
    torch.testing.assert_close(arrived, latents, rtol=1e-5, atol=1e-5)


def test_flow_noise_is_the_schedulers() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    t = scheduler.timesteps[[10, 500, 900]]
    expected = scheduler.scale_noise(latents, t, noise)
    torch.testing.assert_close(FlowMatching(3.0).add(latents, noise, t), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_logit_normal_then_shifted(shift: float) -> None:
    level = FlowMatching(shift).timesteps(20_000, seeded()).double() / 1000
    unshifted = level / (shift - (shift - 1) * level)  # the inverse of the shift
    logits = unshifted.logit()
    assert abs(float(logits.mean())) < 0.01
    assert abs(float(logits.std()) - 1) < 0.01
    assert float(FlowMatching(shift).timesteps(20_000, seeded()).sort().values.diff().min()) >= 0


def test_v_prediction_is_salimans_and_hos() -> None:
    pipeline = SimpleNamespace(scheduler=DDIMScheduler(prediction_type="v_prediction"))
    diffusion = Diffusion(pipeline)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=seeded())
    t = torch.tensor([300])
    alpha = pipeline.scheduler.alphas_cumprod[300]
    expected = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(diffusion.target(latents, noise, t), expected)
    torch.testing.assert_close(diffusion.add(latents, noise, t), alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)


def test_a_scheduler_that_predicts_the_image_is_refused() -> None:
    with pytest.raises(SboraError, match="predicts 'sample'"):
        Diffusion(SimpleNamespace(scheduler=DDIMScheduler(prediction_type="sample")))
