"""PNG files that contain the settings they were generated with."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sbora_diffusion import __version__
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import check_regular, write_file
from sbora_diffusion.utils.text import parse_json

KEY = "sbora"  # of the PNG's text chunk
MAX_PIXELS = 4096 * 4096  # of a file whose settings are read


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that an image depends on, besides the weights."""

    base: str
    prompt: str
    steps: int
    guidance: float
    negative_prompt: str = ""
    seed: int = 0
    precision: str = "fp32"  # of the base model's weights and arithmetic
    concepts: Mapping[str, float] = field(default_factory=dict)  # name -> strength
    regions: tuple[str, ...] = ()  # as `parse_region` reads them
    whole_scene: bool = True  # every region's prompt describes the whole image
    gated: bool = False  # without regions: each concept acts only where it is named

    @property
    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of `generate` and `generate_regions`."""
        return {"steps": self.steps, "guidance": self.guidance, "negative_prompt": self.negative_prompt}

    def to_json(self) -> str:
        """Return the settings and the version of this package as JSON."""
        return json.dumps(asdict(self) | {"concepts": dict(self.concepts), "version": __version__}, ensure_ascii=False)


def save_numbered(image: Image.Image, folder: Path, settings: Settings) -> Path:
    """Write a PNG with its settings atomically, under the next free number in the folder; nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = "-".join(re.findall(r"[^\W_]+", settings.prompt.lower()))[:60] or "image"
    info = PngInfo()
    info.add_itxt(KEY, settings.to_json())
    first = 1 + max((int(path.name[:4]) for path in folder.glob("[0-9][0-9][0-9][0-9]-*.png")), default=0)
    for number in count(first):
        path = folder / f"{number:04d}-{slug}.png"
        try:
            write_file(path, partial(image.save, format="png", pnginfo=info))
            return path
        except FileExistsError:  # another process took the number
            continue
    raise AssertionError("count never ends")


def read_settings(path: Path) -> Settings:
    """Read the settings of an image.

    Raises:
        SboraError: not a PNG, or one without our settings.
    """
    hint = "Give an image as this program saved it: messengers and editors remove the settings."
    try:
        check_regular(path)
        with Image.open(path, formats=["PNG"]) as file:
            if file.width * file.height > MAX_PIXELS:
                raise SboraError(f"{path.name} is too large: {file.width} × {file.height} pixels", hint)
            file.load()  # text may follow the pixels
            text = getattr(file, "text", {}).get(KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise SboraError(f"{path.name} is not a readable PNG", hint) from None
    if text is None:
        raise SboraError(f"{path.name} contains no settings", hint)
    try:
        return _parse(parse_json(text))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise SboraError(f"the settings in {path.name} are damaged", hint) from None


def _parse(content: Mapping[str, Any]) -> Settings:
    return Settings(
        base=str(content["base"]),
        prompt=str(content["prompt"]),
        negative_prompt=str(content["negative_prompt"]),
        seed=int(content["seed"]),
        steps=int(content["steps"]),
        guidance=float(content["guidance"]),
        precision=str(content.get("precision", "fp32")),
        concepts={str(name): float(strength) for name, strength in content["concepts"].items()},
        regions=tuple(str(region) for region in content.get("regions", ())),
        whole_scene=bool(content.get("whole_scene", True)),
        gated=bool(content.get("gated", False)),
    )
