"""The Python API: quick to import, complete, exact, and docs/python.md runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

import sbora_diffusion as sbora
from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.evaluation import evaluate as evaluate_module
from sbora_diffusion.inference.apply import HANDLE
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.inference.generate import generate as generate_batch
from sbora_diffusion.inference.image_file import Settings
from sbora_diffusion.models.base import Base, load_base

from .interchange.samples import random_adapter
from .tiny_clip import save_tiny_clip
from .tiny_sdxl import save_tiny_sdxl

DOCS = Path(__file__).parents[1] / "docs/python.md"


def concepts(base: Base) -> list[Adapter]:
    """Two random concepts in neighbouring intervals, of base models with one or two text encoders."""
    return [
        random_adapter(
            base.layer_shapes,
            interval=Interval(4 * number, 4),
            seed=number,
            std=0.1,
            name=name,
            tokens={f"<{name}>": name},
            base_id=base.id,
            base_fingerprint=base.fingerprint,
        )
        for number, name in enumerate(("dog", "cat"))
    ]


@pytest.fixture
def here(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """The base model, in a folder with the concepts dog and cat."""
    monkeypatch.chdir(tmp_path)
    for adapter in concepts(base):
        adapter.save(f"adapters/{adapter.spec.name}.safetensors")
    return base


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, sbora_diffusion as s; dir(s); print({'torch', 'numpy', 'typer', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_name_exists() -> None:
    assert set(sbora.__all__) <= set(dir(sbora))
    for name in sbora.__all__:
        assert getattr(sbora, name).__doc__, name
    for name in sbora.peft.__all__:
        assert getattr(sbora.peft, name).__doc__, name
    with pytest.raises(AttributeError, match=r"no attribute 'tain', only Adapter, .* train$"):
        _ = sbora.tain  # type: ignore[attr-defined]


def test_generate_by_name_path_and_object(here: Base) -> None:
    dog, cat = concepts(here)
    made: list[Settings] = []
    prompt = "a <dog> and a <cat>"
    images = sbora.generate(
        prompt,
        ["dog", Path("adapters/cat.safetensors")],
        base=here,
        strengths=[1, 0.5],
        seeds=range(3, 5),
        steps=2,
        on_image=lambda _, settings: made.append(settings),
    )
    with applied(here, [dog, cat], [1, 0.5]):
        expected = generate_batch(here, [prompt] * 2, seeds=[3, 4], steps=2)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert [(settings.seed, settings.concepts) for settings in made] == [(n, {"dog": 1, "cat": 0.5}) for n in (3, 4)]
    (alone,) = sbora.generate("a <dog>", dog, steps=2)
    (named,) = sbora.generate("a <dog>", "dog", base=here.id, steps=2)
    assert alone.tobytes() == named.tobytes()
    for wrong, message in (
        (lambda: sbora.generate("a dog", base=here, seeds=[]), "got no seeds"),
        (lambda: sbora.generate("a dog", base=here, precision="bf16"), "got precision=bf16 for a base model loaded in"),
        (lambda: sbora.generate("a dog", ["fox"], base=here), "no adapter 'fox', neither a file nor in adapters"),
    ):
        with pytest.raises(sbora.SboraError, match=message):
            wrong()


def test_merge_by_name_and_object(here: Base) -> None:
    dog, cat = concepts(here)
    merged = sbora.merge([dog, "cat"], how="sum", base=here)
    assert merged.spec.name == "cat+dog"
    assert merged.to_bytes() == sbora.merge([cat, dog], how="sum").to_bytes()
    fused = sbora.merge(["dog", "cat"], how="fuse", base=here)
    assert fused.spec.recipe["how"] == "fuse"


def state_of(pipe: Any) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": x.clone() for name, part in parts.items() for key, x in part.state_dict().items()}


def others_of(pipe: Any) -> list[Any]:
    """What a pipeline has besides weights that adapters touch."""
    names = [name for name in ("", "_2") if getattr(pipe, f"text_encoder{name}", None) is not None]
    tokenizers = [getattr(pipe, f"tokenizer{name}") for name in names]
    encoders = [getattr(pipe, f"text_encoder{name}") for name in names]
    return [*tokenizers, *(e.get_input_embeddings() for e in encoders), *(e.config.eos_token_id for e in encoders)]


def image_of(pipe: Any, prompt: str) -> np.ndarray:
    images = pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    return np.asarray(images[0])


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_apply_to_a_diffusers_pipeline_is_undone_bit_for_bit(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    folder = tiny_folder if kind == "sd" else save_tiny_sdxl(tmp_path / "sdxl")
    dog, cat = concepts(load_base(str(folder)))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    state, others, plain = state_of(pipe), others_of(pipe), image_of(pipe, "a dog")

    handle = sbora.apply(pipe, [dog, cat], strengths=[1.0, 0.7])
    both = image_of(pipe, "a <dog> and a <cat>")
    assert not np.array_equal(both, plain)
    handle.remove("cat")
    only_dog = image_of(pipe, "a <dog>")
    handle.add(cat, [0.2])
    handle.set_strength("cat", 0.7)
    assert handle.strengths == {"cat": 0.7, "dog": 1.0}
    assert np.array_equal(image_of(pipe, "a <dog> and a <cat>"), both)
    handle.remove("cat", "dog")
    assert same(state_of(pipe), state)
    assert np.array_equal(image_of(pipe, "a dog"), plain)
    handle.close()
    handle.close()
    assert same(state_of(pipe), state)
    assert all(one is other or one == other for one, other in zip(others_of(pipe), others, strict=True))

    with sbora.apply(pipe, dog):
        assert np.array_equal(image_of(pipe, "a <dog>"), only_dog)
    assert same(state_of(pipe), state)
    assert np.array_equal(image_of(pipe, "a dog"), plain)


def test_a_prompt_is_pooled_at_its_end_and_not_at_a_learned_token(tmp_path: Path) -> None:
    folder = save_tiny_sdxl(tmp_path / "sdxl")
    dog, _ = concepts(load_base(str(folder)))
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    legacy = [part for e in (pipe.text_encoder, pipe.text_encoder_2) for part in (e.config, *e.modules())]
    legacy = [part for part in legacy if hasattr(part, "eos_token_id")]
    with sbora.apply(pipe, dog):
        expected = image_of(pipe, "a <dog> on the beach")
    for part in legacy:
        part.eos_token_id = 2  # as in published configs
    with sbora.apply(pipe, dog):
        assert np.array_equal(image_of(pipe, "a <dog> on the beach"), expected)
    assert {part.eos_token_id for part in legacy} == {2}


def test_apply_to_a_pipeline_for_another_task(here: Base) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**DiffusionPipeline.from_pretrained(here.id).components)
    before = state_of(pipe)
    with sbora.apply(pipe, ["dog", "cat"]) as handle:
        assert repr(handle) == "AppliedAdapters(cat=1, dog=1)"
        assert not same(state_of(pipe), before)
    assert same(state_of(pipe), before)


def test_apply_refuses_what_does_not_fit(here: Base, tiny_sd2_folder: Path) -> None:
    dog, _ = concepts(here)
    pipe = DiffusionPipeline.from_pretrained(here.id)
    before = state_of(pipe)
    other = DiffusionPipeline.from_pretrained(tiny_sd2_folder)
    with pytest.raises(sbora.SboraError, match="adapter 'dog'"):
        sbora.apply(other, dog)
    for adapters, strengths, message in (
        ([dog, "dog"], None, "two adapters bring the name"),
        ([dog, "fox"], None, "no adapter 'fox'"),
        ([dog], [1.0, 2.0], "1 adapters and 2 strengths"),
        ([dog], [float("nan")], "strength nan"),
    ):
        with pytest.raises(sbora.SboraError, match=message):
            sbora.apply(pipe, adapters, strengths)
        assert same(state_of(pipe), before)
    handle = sbora.apply(pipe, dog)
    with pytest.raises(sbora.SboraError, match="has a handle already, with the adapters dog"):
        sbora.apply(pipe, "cat")
    with pytest.raises(sbora.SboraError, match="'cat' is not written"):
        handle.remove("cat")
    handle.close()
    with pytest.raises(sbora.SboraError, match="the handle is closed"):
        handle.add("cat")
    assert same(state_of(pipe), before)


QUICK = {"steps": 2, "rank": 4, "crops": 1, "sampling_steps": 1, "preview_every": 0, "warmup_steps": 1}


def test_the_documentation_runs(
    here: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All code of docs/python.md in order, on a tiny base model with few steps and a tiny judge."""
    (tmp_path / "two.txt").write_text("a <TOK>\na red <TOK>\n")
    judge = str(save_tiny_clip(tmp_path / "clip"))
    monkeypatch.setattr(evaluate_module, "default_suite_and_judge", lambda _: ("two.txt", judge))
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    dog, cat = concepts(here)
    names: dict[str, Any] = {"sbora": sbora, "dog": dog, "cat": cat, "QUICK": QUICK}
    for name in ("dog", "cat"):
        Path(f"adapters/{name}.safetensors").unlink()
    for block in blocks:
        code = re.sub(r"(train\(.*)\)", r"\1, **QUICK)", block).replace('"emoji64"', repr(here.id))
        code = code.replace("PATH/TO/PIPELINE", here.id).replace("steps=10", "steps=2")
        exec(code, names)
    capsys.readouterr()
    for path in ("dog.png", "adapters/both.safetensors", "sbora-adapter/adapter_model.safetensors"):
        assert Path(path).stat().st_size
    report, x = names["report"], torch.randn(3, 64)
    assert sorted(report.retention()) == ["cat", "dog"]
    assert all(path.exists() for path in report.files)
    assert sorted(sbora.peft.detect(names["loaded"], "default")) == ["0"]
    assert names["loaded"](x).shape == (3, 8)
    assert HANDLE not in vars(names["pipe"].unet)
