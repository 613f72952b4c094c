#!/usr/bin/env bash
# worker_setup.sh BASE PACK: make this machine ready to train what was unpacked to BASE/code-PACK.
# It may be interrupted and repeated: what is there is kept, and BASE/pack, which says "ready", is written last.
set -euo pipefail
readonly base=$1 pack=$2
readonly python_version=3.11 uv_version=0.13.9
readonly code=$base/code-$pack

fail() {
  local number
  number=$(bash "$code/tpu_scripts/worker_run.sh" number)
  tail -n 5 "$base/setup.log" | sed "s/^/easylm-setup worker=$number failed: /"
  exit 1
}

# A uv of just this version, and with it a Python of our own and exactly the locked packages.
install() {
  local uv lock venv
  uv=$(command -v uv || true)
  if [ -z "$uv" ] || [[ "$("$uv" --version)" != "uv $uv_version"* ]]; then
    uv=$base/uv-$uv_version/bin/uv
  fi
  if [ ! -x "$uv" ]; then
    echo "installing uv $uv_version"
    rm -rf "$base/uv-new"
    python3 -m pip install --quiet --target "$base/uv-new" "uv==$uv_version"
    mv -T "$base/uv-new" "$base/uv-$uv_version"
  fi
  lock=$code/tpu_scripts/requirements-tpu.lock
  # Another lock makes another environment: one that is in use never changes.
  venv=$base/venv-$(cat "$code/requirements.lock" "$lock" | sha256sum | cut -c1-16)
  if [ ! -e "$venv/complete" ]; then
    echo "installing Python $python_version and the locked packages"
    rm -rf "$venv"
    "$uv" venv --quiet --python "$python_version" "$venv"
    "$uv" pip install --quiet --python "$venv/bin/python" -r "$lock"
    touch "$venv/complete"
  fi
  ln -sfn "$venv" "$base/venv.new" && mv -T "$base/venv.new" "$base/venv"
  ln -sfn "$code" "$base/code.new" && mv -T "$base/code.new" "$base/code"
  if [ -e "$code/launch/setup.sh" ]; then
    echo "running the run file's own setup"
    bash "$code/tpu_scripts/worker_run.sh" with-environment bash "$code/launch/setup.sh"
  fi
}

mkdir -p "$base"
exec 8> "$base/setup.lock"
flock 8 # one that was begun before, over a broken connection, ends first
if [ "$(cat "$base/pack" 2> /dev/null)" != "$pack" ]; then
  # A process of its own: `set -e` would not hold in a function whose success is asked for.
  (
    set -e
    install
  ) > "$base/setup.log" 2>&1 8>&- < /dev/null &
  wait $! || fail
  printf %s "$pack" > "$base/pack.new"
  mv "$base/pack.new" "$base/pack"
fi
exec 8>&-
bash "$code/tpu_scripts/worker_run.sh" status
