"""Adapters of language models on disk: run folders, PEFT directories and concept files; load, write and export them."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from sbora_diffusion.adapters.file import Adapter, safetensors_bytes
from sbora_diffusion.adapters.layer import detect
from sbora_diffusion.interchange.exporting import SPEC
from sbora_diffusion.interchange.files import CONFIG, WEIGHTS, peft_component
from sbora_diffusion.interchange.lora import to_loras
from sbora_diffusion.llm.base import COMPONENT, fingerprint, linear_layers, load_base, meta_base
from sbora_diffusion.llm.run_folder import ABOUT, ADAPTER
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import RUN, read_json, whole_folder, write_file

log = logging.getLogger(__name__)

FORMATS = ("peft", "model")

Shapes = dict[str, tuple[int, int]]  # "model.<layer>" -> (out, in)


def layer_shapes(model: nn.Module) -> Shapes:
    """Return (out, in) of the linear layers that adapters may write; also of a quantised or meta model."""
    layers = linear_layers(model).items()
    return {f"{COMPONENT}.{name}": (module.out_features, module.in_features) for name, module in layers}


def find_folder(source: str) -> Path | None:
    """Return the PEFT directory of a run folder, or that itself; None for a concept file.

    Raises:
        SboraError: none of the three.
    """
    path = Path(source)
    if path.is_file():
        return None
    for folder in (path, path / ADAPTER):
        if (folder / CONFIG).is_file():
            return folder
    if (path / RUN).is_file():
        raise SboraError(f"the training in {source} is not finished", "resume it: sbora-diffusion llm train … --resume")
    raise SboraError(f"{source} is not a run folder, PEFT directory or concept file")


def read_concept(source: str) -> Adapter:
    """Return the SBoRA adapter of a concept file or run folder.

    Raises:
        SboraError: another method's run, a PEFT directory without its concept file.
    """
    folder = find_folder(source)
    if folder is None:
        return Adapter.load(source)
    files = sorted(Path(source).glob("*.safetensors")) if folder.name == ADAPTER and folder != Path(source) else []
    if len(files) != 1:
        raise SboraError(f"{source} has no concept file", "give a concept file or a run folder of sbora-fa or sbora-fb")
    return Adapter.load(files[0])


def read_about(source: str) -> dict[str, Any]:
    """Return what was recorded at the training: method, base, quantize, fingerprint, config, …; {} if nothing was."""
    folder = find_folder(source)
    if folder is None:
        spec = Adapter.load(source).spec
        about = {"method": spec.method_name, "base": spec.base_id, "fingerprint": spec.base_fingerprint}
        return about | {"quantize": spec.recipe.get("quantize", "none"), "config": spec.recipe}
    try:
        return read_json(folder / ABOUT)
    except FileNotFoundError:
        return {}


def load_adapter(model: Any, source: str, name: str) -> Any:
    """Load an adapter into a base or PEFT model, make it the active one, and return the PEFT model.

    Raises:
        SboraError: the adapter does not fit the model.
    """
    _warn_about_other_base(model, source)
    folder = find_folder(source)
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch)
            write_peft(Adapter.load(source), layer_shapes(model), folder)
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name)
                model.set_adapter(name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            lines = (str(error).strip() or type(error).__name__).splitlines()  # torch's first line is a heading
            reason = lines[1].strip() if lines[0].endswith(":") and lines[1:] else lines[0]
            raise SboraError(f"{source} does not fit the base model: {reason}") from None
    detect(model, name)  # the fast forward for one-hot factors
    return model


def write_peft(adapter: Adapter, shapes: Shapes, folder: Path) -> Path:
    """Write an adapter as the PEFT directory of a plain LoRA, for vLLM, SGLang and llama.cpp's converter.

    The scale is folded into the factors: alpha equals the rank, which is the same in every layer.
    """
    config, tensors = peft_component(to_loras(adapter, shapes), adapter.spec.base_id, shapes)
    metadata = {"format": "pt", SPEC: adapter.spec.to_json()}
    write_file(folder / CONFIG, config.encode(), overwrite=True)
    write_file(folder / WEIGHTS, safetensors_bytes(tensors, metadata), overwrite=True)
    return folder


def _warn_about_other_base(model: Any, source: str) -> None:
    about = read_about(source)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if about.get("fingerprint") not in (None, fingerprint(base)):
        quantised = f" in {about['quantize']}" if about.get("quantize", "none") != "none" else ""
        log.warning("%s was trained on other weights: %s%s", source, about.get("base"), quantised)


def export(source: str, to: str, folder: Path, base: str = "", dequantize: bool = False) -> Path:
    """Write a folder that other programs load, and return it.

    Args:
        base: "" for the one that the adapter was trained on.
        dequantize: merge an adapter that was trained on nf4 into its dequantised base.

    Raises:
        SboraError: an unknown format, a folder that exists, a merge into 4 bits, an adapter that does not fit.
    """
    if to not in FORMATS:
        raise SboraError(f"got --to {to}, expected {' or '.join(FORMATS)}")
    if folder.exists():
        raise SboraError(f"{folder} exists", "choose another --out")
    about = read_about(source)
    base = base or about.get("base", "")
    if not base:
        raise SboraError(f"{source} does not record its base model", "name it with --base")
    return _merged(source, base, about, folder, dequantize) if to == "model" else _peft(source, base, about, folder)


def _peft(source: str, base: str, about: dict, folder: Path) -> Path:
    trained_on = about.get("base", base)
    if base != trained_on:
        log.warning("%s was trained on %s: only the layer sizes of %s are checked", source, trained_on, base)
    if about.get("method", "").startswith("sbora"):
        adapter, shapes = read_concept(source), layer_shapes(meta_base(base))
        with whole_folder(folder) as temporary:
            write_peft(adapter, shapes, temporary)
        return folder
    if about.get("method") == "dora":
        raise SboraError("vLLM, SGLang and llama.cpp do not load DoRA", "merge it into its base: --to model")
    origin = find_folder(source)
    assert origin is not None, "concept files hold SBoRA adapters"
    with whole_folder(folder) as temporary:
        shutil.copytree(origin, temporary)
    return folder


def _merged(source: str, base: str, about: dict, folder: Path, dequantize: bool) -> Path:
    quantize = about.get("quantize", "none")
    if quantize != "none" and not dequantize:
        raise SboraError(
            f"{source} was trained on {quantize}: a merge would requantise weights that the adapter does not own",
            "apply it at run time (--quantize nf4), or merge it into a dequantised copy with --dequantize",
        )
    model, tokenizer = load_base(base, "auto", quantize)
    if quantize != "none":
        model = model.dequantize()
    merged = load_adapter(model, source, "default").merge_and_unload()
    with whole_folder(folder) as temporary:
        merged.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
    return folder
