"""Import adapters from the files of other programs, if one factor of each layer is one-hot."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from sbora_diffusion.adapters.basis import Spec
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.interchange.embeddings import BUNDLED, Embedding, bundled_embeddings, read_embedding
from sbora_diffusion.interchange.exporting import EMBEDDINGS, LORA_NAME, SPEC
from sbora_diffusion.interchange.files import is_peft_folder, read_loras, read_peft, read_tensors
from sbora_diffusion.interchange.lora import Lora, from_loras, owned_intervals
from sbora_diffusion.interchange.names import resolve
from sbora_diffusion.utils.errors import SboraError


@dataclass(frozen=True, eq=False)
class Foreign:
    """The content of another program's files."""

    path: Path
    loras: dict[str, Lora]  # by layer names as in the file
    embeddings: tuple[Embedding, ...]
    spec: Spec | None  # from our own exports


def read_foreign(path: Path, embeddings: Sequence[Path] = ()) -> Foreign:
    """Read a LoRA file of diffusers or kohya, a PEFT directory, or a folder that `export` wrote.

    Args:
        embeddings: files of learned tokens. For our own exports, those in `embeddings/` are found automatically.

    Raises:
        SboraError: any defect of a file, which it names.
    """
    metadata, loras, bundled = _read(path)
    with _naming(path):
        spec = Spec.from_json(metadata[SPEC]) if SPEC in metadata else None
    named = [*bundled, *map(read_embedding, embeddings)]
    names = {embedding.token for embedding in named}
    tokens = set(spec.tokens) if spec else set()
    folder = (path if path.is_dir() else path.parent) / EMBEDDINGS
    beside = [read_embedding(file) for file in sorted(folder.glob("*.safetensors"))] if tokens - names else []
    return Foreign(path, loras, (*named, *(one for one in beside if one.token in tokens - names)), spec)


def to_adapter(
    foreign: Foreign, layer_shapes: Mapping[str, tuple[int, int]], base: tuple[str, str], name: str, noun: str = ""
) -> Adapter:
    """Convert a LoRA to an SBoRA adapter.

    Metadata of our own exports is kept where it agrees with the tensors; columns are always read from the tensors.

    Args:
        layer_shapes: "<component>.<layer>" -> (out, in), of the base model's layers.
        base: id and fingerprint of the base model, for files without this metadata.
        name: the concept's name.
        noun: the class noun of tokens without one in their file; if empty, the token's own name.

    Raises:
        SboraError: a dense LoRA, layers or tokens that do not fit the base model, or a missing token.
    """
    with _naming(foreign.path):
        side, factors = from_loras(foreign.loras, foreign.spec.side if foreign.spec else "fa")
        keys = resolve(foreign.loras, layer_shapes)
        loras = {keys[layer]: lora for layer, lora in foreign.loras.items()}
        _check_shapes(loras, layer_shapes)
        known = {keys[layer]: factor for layer, factor in factors.items()}
        widths = {key: shape[1 if side == "fa" else 0] for key, shape in layer_shapes.items()}
        spec = foreign.spec or Spec(
            side=side, rank=1, intervals=(), seed=0, base_id=base[0], base_fingerprint=base[1],
            tokens={}, name=name, recipe={"imported from": foreign.path.name},
        )  # fmt: skip
        spec = replace(
            spec,
            side=side,
            rank=max(len(factor.index) for factor in known.values()),
            intervals=owned_intervals(known, widths, spec.seed, spec.intervals),
            tokens=_nouns(foreign, noun),
            name=name,
        )
        return Adapter(spec, known, _tokens(foreign, layer_shapes))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of errors."""
    try:
        yield
    except SboraError as defect:
        raise SboraError(f"{path}: {defect}", defect.hint) from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, Lora], list[Embedding]]:
    """Return metadata, LoRAs, and the embeddings that A1111 stores in the same file."""
    if path.is_dir() and is_peft_folder(path):
        return *read_peft(path), []
    file = _lora_in(path) if path.is_dir() else path
    metadata, tensors = read_tensors(file)
    plain = {key: tensor for key, tensor in tensors.items() if not key.startswith(BUNDLED)}
    with _naming(file):
        return metadata, read_loras(plain, metadata), bundled_embeddings(tensors)


def _lora_in(folder: Path) -> Path:
    """Return the only LoRA file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if folder / LORA_NAME in files:
        return folder / LORA_NAME
    if len(files) != 1:
        raise SboraError(f"{folder}: has {len(files)} safetensors files, expected one", "Give the path of the file.")
    return files[0]


def _check_shapes(loras: Mapping[str, Lora], layer_shapes: Mapping[str, tuple[int, int]]) -> None:
    for key, lora in loras.items():
        shape = (lora.up.shape[0], lora.down.shape[1])
        if shape != tuple(layer_shapes[key]):
            expected = "×".join(map(str, layer_shapes[key]))
            raise SboraError(
                f"layer {key} is for a weight of {shape[0]}×{shape[1]}, the base model has {expected}",
                hint="Give its base model with --base.",
            )


def _nouns(foreign: Foreign, noun: str) -> dict[str, str]:
    """Return token -> class noun."""
    claimed = foreign.spec.tokens if foreign.spec else {}
    tokens = [embedding.token for embedding in foreign.embeddings]
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice:
        raise SboraError(f"the token {twice!r} is in two files", hint="Give only one of them with --embedding.")
    missing = [token for token in claimed if token not in tokens]
    if missing:
        hint = "Give its file with --embedding FILE."
        raise SboraError(f"the token {missing[0]!r} belongs to it, but is in none of the files", hint)
    return {e.token: e.noun or claimed.get(e.token) or noun or e.token.strip("<>") for e in foreign.embeddings}


def _tokens(foreign: Foreign, layers: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Return the embeddings by "<component>.<token>"."""
    found = {}
    for embedding in foreign.embeddings:
        for component, vectors in embedding.vectors.items():
            widths = [in_dim for key, (_, in_dim) in layers.items() if key.startswith(f"{component}.")]
            if not widths or vectors.shape[1] not in widths:
                raise SboraError(
                    f"the token {embedding.token!r} has vectors of width {vectors.shape[1]}, which do not fit the "
                    f"base model's {component} ({', '.join(map(str, sorted(set(widths)))) or 'it has none'})",
                    hint="Give its base model with --base.",
                )
            found[f"{component}.{embedding.token}"] = vectors
    return found
