"""In-place training with something else in between: interrupts, other adapters, weights that cannot be written."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sbora_diffusion.adapters import inplace_training as module
from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.inplace_training import inplace_training
from sbora_diffusion.adapters.layer import detect

from .inplace_case import Case
from .tiny import Kind, Tiny, activate, attached, each_kind, each_side, run


@each_side
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_come_back_after_an_exception(side: Side, dtype: torch.dtype) -> None:
    case = Case(side, dtype=dtype)

    def fail() -> None:
        with inplace_training(case.model, "default"):
            case.model(torch.randn(2, 12, dtype=dtype))
            assert not torch.equal(case.base.weight, case.original)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(case.base.weight, case.original)


@each_side
def test_an_interrupt_while_entries_are_written_is_undone(monkeypatch: pytest.MonkeyPatch, side: Side) -> None:
    case, overwrite = Case(side), module.overwrite

    def interrupt(*arguments: Any) -> None:
        overwrite(*arguments)
        monkeypatch.setattr(module, "overwrite", overwrite)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "overwrite", interrupt)
    with pytest.raises(KeyboardInterrupt), inplace_training(case.model, "default"):
        case.model(torch.randn(2, 12))
    assert torch.equal(case.base.weight, case.original)


def test_a_second_direct_training_leaves_the_first_alone() -> None:
    case = Case("fa")
    x = torch.randn(4, 12, dtype=torch.float64)
    with inplace_training(case.model, "default"):
        case.model(x)
        with inplace_training(case.model, "default") as names:
            assert names == []
            assert_close(case.model(x), case.dense(x), rtol=1e-12, atol=1e-12)
        assert_close(case.model(x), case.dense(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(case.base.weight, case.original)


def test_dropout_is_not_written() -> None:
    case = Case("fa")
    case.layer.module.lora_dropout["default"] = nn.Dropout(0.5)
    x = torch.randn(4, 12, dtype=torch.float64)
    with inplace_training(case.model, "default"):
        case.model.eval()(x)
        assert not torch.equal(case.base.weight, case.original)
        case.model.train()(x)
        assert torch.equal(case.base.weight, case.original)


def test_several_active_adapters_go_through_the_fused_kernel(tiny: Tiny) -> None:
    model, _ = attached(tiny, "clip", "fa", "fb")
    expected = run("clip", model)
    with inplace_training(model, "dog"):
        assert torch.equal(run("clip", model), expected)
        activate(model, "dog")
        run("clip", model)
        activate(model, "dog", "cat")
        assert torch.equal(run("clip", model), expected)


@each_side
@pytest.mark.parametrize("meanwhile", ["disabled", "left", "rescaled"])
def test_a_backward_pass_after_the_entries_were_taken_out(side: Side, meanwhile: str) -> None:
    case = Case(side)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, case.layer.trained]
    expected = torch.autograd.grad(case.dense(x).square().sum(), inputs)
    with inplace_training(case.model, "default"):
        loss = case.model(x).square().sum()
        if meanwhile == "disabled":
            with case.model.disable_adapter():
                case.model(x.detach())
        elif meanwhile == "rescaled":
            case.layer.module.scaling["default"] = 5.0
            case.model(x.detach())
        got = None if meanwhile == "left" else torch.autograd.grad(loss, inputs)
    got = got or torch.autograd.grad(loss, inputs)
    for gradient, reference in zip(got, expected, strict=True):
        assert_close(gradient, reference, rtol=1e-12, atol=1e-12)
    assert torch.equal(case.base.weight, case.original)


@pytest.mark.parametrize("changed", ["factor", "weight"])
def test_what_changed_before_the_backward_pass_is_noticed(changed: str) -> None:
    case = Case("fa")
    with inplace_training(case.model, "default"):
        y = case.model(torch.randn(5, 12, dtype=torch.float64, requires_grad=True))
        with torch.no_grad():
            (case.layer.trained if changed == "factor" else case.base.weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@each_kind
def test_weights_that_cannot_be_written_are_left_to_the_fused_kernel(tiny: Tiny, kind: Kind) -> None:
    model, (layers,) = attached(tiny, kind, "fa")
    chosen: Any = next(iter(layers.values())).module.get_base_layer()
    if kind == "unet":
        chosen.weight.ds_id = 7  # as DeepSpeed marks what it shards
    elif kind == "clip":
        model.another_name = chosen
    elif kind == "llama":
        chosen.weight.requires_grad_(True)
    expected = run(kind, model)
    with inplace_training(model, "dog") as names:
        assert len(names) == (0 if kind == "llama-nf4" else len(layers) - 1)
        before = chosen.weight.detach().clone()
        assert_close(run(kind, model), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(chosen.weight, before)


def test_columns_that_are_replaced_meanwhile_end_direct_training() -> None:
    case = Case("fa")
    with inplace_training(case.model, "default"):
        case.model(torch.randn(2, 12, dtype=torch.float64))
        down: Any = case.layer.module.lora_A["default"]
        with torch.no_grad():
            down.weight.copy_(down.weight.roll(1, dims=1))
        detect(case.model, "default")
        x = torch.randn(2, 12, dtype=torch.float64)
        assert_close(case.model(x), case.dense(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(case.base.weight, case.original)
