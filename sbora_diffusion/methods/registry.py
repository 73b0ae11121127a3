"""What a training method defines, and the methods of this folder.

A file that describes methods has a tuple `METHODS` of `Method`s, each named as the file is, or as it begins (sbora.py:
sbora-fa); only the file of the requested method is imported. These files import PEFT and diffusers inside the functions
that inject, because merging needs neither.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sbora_diffusion.adapters.basis import FORMAT_OF_METHODS, Interval, Side
from sbora_diffusion.adapters.file import Adapter, Dense, Factor
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError, guess

if TYPE_CHECKING:
    from sbora_diffusion.adapters.layer import SboraLayer
    from sbora_diffusion.methods.calibration import SampledInputs
    from sbora_diffusion.models.base import Base

_SHARED = {"__init__", "calibration", "live", "merging", "registry"}  # files that describe no method
ADAPTER = "concept"  # the adapter's name inside PEFT

LayerSize = Callable[[tuple[int, int], TrainConfig], int]
Learned = tuple[dict[str, Factor], dict[str, Dense]]  # by "<component>.<canonical layer>"
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, eq=False)
class Injected:
    """What a method has put into a base model.

    Attributes:
        trained: the trained parameters, by component.
        collect: returns what was learned, as a concept file holds it.
        sbora: SBoRA's layers, by component and canonical name, for the penalties on its output.
    """

    trained: dict[str, list[nn.Parameter]]
    collect: Callable[[], Learned]
    sbora: dict[str, dict[str, "SboraLayer"]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Injection:
    """What a method injects into, and for which concept.

    Attributes:
        layers: component -> canonical names of the layers to adapt.
        concept: the concept's name.
        interval: of the ledger, for a method that owns columns or rows.
    """

    base: "Base"
    layers: Mapping[str, Sequence[str]]
    concept: str
    interval: Interval | None
    config: TrainConfig

    @property
    def rank(self) -> int:
        return self.config.method.rank


Inject = Callable[[Injection], AbstractContextManager[Injected]]


@dataclass(frozen=True, eq=False)
class MergeRequest:
    """What a merge works on.

    Attributes:
        base: the base model; None for a merge that does not need it.
        prior_weight: how strongly `fuse` preserves the output on the prior prompts.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    base: "Base | None"
    prior_weight: float
    on_progress: Progress | None = None

    @property
    def model(self) -> "Base":
        """The base model, of a merge that needs it."""
        assert self.base is not None
        return self.base

    @cached_property
    def inputs(self) -> "SampledInputs":
        """The layers' inputs while each concept is sampled."""
        from sbora_diffusion.methods.calibration import SampledInputs

        return SampledInputs(self.model, self.adapters, on_progress=self.on_progress)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """One way to merge a method's concepts.

    Attributes:
        weight: number of adapters -> each one's default weight.
        needs_base: whether it reads the base model's weights or outputs.
        samples: whether it only samples from the base model, so that half precision will do.
        fallback: the merge to use instead where the base model is not at hand; "" if there is none.
    """

    run: Callable[[MergeRequest], Adapter]
    weight: Callable[[int], float] = lambda _: 1.0
    needs_base: bool = False
    samples: bool = False
    fallback: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """One way to teach a concept.

    Attributes:
        inject: puts its parameters into a base model without changing the output, and takes them out at the end.
        layer_size: ((out, in) of a layer, config) -> number of parameters that it trains there.
        merges: the ways to merge it by name, the default one first.
        adapts: whether it adapts a layer, by "<component>.<canonical layer>".
        side: which side of the weights is trained: columns (fa) or rows (fb).
        owns_interval: whether the ledger assigns columns or rows to each concept.
        reads_weights: whether it reads the base model's whole weights, which nf4 and sharding do not hold.
        fixed_noun: whether the last embedding of the token is the class noun's and frozen: "<new1> dog".
        file_format: the format of its concept files.
        peft_options: what its LoraConfig has besides rank and targets.
        accepts: raises SboraError for settings that do not fit, besides those that `check` knows.
    """

    name: str
    inject: Inject
    layer_size: LayerSize
    merges: Mapping[str, Merge]
    adapts: Callable[[str], bool] = lambda _: True
    side: Side = "fa"
    owns_interval: bool = False
    reads_weights: bool = False
    fixed_noun: bool = False
    file_format: int = FORMAT_OF_METHODS
    peft_options: Mapping[str, Any] = field(default_factory=dict)
    accepts: Callable[[TrainConfig], None] = lambda _: None

    def check(self, config: TrainConfig) -> None:
        """Raise SboraError for settings that do not fit the method."""
        loss = config.loss
        if not self.owns_interval and (loss.output_penalty or loss.erasure_weight):
            raise SboraError(
                f"output_penalty and erasure_weight need columns or rows, which {self.name} does not own",
                "--set output_penalty=0 --set erasure_weight=0",
            )
        self.accepts(config)
        if config.model.precision == "nf4" and (self.reads_weights or loss.erasure_weight):
            raise SboraError(f"{self.name} reads whole weights, which nf4 does not hold", "--set precision=bf16")

    def check_sharding(self, sharded: bool) -> None:
        """Raise SboraError if the base model's weights are sharded over processes and the method cannot be so."""
        if sharded and self.reads_weights:
            raise SboraError(
                f"{self.name} reads whole weights, of which each process would hold a shard",
                "accelerate launch --multi_gpu, or another --method",
            )

    def layers(self, base: "Base", config: TrainConfig) -> dict[str, list[str]]:
        """Return the canonical names of the layers to adapt, by component."""
        trains_text = config.optim.text_encoder_learning_rate > 0
        found = base.adapted_layers(config.method.blocks, text_encoders=trains_text).items()
        chosen = {part: [name for name in names if self.adapts(f"{part}.{name}")] for part, names in found}
        return {part: names for part, names in chosen.items() if names}

    def num_weights(self, base: "Base", config: TrainConfig) -> int:
        """Count the parameters that it trains in the layers."""
        keys = [f"{component}.{name}" for component, names in self.layers(base, config).items() for name in names]
        return sum(self.layer_size(base.layer_shapes[key], config) for key in keys)

    def num_parameters(self, base: "Base", config: TrainConfig) -> int:
        """Count all parameters that it trains, those of the token's embeddings included."""
        encoders: list[Any] = [base.component(encoder.component) for encoder in base.learners]
        width = sum(encoder.get_input_embeddings().weight.shape[1] for encoder in encoders)
        vectors = config.method.token_vectors - (self.fixed_noun and config.method.token_vectors > 1)
        layers = 1
        if config.method.layerwise_tokens:
            from sbora_diffusion.models.layerwise_tokens import cross_attentions

            layers = len(cross_attentions(base))
        return self.num_weights(base, config) + layers * vectors * width

    def find_merge(self, how: str) -> Merge:
        """Return the merge of this name, or the default one for "".

        Raises:
            SboraError: the method has no such merge.
        """
        how = how or next(iter(self.merges))
        if how not in self.merges:
            raise SboraError(f"got --how {how}, expected {' or '.join(self.merges)} for {self.name}")
        return self.merges[how]


@cache
def _methods_in(file: str) -> dict[str, Method]:
    return {method.name: method for method in import_module(f"sbora_diffusion.methods.{file}").METHODS}


@cache
def _files() -> list[str]:
    """List the files that describe methods, SBoRA's first."""
    names = {path.stem for path in Path(__file__).parent.glob("*.py")} - _SHARED
    return sorted(names, key=lambda name: (name != "sbora", name))


def method_names() -> tuple[str, ...]:
    """List all methods, SBoRA first."""
    return tuple(name for file in _files() for name in _methods_in(file))


def find_method(name: str) -> Method:
    """Return the method of this name."""
    words = name.replace("-", "_")
    for file in sorted(_files(), key=lambda file: not f"{words}_".startswith(f"{file}_")):  # the likeliest first
        if name in _methods_in(file):
            return _methods_in(file)[name]
    names = method_names()
    raise SboraError(f"got unknown method {name!r}", f"{guess(name, names)}choose from {', '.join(names)}")


def configure(base: str, method: str, overrides: Mapping[str, str]) -> TrainConfig:
    """Read the recipe of a base and method and apply overrides (`TrainConfig.from_recipe`), checked by the method.

    Raises:
        SboraError: an unknown method, recipe or setting, a value that is not allowed or does not fit the method.
    """
    find_method(method)
    config = TrainConfig.from_recipe(base, method, overrides)
    find_method(config.method.name).check(config)
    return config


def method_side(name: str) -> Side:
    """Return the side that a method trains: rows (fb) or columns (fa, also for those that own neither)."""
    return find_method(name).side
