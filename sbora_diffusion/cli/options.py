"""Options that several commands share, the folders they write to, and the parsing of KEY=VALUE and lists."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ADAPTERS, RUNS = Path("adapters"), Path("runs")
EVALUATIONS, EXPORTS, PIPELINES = Path("evaluations"), Path("exports"), Path("pipelines")

Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Base = Annotated[
    str,
    typer.Option(metavar="ID", help="emoji64, sd15, sd21, sdxl, sd3, flux, a folder, a checkpoint file or a hub id."),
]
AdapterBase = Annotated[str, typer.Option(metavar="ID", help="Default: the base model of the first adapter.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]
Floats = Annotated[str, typer.Option(metavar="W,W,…", help="One factor per adapter; default: 1, or the method's own.")]


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """["steps=20"] is {"steps": "20"}."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"got {setting!r}, expected KEY=VALUE such as steps=100", param_hint="--set")
        parsed[key.strip()] = value.strip()
    return parsed


def convert(settings: Mapping[str, str], kinds: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Convert each setting to its type; other settings than these are usage errors."""
    converted = {}
    for key, value in settings.items():
        if key not in kinds:
            raise typer.BadParameter(f"got {key!r}, expected one of {', '.join(kinds)}", param_hint="--set")
        try:
            converted[key] = kinds[key](value)
        except ValueError:
            expected = "true or false" if kinds[key] is boolean else "a number"
            raise typer.BadParameter(f"got {key}={value}, expected {expected}", param_hint="--set") from None
    return converted


def boolean(text: str) -> bool:
    """Read "true", "1", "false" or "0"."""
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def parse_floats(text: str) -> list[float] | None:
    """ "1,0.8" is [1.0, 0.8]; "" is None."""
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"got {text!r}, expected numbers such as 1,0.8") from None
