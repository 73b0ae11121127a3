"""Adapters on disk: equal logits as PEFT directory, concept file and merged model; merges; errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.llm.adapters import export, find_folder, load_adapter, read_concept
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.config import METHODS, LlmConfig
from sbora_diffusion.llm.run_folder import Run
from sbora_diffusion.llm.train import train
from sbora_diffusion.utils.errors import SboraError

INPUTS = torch.arange(3, 20)[None]
SMALL = {"rank": "4", "alpha": "8", "steps": "3", "learning_rate": "0.05"}


def trained(
    method: str,
    base: str,
    data: Path,
    folder: Path,
    quantize: str = "none",
    interval: Interval | None = None,
    **overrides: str,
) -> Path:
    run = Run(base=base, data=data, method=method, quantize=quantize, interval=interval)
    train(run, LlmConfig.from_recipe("small", SMALL | overrides), folder)
    return folder


@pytest.fixture(scope="module")
def folders(base: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a run folder of each method; "nf4" is SBoRA-FA on a 4-bit base."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {method: trained(method, base, data, folder / method / "run") for method in METHODS}
    return runs | {"nf4": trained("sbora-fa", base, data, folder / "nf4" / "run", quantize="nf4")}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(INPUTS).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_form_gives_the_same_logits(method: str, base: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[method]
    expected = logits(PeftModel.from_pretrained(load_base(base)[0], str(folder / "adapter")))
    assert not torch.allclose(expected, logits(load_base(base)[0]), atol=1e-3)
    ours = load_adapter(load_base(base)[0], str(folder), "one").eval()
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
    merged = export(str(folder), "model", tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=1e-4, atol=1e-5)
    if method != "dora":
        plain = export(str(folder), "peft", tmp_path / "peft")
        exported = PeftModel.from_pretrained(load_base(base)[0], str(plain))
        torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-5)
    if method.startswith("sbora"):
        concept = load_adapter(load_base(base)[0], str(folder / "run.safetensors"), "one").eval()
        torch.testing.assert_close(logits(concept), expected, rtol=1e-4, atol=1e-5)


def test_exported_directory_is_what_servers_read(base: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = export(str(folders["sbora-fa"]), "peft", tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["r"], config["lora_alpha"]) == (4, 4)  # the scale is folded into the factors
    assert config["base_model_name_or_path"] == base
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb"])
def test_disjoint_adapters_merge_to_the_sum_of_both(
    method: str, base: str, data: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = read_concept(str(folders[method]))
    second = read_concept(str(trained(method, base, data, tmp_path / "second", interval=Interval(4, 4), seed="1")))
    merged = merge([first, second], [1.0, 1.0], "sum")
    assert merged.to_bytes() == merge([second, first], [1.0, 1.0], "sum").to_bytes()
    merged.save(tmp_path / "merged.safetensors")
    model, plain = load_adapter(load_base(base)[0], str(tmp_path / "merged.safetensors"), "both"), load_base(base)[0]
    layer = "model.layers.0.self_attn.q_proj"
    live = model.get_base_model().get_submodule(layer).get_delta_weight("both")
    expected = torch.zeros_like(plain.get_submodule(layer).weight)
    for adapter in (first, second):
        factor = adapter.factors[f"model.{layer}"]
        expected.index_add_(1 if method == "sbora-fa" else 0, factor.index, factor.weight)
    torch.testing.assert_close(live, expected)


def test_concept_file_describes_the_adapter(base: str, data: Path, tmp_path: Path) -> None:
    folder = trained("sbora-fb", base, data, tmp_path / "mine", interval=Interval(8, 4))
    spec = Adapter.load(folder / "mine.safetensors").spec
    assert (spec.name, spec.side, spec.rank, str(spec.intervals[0])) == ("mine", "fb", 4, "8:12")
    assert (spec.base_id, spec.recipe["quantize"], spec.tokens) == (base, "none", {})


def test_nf4_is_merged_only_on_request(
    base: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders["nf4"]
    with pytest.raises(SboraError, match="trained on nf4: a merge would requantise"):
        export(str(folder), "model", tmp_path / "merged")
    expected = logits(load_adapter(load_base(base, quantize="nf4")[0], str(folder), "one").eval())
    export(str(folder), "model", tmp_path / "merged", dequantize=True)
    assert "other weights" not in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_other_base_weights_are_warned_about(
    base: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders["nf4"]
    load_adapter(load_base(base)[0], str(folder), "one")
    assert "was trained on other weights" in caplog.text
    assert "in nf4" in caplog.text


def test_errors(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="is not a run folder, PEFT directory or concept file"):
        find_folder(str(tmp_path))
    dora = folders["dora"]
    with pytest.raises(SboraError, match="do not load DoRA"):
        export(str(dora), "peft", tmp_path / "out")
    with pytest.raises(SboraError, match="has no concept file"):
        read_concept(str(dora))
    with pytest.raises(SboraError, match="expected peft or model"):
        export(str(dora), "gguf", tmp_path / "out")
    with pytest.raises(SboraError, match="exists"):
        export(str(dora), "model", tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text("{}")
    with pytest.raises(SboraError, match="is not finished"):
        find_folder(str(tmp_path / "half"))


def test_export_for_another_base_is_warned_about(
    base: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, moved = str(folders["sbora-fa"]), tmp_path / "moved"
    shutil.copytree(base, moved)
    export(folder, "peft", tmp_path / "same", base)
    assert "was trained on" not in caplog.text
    export(folder, "peft", tmp_path / "other", str(moved))
    assert f"was trained on {base}: only the layer sizes of {moved} are checked" in caplog.text
