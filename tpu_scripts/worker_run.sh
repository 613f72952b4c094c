#!/usr/bin/env bash
# worker_run.sh VERB: start, watch and stop the trainer on this machine, one worker of a slice.
#   start N        begin attempt N in a session of its own, which outlives the connection; a second time: nothing
#   status         one line: easylm-worker NUMBER pack=... attempt=N state=idle|running|exited|lost code=C
#   stop SECONDS   ask the trainer to save and end; after SECONDS it is killed
#   after          run the run file's own script for when all is done
#   number         which worker of the slice this is
#   with-environment COMMAND...  run it as the trainer is run: in code/, with the run's environment and secrets
#
# BASE is /var/tmp/easylm/NAME, the same for every account that logs in, and is its account's that came first (workers.py).
# This file lies in BASE/code-PACK/tpu_scripts. In BASE:
#   code, venv     what worker_setup.sh made; code/launch/{command,environment} are NUL-separated, so nothing needs quoting
#   secrets        NUL-separated NAME=VALUE, readable by this user only; never on a command line
#   lock           locked while anything of an attempt lives; the kernel sees to it
#   attempt, trainer-pid, exit-N   the last attempt begun; its process; its exit code, written whole when it ended
#   log/attempt-N.log (and .1, the part before)   what it printed, each line with its time; also sent to URL/logs
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=$(dirname "$(dirname "$here")")
readonly here base
readonly code=$base/code
readonly log_bytes=${EASYLM_LOG_BYTES:-10000000}
readonly lockfile=${EASYLM_LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}
readonly push_seconds=${EASYLM_PUSH_SECONDS:-60}

number() {
  local found
  # Google's metadata server knows; elsewhere the name of the host ends in it.
  found=$(curl --silent --fail --max-time 5 -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) ||
    found=$(sed -n 's/.*-w-\([0-9]*\)$/\1/p' <<< "$HOSTNAME")
  echo "${found:-0}"
}

read_file() { cat "$1" 2> /dev/null || true; }

write_whole() { # PATH TEXT
  printf %s "$2" > "$1.new" && mv "$1.new" "$1"
}

alive() { # whether anything of an attempt lives
  ! flock --shared --nonblock "$base/lock" true
}

status() {
  local attempt state=idle exit_code=-
  attempt=$(read_file "$base/attempt")
  if [ -n "$attempt" ]; then
    if [ -e "$base/exit-$attempt" ]; then
      state=exited exit_code=$(read_file "$base/exit-$attempt")
    elif alive; then
      state=running
    elif [ -e "$base/exit-$attempt" ]; then # it ended between the two questions
      state=exited exit_code=$(read_file "$base/exit-$attempt")
    else
      state=lost
    fi
  fi
  echo "easylm-worker $(number) pack=$(read_file "$base/pack") attempt=${attempt:-0} state=$state code=$exit_code"
}

# libtpu leaves its lock file behind when it is killed, and no later process of another user gets past it.
remove_stale_lockfile() {
  [ -e "$lockfile" ] || return 0
  local inode sudo=() holders
  inode=$(stat -c %i "$lockfile")
  if [ "$(id -u)" != 0 ]; then
    if sudo -n true 2> /dev/null; then
      sudo=(sudo -n)
    elif [ ! -O "$lockfile" ]; then
      echo "$lockfile is another user's, and without sudo its holder cannot be seen: left alone"
      return 0
    fi
  fi
  holders=$("${sudo[@]}" find /proc/[0-9]*/fd -lname "$lockfile" 2> /dev/null | cut -d/ -f3 | sort -u | tr '\n' ' ')
  if [ -n "$holders" ] || grep -q ":$inode " /proc/locks; then
    echo "$lockfile is held by a living process (${holders:-see /proc/locks}): left alone"
  else
    "${sudo[@]}" rm -f "$lockfile" && echo "removed $lockfile, whose holder is dead"
  fi
}

start() { # N
  local attempt=$1
  (
    flock --wait 30 7 || exit 1
    if [ "$(read_file "$base/attempt")" = "$attempt" ] || alive; then
      exit 0
    fi
    mkdir -p "$base/log"
    rm -f "$base/trainer-pid"
    write_whole "$base/attempt" "$attempt"
    # Held from here on, by the supervisor and the trainer, without a gap.
    exec 9> "$base/lock"
    flock 9
    setsid bash "$here/worker_run.sh" supervise "$attempt" < /dev/null > "$base/log/supervisor.txt" 2>&1 7>&- &
  ) 7> "$base/start.lock"
  status
}

load_environment() {
  local entry
  export RUN_DIR RUN_URL WORKER EASYLM_BASE="$base" PYTHONPATH="$code" PATH="$base/venv/bin:$PATH" VIRTUAL_ENV="$base/venv"
  RUN_DIR=$(cat "$code/launch/run_dir") RUN_URL=$(cat "$code/launch/url") WORKER=$(number)
  for file in "$code/launch/environment" "$base/secrets"; do
    [ -e "$file" ] || continue
    while IFS= read -r -d '' entry; do
      export "${entry?}"
    done < "$file"
  done
  cd "$code" || exit 1
}

# Gives each line its time and keeps the file under a limit. Bytes are taken as they are.
keep_log() { # FILE
  local line
  LC_ALL=C
  local size=0
  while IFS= read -r line || [ -n "$line" ]; do
    printf '%(%Y-%m-%dT%H:%M:%SZ)T %s\n' -1 "$line" >> "$1"
    size=$((size + ${#line} + 22))
    if [ "$size" -gt "$log_bytes" ]; then
      mv "$1" "$1.1"
      size=0
    fi
  done
}

push() { # FILE NAME
  [ ! -e "$1" ] || timeout 60 gcloud storage cp "$1" "$RUN_URL/logs/$2" --quiet > /dev/null 2>&1 < /dev/null
}

supervise() { # N
  local attempt=$1 log=$base/log/attempt-$1.log name argv=() exit_code interrupted='' logger trainer pusher
  export TZ=UTC
  # systemd-tmpfiles leaves what is old below /var/tmp where the folder is locked.
  exec 8< "$base"
  flock --shared 8
  load_environment
  mapfile -d '' -t argv < "$code/launch/command"
  name=$(printf 'attempt-%04d/worker-%s' "$attempt" "$WORKER")
  rm -f "$base/pipe" && mkfifo -m 600 "$base/pipe"
  keep_log "$log" < "$base/pipe" 9>&- &
  logger=$!
  (
    while sleep "$push_seconds"; do
      push "$log" "$name.log"
      push "$log.1" "$name.log.1"
    done
  ) 9>&- &
  pusher=$!
  exec 6> "$base/pipe" # once: when nobody writes any more, the log is over
  {
    echo "== attempt $attempt on worker $WORKER, $HOSTNAME"
    remove_stale_lockfile
  } >&6 2>&1
  # Where the trainer is asked to end by a signal to all of the machine, this must see its exit code.
  trap 'interrupted=1; kill -TERM "$trainer" 2> /dev/null' TERM INT HUP
  "${argv[@]}" < /dev/null >&6 2>&1 6>&- &
  trainer=$!
  write_whole "$base/trainer-pid" "$trainer $$"
  wait "$trainer"
  exit_code=$?
  while [ -n "$interrupted" ]; do
    interrupted=''
    wait "$trainer"
    exit_code=$?
  done
  echo "== ended with exit code $exit_code" >&6
  exec 6>&-
  # Something that the trainer left behind may still hold the pipe.
  ( sleep 10; kill "$logger" 2> /dev/null ) > /dev/null 2>&1 9>&- &
  wait "$logger"
  kill "$!" "$pusher" 2> /dev/null
  printf '%s\n' "$exit_code" > "$base/exit.new"
  # The machine may be deleted as soon as the exit code is known, so this goes before it.
  push "$log" "$name.log"
  push "$log.1" "$name.log.1"
  push "$base/exit.new" "$name.exit"
  mv "$base/exit.new" "$base/exit-$attempt"
}

signal_trainer() { # SIGNAL
  local trainer session
  # A number alone could by now be another process's.
  read -r trainer session _ <<< "$(read_file "$base/trainer-pid") - -"
  # After the name in brackets: state, parent, group, session.
  [ "$(sed 's/.*) //' "/proc/$trainer/stat" 2> /dev/null | cut -d' ' -f4)" = "$session" ] && kill "-$1" "$trainer"
}

stop() { # SECONDS
  local asked='' until=$((SECONDS + $1))
  while alive && [ "$SECONDS" -lt "$until" ]; do
    # It may be about to start.
    if [ -z "$asked" ] && signal_trainer TERM; then asked=1; fi
    sleep 0.1
  done
  until=$((SECONDS + 10))
  while alive && [ "$SECONDS" -lt "$until" ]; do
    signal_trainer KILL
    sleep 0.1
  done
  # What the trainer left behind is of its group, and so is who would write its exit code.
  if alive; then kill -KILL -- "-$(cut -d' ' -f2 "$base/trainer-pid")"; fi
  status
}

after() {
  load_environment
  if [ -e "$code/launch/after.sh" ]; then bash "$code/launch/after.sh"; fi
}

with_environment() {
  load_environment
  exec "$@"
}

case ${1:-} in
  start) start "$2" ;;
  status) status ;;
  stop) stop "$2" ;;
  supervise) supervise "$2" ;;
  after) after ;;
  number) number ;;
  with-environment) shift && with_environment "$@" ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
