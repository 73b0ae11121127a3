"""The concept file: an adapter with everything needed to use it, validated when read and written atomically."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sbora_diffusion.adapters.basis import Side, Spec
from sbora_diffusion.adapters.digest import digest_of
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import check_regular, write_file

METADATA, DIGEST = "sbora", "sbora.sha256"  # keys of the file's metadata
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer", "model")


@dataclass(frozen=True, eq=False)
class Factor:
    """SBoRA's change of one layer: columns (FA) or rows (FB) of its weight, with the scale folded in."""

    index: Tensor  # (r,) int64
    weight: Tensor  # float32, (out, r) for fa, (r, in) for fb


@dataclass(frozen=True, eq=False)
class Dense:
    """Another method's change of a whole weight; every scale is folded in. Float32."""

    up: Tensor  # (out, r), or without `down` the change itself (out, in)
    down: Tensor | None = None  # (r, in)
    magnitude: Tensor | None = None  # (out, 1) of DoRA (Liu et al. 2024, eq. 5), the norms of the new weight's rows

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by their names in a file."""
        if self.down is None:
            return {"delta": self.up}
        return {"up": self.up, "down": self.down} | ({} if self.magnitude is None else {"magnitude": self.magnitude})

    @classmethod
    def from_parts(cls, layer: str, parts: Mapping[str, Tensor]) -> "Dense":
        """Invert `parts`."""
        if parts.keys() == {"delta"}:
            return cls(parts["delta"])
        if not {"up", "down"} <= parts.keys() <= {"up", "down", "magnitude"}:
            raise SboraError(f"layer {layer} has the parts {', '.join(sorted(parts))}, expected delta, or up and down")
        up, down, magnitude = parts["up"], parts["down"], parts.get("magnitude")
        fits = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
        if not fits or (magnitude is not None and magnitude.shape != (len(up), 1)):
            raise SboraError(f"layer {layer}: up, down and magnitude do not fit each other")
        return cls(up, down, magnitude)

    def delta(self, weight: Tensor | None) -> Tensor:
        """Return ΔW (out, in), float32 on the CPU; DoRA's depends on the untouched base weight (out, in)."""
        change = self.up if self.down is None else self.up @ self.down
        if self.magnitude is None:
            return change
        assert weight is not None
        original = weight.detach().to("cpu", torch.float32)
        turned = original + change
        return self.magnitude * turned / turned.norm(dim=1, keepdim=True) - original


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory: one trained concept, or a merge of several.

    Attributes:
        factors: by "<component>.<canonical layer>", such as "unet.mid_block.attentions.0.proj_in".
        tokens: learned embeddings by "<component>.<token>", such as "text_encoder.<dog>", (n, hidden) float32; of
            spec.embedding_layers L > 0: (L · n, hidden), layer by layer.
        dense: changes by methods other than SBoRA, by the same names as `factors`.
    """

    spec: Spec
    factors: dict[str, Factor]
    tokens: dict[str, Tensor]
    dense: dict[str, Dense] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read a concept file; any defect raises a SboraError that names the file."""
        try:
            return _parse(*_read(Path(path)))
        except SboraError as defect:
            raise SboraError(f"{path}: {defect}", defect.hint) from None

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write a concept file atomically.

        Raises:
            SboraError: the file exists and `force` is false, the adapter is invalid, or the disk is full.
        """
        _check(self)
        try:
            write_file(Path(path), self.to_bytes(), overwrite=force)
        except FileExistsError:
            raise SboraError(f"{path} exists", hint="Choose another name, or overwrite it with --force.") from None

    def to_bytes(self, with_digest: bool = True) -> bytes:
        """Return the content of the concept file, the same bytes for the same adapter.

        Args:
            with_digest: False for the content as earlier versions wrote it.
        """
        tensors = {f"tokens.{key}": embedding for key, embedding in self.tokens.items()}
        for key, factor in self.factors.items():
            tensors |= {f"{key}.index": factor.index.to(torch.int32), f"{key}.weight": factor.weight}
        for key, dense in self.dense.items():
            tensors |= {f"{key}.{part}": tensor for part, tensor in dense.parts().items()}
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        text = self.spec.to_json()
        metadata = {METADATA: text} | ({DIGEST: _digest(text, contiguous)} if with_digest else {})
        return safetensors_bytes(contiguous, metadata)

    def component(self, name: str) -> dict[str, Factor]:
        """Return the factors of one component, by canonical layer."""
        return {key.removeprefix(f"{name}."): f for key, f in self.factors.items() if key.split(".")[0] == name}

    def num_weights(self) -> int:
        """Count the parameters, without the token embeddings."""
        parts = [tensor for dense in self.dense.values() for tensor in dense.parts().values()]
        return sum(tensor.numel() for tensor in (*(factor.weight for factor in self.factors.values()), *parts))

    def describe(self) -> str:
        """Return a summary of a few lines."""
        spec, count = self.spec, self.num_weights()
        tokens = ", ".join(f"{token} ({noun})" for token, noun in spec.tokens.items()) or "none"
        lines = [
            f"{spec.name}: {spec.method or f'SBoRA-{spec.side.upper()}'} of rank {spec.rank}, {count:,} parameters",
            f"base: {spec.base_id} [{spec.base_fingerprint}]",
            f"tokens: {tokens}",
            f"intervals: {', '.join(map(str, spec.intervals)) or 'none'} (seed {spec.seed})",
        ]
        written = [key.split(".")[0] for key in (*self.factors, *self.dense)]
        lines += [f"{component}: {written.count(component)} layers" for component in sorted(set(written))]
        lines += [f"merged from: {', '.join(spec.parents)}"] if spec.parents else []
        lines += [f"{name}: {value}" for name, value in spec.metrics.items()]
        return "\n".join(line if line.isprintable() else ascii(line) for line in lines)


def read_spec(path: str | Path) -> Spec:
    """Read the specification of a concept file from its header, and check its digest; tensors are not read."""
    try:
        text, digest, _ = _read(Path(path), header_only=True)
        _check_digest(text, digest)
        return Spec.from_json(text)
    except SboraError as defect:
        raise SboraError(f"{path}: {defect}", defect.hint) from None


def check_fits(adapter: Adapter, layer_shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise SboraError unless the adapter's layers fit `layer_shapes` ("<component>.<layer>" -> (out, in))."""
    for key in (*adapter.factors, *adapter.dense):
        if key not in layer_shapes:
            raise SboraError(
                f"adapter {adapter.spec.name!r} has the layer {key}, which the model does not have",
                hint=f"It was trained for {adapter.spec.base_id}.",
            )
    for key, factor in adapter.factors.items():
        check_factor(key, factor, adapter.spec.side, layer_shapes[key])
    for key, dense in adapter.dense.items():
        inner = dense.up if dense.down is None else dense.down
        if (dense.up.shape[0], inner.shape[1]) != layer_shapes[key]:
            raise SboraError(
                f"the adapter's change of layer {key} does not fit its weight of shape {layer_shapes[key]}"
            )


def check_factor(layer: str, factor: Factor, side: Side, shape: tuple[int, int]) -> None:
    """Raise SboraError unless a factor fits a weight of shape (out, in)."""
    (out_dim, in_dim), rank = shape, len(factor.index)
    fits = tuple(factor.weight.shape) == ((out_dim, rank) if side == "fa" else (rank, in_dim))
    if not fits or int(factor.index.max()) >= (in_dim if side == "fa" else out_dim):
        raise SboraError(f"the adapter's factor of layer {layer} does not fit its weight of shape {out_dim}×{in_dim}")


def has_digest(path: str | Path) -> bool:
    """Return whether a concept file has a digest, against which `load` checks it; earlier versions wrote none."""
    return bool(_read(Path(path), header_only=True)[1])


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file, the same bytes for the same tensors and metadata.

    The library's order of metadata differs from run to run, so the header is rewritten here: eight bytes of length,
    then JSON padded with spaces to a multiple of eight.
    """
    content = safetensors.torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    start = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:start])}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + content[start:]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the digests of the specification, which is read without the tensors, and of everything."""
    return f"{digest_of(text)} {digest_of([text, tensors])}"


def _check_digest(text: str, digest: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Raise SboraError unless the digest fits specification and, if given, tensors; files may have none."""
    is_sound = digest_of(text) == digest.partition(" ")[0] if tensors is None else digest == _digest(text, tensors)
    if digest and not is_sound:
        raise SboraError("is damaged: its content does not fit its SHA-256 digest", hint="Use a copy, or train anew.")


def _read(path: Path, header_only: bool = False) -> tuple[str, str, dict[str, Tensor]]:
    """Return specification, digest ("" without one) and tensors, copied so that nothing refers to the file."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if METADATA not in metadata:
                raise SboraError("is not a concept file: it has no sbora metadata", hint="Import other LoRA files.")
            if unknown := metadata.keys() - {METADATA, DIGEST, "format"}:
                raise SboraError(f"has the unknown metadata {min(unknown)!r}, expected {METADATA} and {DIGEST}")
            keys = [] if header_only else file.keys()
            tensors = {key: file.get_tensor(key).clone() for key in keys}
            return metadata[METADATA], metadata.get(DIGEST, ""), tensors
    except FileNotFoundError:
        raise SboraError("no such file") from None
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        # RuntimeError: torch opens the file a second time, when it may have been deleted
        raise SboraError(f"cannot be read as safetensors ({error})") from None


def _parse(metadata: str, digest: str, tensors: dict[str, Tensor]) -> Adapter:
    _check_digest(metadata, digest, tensors)
    spec = Spec.from_json(metadata)
    tokens, halves, parts = {}, {}, {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if key.startswith("tokens."):
            tokens[key.removeprefix("tokens.")] = tensor
        elif kind in ("index", "weight"):
            halves.setdefault(layer, {})[kind] = tensor
        elif kind in ("up", "down", "magnitude", "delta") and spec.method:
            parts.setdefault(layer, {})[kind] = tensor
        else:
            raise SboraError(f"unknown key {key!r}")
    factors = {}
    for layer, half in halves.items():
        if half.keys() != {"index", "weight"}:
            raise SboraError(f"layer {layer} lacks its {'index' if 'weight' in half else 'weight'}")
        if half["index"].dtype != torch.int32:
            raise SboraError(f"index of layer {layer} has dtype {half['index'].dtype}, expected int32")
        factors[layer] = Factor(half["index"].to(torch.int64), half["weight"])
    adapter = Adapter(spec, factors, tokens, {layer: Dense.from_parts(layer, found) for layer, found in parts.items()})
    _check(adapter)
    return adapter


def _check(adapter: Adapter) -> None:
    """Raise SboraError unless the adapter is valid in itself, whatever its base model."""
    for key in (*adapter.factors, *adapter.dense):
        component, _, layer = key.partition(".")
        if component not in COMPONENTS or not layer:
            raise SboraError(f"layer {key!r} belongs to no known component, expected one of {', '.join(COMPONENTS)}")
    for key, dense in adapter.dense.items():
        for part, tensor in dense.parts().items():
            _check_values(f"{key}.{part}", tensor)
    for key, factor in adapter.factors.items():
        _check_values(key, factor.weight)
        index, dim = factor.index, 1 if adapter.spec.side == "fa" else 0
        if index.ndim != 1 or factor.weight.shape[dim] != len(index) or len(index) > adapter.spec.rank:
            shapes = f"{tuple(index.shape)} and {tuple(factor.weight.shape)}"
            raise SboraError(f"layer {key}: index and weight of shapes {shapes} do not match rank {adapter.spec.rank}")
        if int(index.min()) < 0 or len(index.unique()) != len(index):
            raise SboraError(f"layer {key}: the index has negative or repeated entries")
    for key, embedding in adapter.tokens.items():
        component, _, token = key.partition(".")
        if component not in COMPONENTS or token not in adapter.spec.tokens:
            raise SboraError(f"embedding {key!r} belongs to no known component and token")
        _check_values(key, embedding)
        if len(embedding) % max(1, adapter.spec.embedding_layers):
            raise SboraError(
                f"{key}: {len(embedding)} embeddings cannot be divided among {adapter.spec.embedding_layers} layers"
            )


def _check_values(key: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32 or tensor.ndim != 2 or tensor.numel() == 0:
        raise SboraError(f"{key}: got {tensor.dtype} {tuple(tensor.shape)}, expected a float32 matrix")
    if not tensor.isfinite().all():
        hint = "The training has diverged: lower the learning rate."
        raise SboraError(f"{key}: some values are not finite", hint)
