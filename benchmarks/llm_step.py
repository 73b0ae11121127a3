"""One training step of a random Llama: SBoRA-FA and FB against PEFT's LoRA, time and saved activations.

OMP_NUM_THREADS=1 python benchmarks/llm_step.py --out benchmarks/results/llm_step.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.inplace_training import inplace_training
from sbora_diffusion.llm.base import inject
from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.methods.registry import find_method

METHODS = ("lora", "sbora-fa", "sbora-fb")


def model_of(method: str) -> nn.Module:
    """A frozen Llama of four layers, with an adapter on all its linear layers unless the method is "frozen"."""
    shape = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape).requires_grad_(False)
    model.enable_input_require_grads()  # the frozen model, too, takes the gradient to its inputs
    if method == "frozen":
        return model
    config = LlmConfig.from_recipe("small", {})
    interval = Interval(0, config.method.rank) if find_method(method).owns_interval else None
    return inject(model, method, config, interval).train()


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    return lambda: model(input_ids=ids, labels=ids).loss.backward()


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """What the forward pass keeps for the backward pass, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    ids = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(0))
    models = {method: model_of(method) for method in (*METHODS, "frozen")}
    saved = {method: saved_bytes(model, ids) for method, model in models.items()}
    steps = {method: step_of(models[method], ids) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    with inplace_training(models["sbora-fa"], "default"), inplace_training(models["sbora-fb"], "default"):
        for number in range(options.rounds + 1):  # the first is to warm up
            for method, step in steps.items():
                start = time.process_time()
                step()
                if number:
                    seconds[method].append(time.process_time() - start)
    lora, floor = saved["lora"], saved["frozen"]
    told = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step_of_lora": {m: statistics.median(s) / statistics.median(seconds["lora"]) for m, s in seconds.items()},
        "saved_bytes": saved,
        "lora_s_extra_removed": {m: 1 - (saved[m] - floor) / (lora - floor) for m in METHODS},
    }
    options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
