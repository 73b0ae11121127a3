"""The benchmark measures what it says: SD1.5's attention layers, three ways in turns, weights that come back."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

_spec = importlib.util.spec_from_file_location("bench_write", Path(__file__).parents[1] / "eval" / "bench_write.py")
assert _spec
assert _spec.loader
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)


def test_the_stack_has_the_layers_of_sd15() -> None:
    with torch.device("meta"):
        stack = bench.attention_stack()
    layers = [module for module in stack.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 128
    assert 4 * sum(layer.out_features for layer in layers) == 399_360  # parameters of SBoRA-FA at rank 4
    assert 4 * sum(layer.in_features for layer in layers) == 397_824  # and of SBoRA-FB


def test_the_result_says_how_much_faster() -> None:
    stacks = [nn.ModuleDict({"to_q": nn.Linear(64, 48), "to_k": nn.Linear(32, 64)}) for _ in range(2)]
    result = bench.measure(*(stack.requires_grad_(False) for stack in stacks), rounds=2)
    assert (result["layers"], result["rounds"]) == (2, 2)
    for way in ("fa", "fb"):
        assert result["times_faster"][way] > 0
        low, high = result["spread_ms"][way]
        assert low <= result["median_ms"][way] <= high
