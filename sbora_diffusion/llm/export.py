"""Export an adapter as a plain LoRA, or merged into a copy of its base model."""

import logging
import shutil
from pathlib import Path

from sbora_diffusion.llm.adapters import find_folder, layer_shapes, load_adapter, read_about, read_concept, write_peft
from sbora_diffusion.llm.base import load_base, meta_base
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import whole_folder

log = logging.getLogger(__name__)

FORMATS = ("peft", "model")


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
