#!/usr/bin/env bash
# For `[setup] script = tpu_scripts/import.sh`: brings a model of the Hugging Face hub to the bucket, once, as a checkpoint for
# init_from=$IMPORT_TO, and its tokenizer to every worker, as tokenizer/. In [environment] of the run file:
#   IMPORT_MODEL = google/gemma-7b
#   IMPORT_TO = gs://my-bucket/checkpoints/gemma-7b
# and in [secrets]: names = HF_TOKEN, of someone who has accepted the model's licence. Worker 0 does it, the others wait.
set -euo pipefail
if [ "$WORKER" = 0 ] && ! gcloud storage ls "$IMPORT_TO/complete" > /dev/null 2>&1; then
  new=$(mktemp -d "$EASYLM_BASE/import.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  JAX_PLATFORMS=cpu python -m easylm_mling import-hf "$IMPORT_MODEL" "$new/checkpoint"
  # What a try before this one left would be mixed with it.
  gcloud storage rm --recursive "$IMPORT_TO" --quiet > /dev/null 2>&1 || true
  gcloud storage cp --recursive "$new/checkpoint/*" "$IMPORT_TO/" --quiet
  # Written last: a copy that was cut short is no checkpoint.
  date | gcloud storage cp - "$IMPORT_TO/complete" --quiet
fi
for _ in $(seq 360); do
  if gcloud storage ls "$IMPORT_TO/complete" > /dev/null 2>&1; then
    gcloud storage cp --recursive "$IMPORT_TO/tokenizer" . --quiet
    exit 0
  fi
  sleep 20
done
echo "worker 0 did not bring $IMPORT_MODEL to $IMPORT_TO in two hours" >&2
exit 1
