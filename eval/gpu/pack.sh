#!/usr/bin/env bash
# eval/gpu/pack.sh KIT: wheels of what a bare Linux machine with Python 3.12, torch, transformers and peft lacks for run.sh.
set -euo pipefail
kit=$1
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$kit"
pinned() { grep -i "^$1==" "$here/constraints.txt"; }
pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$kit" \
    "$(pinned diffusers)" "$(pinned importlib_metadata)"
du -sh "$kit"
