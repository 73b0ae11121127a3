"""The methods that can be trained: what each adds to which layers, and how its paper merges it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError, guess

if TYPE_CHECKING:
    from peft import LoraConfig

Kind = Literal["fa", "fb", "lora", "dora", "orthogonal", "full", "none"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to teach a concept.

    Attributes:
        kind: columns (fa), rows (fb), low-rank factors (lora; orthogonal: the input side frozen), DoRA's with a
            magnitude, whole matrices of cross-attention's keys and values (full), or no weights at all.
        merges: the ways to merge it, its paper's own first.
        fixed_noun: the last embedding of the token is the class noun's and stays so: "<new1> dog".
    """

    name: str
    kind: Kind
    merges: tuple[str, ...]
    fixed_noun: bool = False

    @property
    def owns_interval(self) -> bool:
        """Whether the ledger hands out its columns or rows."""
        return self.kind in ("fa", "fb")

    @property
    def needs_whole_weights(self) -> bool:
        """Whether it reads more of the base model than its answers."""
        return self.kind in ("dora", "full")


_ALL = (
    Method(name="sbora-fa", kind="fa", merges=("sum", "fuse")),
    Method(name="sbora-fb", kind="fb", merges=("sum", "fuse")),
    Method(name="lora", kind="lora", merges=("average", "sum")),
    Method(name="dora", kind="dora", merges=("average", "sum")),
    Method(name="orthogonal", kind="orthogonal", merges=("sum", "average")),
    Method(name="mix-of-show", kind="lora", merges=("gradient", "average", "sum")),
    Method(name="custom-diffusion", kind="full", merges=("constrained",), fixed_noun=True),
    Method(name="textual-inversion", kind="none", merges=("tokens",)),
    Method(name="blocklora", kind="fb", merges=("sum",)),
)
METHODS: tuple[str, ...] = tuple(method.name for method in _ALL)
ORTHOGONAL_WEIGHT = 0.6  # Orthogonal Adaptation (Po et al. 2024) sums at this strength


def find_method(name: str) -> Method:
    """The method of this name."""
    for method in _ALL:
        if method.name == name:
            return method
    raise SboraError(f"got unknown method {name!r}", f"{guess(name, METHODS)}choose from {', '.join(METHODS)}")


def configure(base: str, method: str, overrides: Mapping[str, str]) -> TrainConfig:
    """Read the recipe of a base and method and apply overrides (`TrainConfig.from_recipe`), checked by the method.

    Raises:
        SboraError: an unknown method, recipe or setting, a value that is not allowed or does not fit the method.
    """
    found = find_method(method)
    config = TrainConfig.from_recipe(base, method, overrides)
    _check_fits(found, config)
    return config


def _check_fits(method: Method, config: TrainConfig) -> None:
    loss, adapts_nothing = config.loss, method.kind == "none"
    if not method.owns_interval and (loss.output_penalty or loss.erasure_weight):
        raise SboraError(f"output_penalty and erasure_weight are for columns and rows, {method.name} has neither")
    if adapts_nothing and config.method.blocks:
        raise SboraError(f"blocks says which layers are adapted, {method.name} adapts none", "--set blocks=")
    if adapts_nothing and not config.optim.token_learning_rate:
        raise SboraError(f"got token_learning_rate=0: {method.name} would learn nothing", "leave it out")
    if config.model.precision == "nf4" and (method.needs_whole_weights or loss.erasure_weight):
        raise SboraError(f"{method.name} reads whole weights, nf4 has none", "--set precision=bf16")


def method_side(name: str) -> Side:
    """The side that a method trains: rows (fb) or columns (fa, also for those that own neither)."""
    return "fb" if find_method(name).kind == "fb" else "fa"


def merge_choice(name: str, how: str) -> str:
    """`how`, or "" for the method's own; SboraError if the method cannot be merged like this."""
    merges = find_method(name).merges
    if how and how not in merges:
        raise SboraError(f"got --how {how}, expected {' or '.join(merges)} for {name}")
    return how or merges[0]


def default_weights(name: str, how: str, count: int) -> list[float]:
    """What each of `count` adapters counts: federated averaging 1/count, Orthogonal Adaptation 0.6, else 1."""
    if how == "average":
        return [1 / count] * count
    return [ORTHOGONAL_WEIGHT if name == "orthogonal" else 1.0] * count


def lora_config(rank: int, targets: Sequence[str], use_dora: bool = False) -> "LoraConfig":
    """A plain LoRA of scale one on the targets (for SBoRA, `attach` upgrades it), or DoRA."""
    from peft import LoraConfig  # seconds, and `merge` needs only the names

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=True, use_dora=use_dora)
