"""Find the methods in this folder: adding a file with a tuple `METHODS` is enough."""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from sbora_diffusion import methods
from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.methods.base import Method
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError, guess

_SHARED = {"base", "calibration", "live", "merging", "peft_layers", "registry"}  # files that describe no method


def _find_all() -> dict[str, Method]:
    """Return all methods by name, SBoRA first, then by file name."""
    names = {file.name for file in iter_modules(methods.__path__)} - _SHARED
    files = sorted(names, key=lambda name: (name != "sbora", name))
    found = [import_module(f"{methods.__name__}.{name}").METHODS for name in files]
    return {method.name: method for group in found for method in group}


_ALL = _find_all()
METHODS: tuple[str, ...] = tuple(_ALL)


def find_method(name: str) -> Method:
    """Return the method of this name."""
    if name not in _ALL:
        raise SboraError(f"got unknown method {name!r}", f"{guess(name, METHODS)}choose from {', '.join(METHODS)}")
    return _ALL[name]


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
