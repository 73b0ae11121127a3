"""The Space and the build install the tested versions."""

import re
import tomllib
from pathlib import Path

from sbora_diffusion import __version__

ROOT = Path(__file__).parents[2]


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines), f"{path} has a line without =="
    return {line.partition("==")[0]: line.partition("==")[2] for line in lines}


def test_the_space_installs_the_tested_versions() -> None:
    space, tested = pins(ROOT / "app/requirements.txt"), pins(ROOT / "constraints.txt")
    assert space.pop("sbora-diffusion[ui]") == __version__
    assert {name: tested[name] for name in space} == space
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["ui"]]
    assert {re.split("[<>=]", requirement)[0] for requirement in needed} == set(space)
    assert f"sdk_version: {space['gradio']}\n" in (ROOT / "app/README.md").read_text()


def test_the_build_system_is_pinned() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", requirement) for requirement in requires)
