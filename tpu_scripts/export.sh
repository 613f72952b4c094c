#!/usr/bin/env bash
# For `[after] script = tpu_scripts/export.sh`: when training is done, worker 0 leaves the model as URL/hf in the bucket, from
# where `tpu.py cp RUN.ini run:hf .` brings it to the laptop. A second time it is written again.
set -euo pipefail
new=$(mktemp -d "$EASYLM_BASE/export.XXXXXX")
trap 'rm -rf "$new"' EXIT
# It only copies, piece by piece: one host's CPU does it, and the slice's chips are not asked for.
JAX_PLATFORMS=cpu python -m easylm_mling export-hf "$RUN_DIR" "$new/hf"
gcloud storage cp --recursive "$new/hf" "$RUN_URL/" --quiet
