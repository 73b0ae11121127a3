"""What only reads and writes concept files starts quickly: it loads neither PEFT nor a model library."""

import subprocess
import sys
from pathlib import Path

from sbora_diffusion.adapters.basis import Interval

from ..adapters.random_adapters import adapter

HEAVY = ("peft", "transformers", "diffusers", "accelerate", "bitsandbytes")
SCRIPT = f"""
import sys
from typer.testing import CliRunner
from sbora_diffusion.cli.app import app
for command in sys.argv[1:]:
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, (command, done.output)
    loaded = [name for name in {HEAVY} if name in sys.modules]
    assert not loaded, (command, loaded)
"""


COMMANDS = ("inspect dog", "inspect dog cat", "ledger", "merge dog cat --how sum", "remove dog --yes")


def test_commands_on_files_load_no_model_library(tmp_path: Path) -> None:
    for number, name in enumerate(("dog", "cat")):
        stored = adapter(Interval(4 * number, 4), name=name, tokens={f"<{name}>": name})
        stored.save(tmp_path / f"adapters/{name}.safetensors")
    script = [sys.executable, "-c", SCRIPT, *COMMANDS]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
