"""The pre-training commands, from art to a folder that diffusers loads, stopped and resumed on the way."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

from tools.emoji import loop, model, pretrain, tokenizer, vae
from tools.emoji.art import WIDE_ART, load_art, save_art
from tools.emoji.world import load_world


def call(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    main()


def test_from_art_to_a_pipeline(art_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, name, value in (
        (vae, "POOL", 64),
        (vae, "UNSEEN", 2),
        (vae, "MEASURED", 4),
        (pretrain, "POOL", 16),
        (pretrain, "FRESH", 8),
        (pretrain, "PROBES", 4),
        (pretrain, "SAMPLING_STEPS", 1),
    ):
        monkeypatch.setattr(module, name, value)
    names = art_folder / "npm" / "names" / "package" / "en"
    names.mkdir(parents=True)
    (names / "data.json").write_text(json.dumps([{"label": "red apple", "tags": ["fruit"]}]))
    call(monkeypatch, tokenizer.main, "--data", art_folder)

    short = ("--data", art_folder, "--batch", 4, "--report-every", 2)
    concepts = art_folder / "concepts"
    (concepts / "dog" / "images").mkdir(parents=True)
    Image.new("RGB", (256, 256), "red").save(concepts / "dog" / "images" / "1.png")
    save_art(load_art(art_folder), art_folder, WIDE_ART)
    call(monkeypatch, vae.main, *short, "--steps", 2, "--concepts", concepts)
    state = loop.load_state(art_folder / "vae.pt")
    assert state is not None
    assert state["step"] == 2

    call(monkeypatch, pretrain.main, *short, "--steps", 2)
    call(monkeypatch, pretrain.main, *short, "--steps", 4)
    state = loop.load_state(art_folder / "base.pt")
    assert state is not None
    assert state["step"] == 4
    assert sorted(path.name for path in (art_folder / "samples").iterdir()) == [
        "base-000002.png", "base-000004.png", "vae-000002.png",
    ]  # fmt: skip

    call(monkeypatch, model.main, "--data", art_folder, "--out", tmp_path / "pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert "local" not in (tmp_path / "pipeline" / "tokenizer" / "tokenizer_config.json").read_text()
    kept = state["average"]["unet.conv_in.weight"].half().float()
    assert torch.equal(pipeline.unet.conv_in.weight, kept)


def test_every_noun_of_the_world_is_one_token_a_word() -> None:
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(model.WEIGHTS / "tokenizer")
    for subject in load_world().subjects:
        assert len(shipped.tokenize(subject.name)) == len(subject.name.split())


def test_latents_are_normalised_without_changing_the_images() -> None:
    torch.manual_seed(0)
    network: Any = vae.new_vae().eval()
    images = torch.rand(64, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = network.decode(network.encode(images).latent_dist.mode()).sample
        vae.normalise_latents(network, images)
        posterior = network.encode(images).latent_dist
        after = network.decode(posterior.mode()).sample
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    sampled = posterior.sample()
    torch.testing.assert_close(sampled.mean((0, 2, 3)), torch.zeros(16), atol=0.1, rtol=0)
    torch.testing.assert_close(sampled.std((0, 2, 3)), torch.ones(16), atol=0.1, rtol=0)


def test_cosine_warms_up_holds_and_falls() -> None:
    factors = [loop.cosine(step, 100, warmup=10, hold=0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:51] == [pytest.approx(1.0)] * 41
    assert factors[-1] < 0.03
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_diffusion_matches_the_schedulers_own_formulas() -> None:
    """At every t: x_t = signal x + noise e and v = signal e - noise x, by diffusers' own functions."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    ddim = model.new_scheduler()
    assert isinstance(ddim, DDIMScheduler)
    ddpm = DDPMScheduler.from_config(ddim.config)
    assert isinstance(ddpm, DDPMScheduler)
    diffusion = pretrain.Diffusion()
    x, noise, t = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4), torch.tensor([0, 500, 998])
    signal, amount = diffusion.signal[t].view(-1, 1, 1, 1), diffusion.noise[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(signal * x + amount * noise, ddpm.add_noise(x, noise, t))  # type: ignore[arg-type]
    torch.testing.assert_close(signal * noise - amount * x, ddpm.get_velocity(x, noise, t))  # type: ignore[arg-type]


def test_a_warm_start_copies_what_fits_and_adds_nothing_yet() -> None:
    torch.manual_seed(0)
    source, target = model.new_unet(), model.new_unet()
    weights = {
        name: value for name, value in source.state_dict().items() if not name.startswith("down_blocks.0.attentions")
    }
    new = model.warm_start(target, weights | {"conv_in.weight": torch.zeros(64, 8, 3, 3)})
    assert all(name.startswith(("down_blocks.0.attentions", "conv_in.weight")) for name in new)
    assert torch.equal(target.mid_block.resnets[0].conv1.weight, source.mid_block.resnets[0].conv1.weight)  # type: ignore[union-attr]
    attention: Any = target.get_submodule("down_blocks.0.attentions.0")
    states = torch.randn(1, 64, 16, 16)
    assert torch.equal(attention(states, torch.randn(1, 24, model.TEXT_WIDTH), return_dict=False)[0], states)
