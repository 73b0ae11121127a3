#!/usr/bin/env bash
# eval/gpu/run.sh KIT PLAN OUT [SECONDS]: the cells of a plan on a bare machine with one GPU; what is to be kept goes to OUT.
# Images stay behind but for the merges of seed 0, and adapters but for the folders named in ADAPTERS
# ("table/adapters/lora …"); both come in pieces of 15 MB.
set -euo pipefail
began=$SECONDS
kit=$(realpath "$1") plan=$(realpath "$2") out=$(realpath -m "$3") deadline=${4:-500}
here=$(cd "$(dirname "$0")/../.." && pwd)
work=${WORK:-/tmp/cells}
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target /tmp/site "$kit"/*.whl
export PYTHONPATH=$here:/tmp/site OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
command -v nvidia-cuda-mps-control && nvidia-cuda-mps-control -d || echo "no MPS: the processes take turns"
cd "$here"
mkdir -p "$work" "$out"
python3 eval/pooled_cells.py "$plan" "$work" --jobs "${JOBS:-16}" --deadline $((deadline - (SECONDS - began))) \
    >"$work/log.txt" 2>&1 || echo "pooled_cells.py ended with $?"
grep -A 20 FAILED "$work/log.txt" | head -n 60 || true
tail -n 3 "$work/log.txt"
cd "$work"
find . -name log.txt -o -name "table.*" -o -name "*.json" -not -path "*/runs/*" | tar -cJf "$out/cells.tar.xz" --files-from=-
find . -path "*/scores/*/0/*+*.png" | tar -c --files-from=- | split --bytes=15M - "$out/merges-of-seed-0.tar."
if [[ ${ADAPTERS:-} ]]; then
    tar -c $ADAPTERS | split --bytes=15M - "$out/adapters.tar."
fi
ls -l "$out"
