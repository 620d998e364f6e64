#!/usr/bin/env bash
# Fills .whl/ with what the lent machine (Python 3.12, torch 2.11 for CUDA 13) lacks; docs/benchmarks.md has the call.
# av and decord stay here: with them all would be too large, and nothing that gpu.py runs reads or writes a video.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
OURS=(diffusers transformers pydantic pydantic-core typer ftfy bitsandbytes)  # in the tested versions, with what they need:
THEIRS=(importlib-metadata annotated-types typing-extensions typing-inspection wcwidth)
# xformers' wheel is built for CUDA 12 and finds that runtime on LD_LIBRARY_PATH; setuptools builds this project there.
EXTRA=(xformers==0.0.35 nvidia-cuda-runtime-cu12==12.8.90 'setuptools>=77')

platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
rm -rf .whl
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
  --constraint constraints.txt --dest .whl "${OURS[@]}" "${THEIRS[@]}" "${EXTRA[@]}"

# bitsandbytes brings its kernels for every version of CUDA, ROCm and XPU: 40 MiB, of which one file is used.
"$PYTHON" - .whl/bitsandbytes-*.whl <<'END'
import sys, zipfile
from pathlib import Path

path = Path(sys.argv[1])
with zipfile.ZipFile(path) as whole:
    kept = [(name, whole.read(name)) for name in whole.namelist() if not name.endswith(".so") or "cuda130" in name]
with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as smaller:
    for name, content in kept:
        smaller.writestr(name, content)
END

tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s | awk '{sum += $1} END {print sum}')
wheels=$(cat .whl/*.whl | wc -c)
echo "$(ls .whl | wc -l) wheels, $((wheels / 1048576)) MiB; the tree, $((tree / 1048576)) MiB; 64 MiB may travel"
test $((wheels + tree)) -lt $((64 * 1048576))
