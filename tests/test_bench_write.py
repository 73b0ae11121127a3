"""The benchmark measures what it says: SD1.5's attention layers, three ways in turns, weights that come back."""

import bench_write as bench
import torch
from torch import nn


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
    assert (result["layers"], result["entries"]) == (2, 64 * 48 + 48 + 32 * 64 + 64)
    for clock in ("wall", "cpu"):
        assert set(result[clock]["times_faster"]) == {"fa", "fb"}
        assert all(
            result[clock]["median_ms"][way] >= result[clock]["fastest_ms"][way] > 0 for way in ("fa", "fb", "peft")
        )


def test_the_summary_is_of_medians() -> None:
    summary = bench.summary({"fa": [0.003, 0.001, 0.002], "fb": [0.001] * 3, "peft": [0.02, 0.01, 0.5]})
    assert summary["median_ms"] == {"fa": 2.0, "fb": 1.0, "peft": 20.0}
    assert summary["fastest_ms"] == {"fa": 1.0, "fb": 1.0, "peft": 10.0}
    assert summary["times_faster"] == {"fa": 10.0, "fb": 20.0}


def test_the_report_gives_ranges() -> None:
    runs = [{clock: {"times_faster": {"fa": fa, "fb": 20.0}} for clock in ("wall", "cpu")} for fa in (7.0, 6.0, 9.0)]
    assert bench.report(runs, 4)["times_faster"] == {
        clock: {"fa": [6.0, 9.0], "fb": [20.0] * 2} for clock in ("wall", "cpu")
    }
