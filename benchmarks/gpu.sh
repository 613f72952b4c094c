#!/usr/bin/env bash
# Everything that this package should be seen to do on a GPU, in one command, on a machine with one:
#   benchmarks/gpu.sh [--only PART ...] [override=value ...]
# makes an environment in .venv-gpu (JAX for the driver's CUDA, torch, transformers) and runs benchmarks/gpu.py. What it prints
# is also in runs/gpu. Ends with 3, after one line, where there is no GPU.
# benchmarks/gpu.sh --tiny takes the environment of `make test` and the CPU, to try the script itself.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"

for argument in "$@"; do
  if [ "$argument" = --tiny ]; then
    exec "${PYTHON:-.venv/bin/python}" benchmarks/gpu.py "$@"
  fi
done
if ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1) || [ -z "$driver" ]; then
  echo "no GPU: nvidia-smi finds none; run this on a machine with an NVIDIA driver, or try it with --tiny" >&2
  exit 3
fi
# The first driver of CUDA 13 is 580.
cuda=cuda12
if [ "${driver%%.*}" -ge 580 ]; then cuda=cuda13; fi
if [ ! -e .venv-gpu/complete ]; then
  "${PYTHON:-python3}" -m venv .venv-gpu
  .venv-gpu/bin/python -m pip install --quiet -r requirements-test.lock "jax[$cuda]==$(sed -n 's/^jax==//p' requirements.lock)"
  .venv-gpu/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
  touch .venv-gpu/complete
fi
exec .venv-gpu/bin/python benchmarks/gpu.py "$@"
