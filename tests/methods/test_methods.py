"""What single methods do, and their merges by independent formulas; the matrix tests what all of them share."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.batches import Sample, StepBatch
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.methods.calibration import prior_states, word_states
from sbora_diffusion.methods.live import injected, injected_concept
from sbora_diffusion.methods.merging import merge
from sbora_diffusion.methods.orthogonal import orthogonal_matrix
from sbora_diffusion.methods.registry import find_method, method_names
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.layerwise_tokens import cross_attentions
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError

from ..helpers import short_config, train
from ..training.test_train import snapshot

RANK, HIDDEN = 4, 32
BASELINES = [name for name in method_names() if not name.startswith("sbora")]
LOW_RANK = ("lora", "dora", "orthogonal", "mix-of-show")


def short(method: str, **settings: str) -> TrainConfig:
    return short_config(method, **{"steps": "2", "save_every": "1", "prior_batch": "2"} | settings)


def interval(method: str, start: int = 0) -> Interval | None:
    return Interval(start, RANK) if find_method(method).owns_interval else None


@pytest.mark.parametrize("method", BASELINES)
def test_the_file_draws_what_the_training_drew(base: Base, concept: Concept, method: str) -> None:
    """The U-Net's answer with the parameters in place, and with the adapter written into the weights."""
    config = short(method)
    base.layers  # noqa: B018
    generator = torch.Generator().manual_seed(5)
    with injected_concept(concept, base, interval(method), config) as live:
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        factors, dense, rows = live.learned()
        answered = answer(base)
    adapter = as_adapter(base, concept.name, method, config, (factors, dense, rows))
    with applied(base, [adapter]):
        torch.testing.assert_close(answer(base), answered, rtol=1e-4, atol=2e-5)
    assert (answer(base, "a dog") - answered).abs().max() > 1e-3


@torch.no_grad()
def answer(base: Base, prompt: str = "a <rex>") -> Tensor:
    pipeline = base.pipeline
    text = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    ids = pipeline.tokenizer(text, padding="max_length", max_length=24, return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids).last_hidden_state
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(noisy, torch.tensor([300]), states).sample


def as_adapter(base: Base, name: str, method: str, config: TrainConfig, learned: tuple) -> Adapter:
    from sbora_diffusion.adapters.basis import Spec

    factors, dense, rows = learned
    own = interval(method)
    spec = Spec(
        side=find_method(method).side,
        rank=RANK,
        intervals=(own,) if own else (),
        seed=0,
        base_id=base.id,
        base_fingerprint=base.fingerprint,
        tokens={f"<{name}>": "dog"},
        name=name,
        recipe={"guidance": 3.0},
        format=2,
        method=method,
        embedding_layers=len(cross_attentions(base)) if config.method.layerwise_tokens else 0,
    )
    return Adapter(spec, factors, {f"text_encoder.<{name}>": rows["text_encoder"]}, dense)


def random_adapter(base: Base, concept: Concept, name: str, method: str, seed: int) -> Adapter:
    config = short(method)
    base.layers  # noqa: B018
    generator = torch.Generator().manual_seed(seed)
    with injected_concept(concept, base, interval(method), config) as live, torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return as_adapter(base, name, method, config, live.learned())


def test_orthogonal_rows_are_frozen_rows_of_one_shared_matrix(base: Base) -> None:
    base.layers  # noqa: B018
    with injected(base, "dog", None, short("orthogonal")) as dog:
        first = dog.collect()[1]
    with injected(base, "cat", None, short("orthogonal")) as cat:
        second = cat.collect()[1]
    for dense in first.values():
        assert dense.down is not None
        matrix = orthogonal_matrix(dense.down.shape[1], 0)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
        assert all((matrix == row).all(1).any() for row in dense.down)
    assert any(not torch.equal(first[key].down, second[key].down) for key in first)  # type: ignore[arg-type]


def test_no_more_orthogonal_rows_than_there_are(base: Base, concept: Concept, tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="got rank=33, but a layer has 32 inputs"):
        train(concept, base, None, short("orthogonal", rank="33"), tmp_path)


def test_custom_diffusions_noun_stays(base: Base, concept: Concept, tmp_path: Path) -> None:
    from sbora_diffusion.models.tokens import class_embedding

    adapter = train(concept, base, None, short("custom-diffusion"), tmp_path).adapter
    start, rows = class_embedding(base, "dog", 2)["text_encoder"], adapter.tokens["text_encoder.<rex>"]
    assert torch.equal(rows[1], start[1])
    assert not torch.equal(rows[0], start[0])
    assert all(key.endswith((".attn2.to_k", ".attn2.to_v")) for key in adapter.dense)


def test_layers_read_their_own_embedding(base: Base, concept: Concept) -> None:
    """A change of one layer's embedding reaches that cross-attention and no other."""
    count = len(cross_attentions(base))
    assert count > 1
    seen: list[list[Tensor]] = []
    with injected_concept(concept, base, None, short("textual-inversion", layerwise_tokens="1")) as live:
        hooks = [
            layer.to_k.register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0]))  # type: ignore[union-attr, operator]
            for layer in cross_attentions(base)
        ]
        seen.append([])
        answer(base)
        with torch.no_grad():
            live.embeddings[0][1] += 1.0
        seen.append([])
        answer(base)
        for hook in hooks:
            hook.remove()
    changed = [not torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert sum(changed) == 1
    assert not any(layer._forward_pre_hooks for layer in cross_attentions(base))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_averages_are_means_of_the_deltas(base: Base, concept: Concept, method: str) -> None:
    dog, cat = (random_adapter(base, concept, name, method, seed) for seed, name in enumerate(("dog", "cat")))
    merged = merge([dog, cat], base=base)
    assert merged.spec.method == method
    assert merged.spec.tokens == {"<dog>": "dog", "<cat>": "dog"}
    for key, layer in base.layers.items():
        deltas = [dense_delta(adapter, key, layer.weight) for adapter in (dog, cat)]
        torch.testing.assert_close(merged.dense[key].delta(layer.weight), (deltas[0] + deltas[1]) / 2)


def dense_delta(adapter: Adapter, key: str, weight: Tensor) -> Tensor:
    """ΔW by the paper's formula: B A, or m (W + B A) / ‖W + B A‖ - W with norms of rows."""
    dense = adapter.dense[key]
    assert dense.down is not None
    product = torch.einsum("or,ri->oi", dense.up, dense.down)
    if dense.magnitude is None:
        return product
    turned = weight + product
    return dense.magnitude * turned / turned.square().sum(1, keepdim=True).sqrt() - weight


def test_custom_diffusions_merge_keeps_words_and_moves_the_rest_least(base: Base, concept: Concept) -> None:
    dog, cat = (
        random_adapter(base, concept, name, "custom-diffusion", seed) for seed, name in enumerate(("dog", "cat"))
    )
    merged = merge([dog, cat], base=base)
    prior = prior_states(base, [dog, cat])
    for key in dog.dense:
        delta = merged.dense[key].up.double()
        words = torch.cat([word_states(base, adapter) for adapter in (dog, cat)]).double()
        answers = [adapter.dense[key].up.double() @ word_states(base, adapter).double().T for adapter in (dog, cat)]
        wanted = torch.cat(answers, dim=1)
        torch.testing.assert_close(delta @ words.T, wanted, rtol=1e-3, atol=1e-4)
        null = torch.linalg.svd(words).Vh[torch.linalg.matrix_rank(words) :]  # what no word has a part in
        if len(null):
            slope = delta @ prior @ null.T  # of tr(ΔW P ΔWᵀ) along every change that is still allowed
            assert slope.abs().max() < 1e-3 * (delta @ prior).abs().max()


def test_mix_of_show_fuses_by_gradient(base: Base, concept: Concept) -> None:
    """A single concept is its own optimum; two of them end below the objective of their mean."""
    from sbora_diffusion.adapters.baseline_merges import fuse_by_gradient
    from sbora_diffusion.adapters.fuse import objective
    from sbora_diffusion.methods.calibration import SampledInputs

    dog, cat = (random_adapter(base, concept, name, "mix-of-show", seed) for seed, name in enumerate(("dog", "cat")))
    drawn = SampledInputs(base, [dog, cat], steps=1, seeds=1)
    every = {key: torch.arange(shape[1]) for key, shape in base.layer_shapes.items()}
    moments = [drawn(adapter, every) for adapter in (dog, cat)]
    merged = fuse_by_gradient([dog, cat], [1, 1], moments)
    assert merged.spec.embedding_layers == len(cross_attentions(base))
    totals = torch.zeros(2, dtype=torch.float64)
    for key, layer in base.layers.items():
        deltas = [dense_delta(adapter, key, layer.weight).double() for adapter in (dog, cat)]
        seen = [each[key] for each in moments]
        found, mean = (
            objective(delta, deltas, seen, torch.zeros_like(seen[0]), 0.0)
            for delta in (merged.dense[key].up.double(), (deltas[0] + deltas[1]) / 2)
        )
        assert found <= mean * (1 + 1e-6)  # the same where both saw the same
        totals += torch.stack([found, mean])
    assert totals[0] < 0.95 * totals[1]
    alone = fuse_by_gradient([dog], [1], moments[:1])
    for key, layer in base.layers.items():
        torch.testing.assert_close(alone.dense[key].up, dense_delta(dog, key, layer.weight), rtol=1e-4, atol=1e-5)


def test_methods_do_not_mix(base: Base, concept: Concept) -> None:
    dog = random_adapter(base, concept, "dog", "lora", 0)
    cat = random_adapter(base, concept, "cat", "custom-diffusion", 1)
    with pytest.raises(SboraError, match="differ in method name: custom-diffusion and lora"):
        merge([dog, cat], base=base)
    with pytest.raises(SboraError, match="expected average or sum for lora"):
        merge([dog, dog], how="gradient", base=base)


def test_but_they_are_applied_together(base: Base, concept: Concept) -> None:
    """Layer-wise and ordinary tokens, dense changes and rows; gone again bit for bit."""
    before = snapshot(base)
    adapters = [random_adapter(base, concept, name, name, number) for number, name in enumerate(BASELINES)]
    with applied(base, adapters):
        generate(base, [" ".join(f"<{name}>" for name in BASELINES[:3])], seeds=[0], steps=1)
    after = snapshot(base)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_erasure_is_the_relative_output_on_the_prior_rows(base: Base, concept: Concept) -> None:
    from sbora_diffusion.training.losses.output_erasure import OutputErasure

    base.layers  # noqa: B018
    config = short("blocklora")
    with injected_concept(concept, base, Interval(0, RANK), config) as live:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        erasure, seen = OutputErasure(base, live.layers), {}
        key = next(iter(base.layers))
        hook = base.layers[key].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
        rows = torch.zeros(1, 4, 8, 8)
        sample = Sample(rows, rows, rows, rows)
        with erasure.recording(StepBatch(sample, sample)):
            ids = base.pipeline.tokenizer(
                ["a", "b"], padding="max_length", max_length=24, return_tensors="pt"
            ).input_ids
            states = base.pipeline.text_encoder(ids).last_hidden_state
            base.pipeline.unet(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([5, 900]), states)
        hook.remove()
        found = erasure()
        found.backward()
        layers = {f"{part}.{name}": layer for part, named in live.layers.items() for name, layer in named.items()}
        assert all(layer.trained.grad is not None for layer in layers.values())
        recorded = erasure._inputs
        assert recorded.keys() == layers.keys()
        shares = []
        for name, layer in layers.items():
            x, weight = recorded[name], base.layers[name].weight
            assert len(x) == 1
            delta = torch.zeros_like(weight)
            delta[layer.index] = layer.trained.detach()
            shares.append(((x @ delta.T).square().sum() / (x @ weight.T).square().sum()).item())
        assert found.item() == pytest.approx(sum(shares) / len(shares), rel=1e-4)
