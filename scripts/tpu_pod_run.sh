#!/usr/bin/env bash
# `ftjax train` on all machines of a TPU pod, gone on with after preemption: see usage below.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/tpu_pod_run.sh --name NAME --zone ZONE [OPTIONS] -- train --config FILE ...

Run where gcloud is set up, in a checkout of ftjax: copies the checkout to every worker of the TPU NAME, sets it up
(scripts/tpu_vm_setup.sh), starts the command behind `--` on all workers at once, shows what worker 0 says and keeps
what each says in a file. When the TPU is preempted, it is made anew and the same command goes on with the run. The
run's folder must therefore lie where every worker, and every later TPU, finds it: --before mounts it.

  --name NAME, --zone ZONE, --project PROJECT
                  the TPU; the project is gcloud's own where it is not given
  --type TYPE, --version VERSION
                  make the TPU where it is not there, and after preemption: accelerator type such as v6e-16, runtime
                  version such as v2-alpha-tpuv6e; without them it must be there
  --spot          make it as a spot VM
  --queued        make it as a queued resource of the same name, and wait in the queue
  --before TEXT   shell command run on every worker before ftjax, such as a mount
  --hub-token FILE
                  a file that holds your Hugging Face token, such as ~/.cache/huggingface/token: it is copied to that
                  place on every worker, readable by you alone; the token stands on no command line and in no log
  --logs DIR      what workers say, one folder a start and one file a worker; default: logs/NAME
  --tries N       give up after so many failures in a row without a new checkpoint; preemptions do not count; default 3
  --wait SECONDS  between looks at the TPU's state, and before trying again; default 30
  --dry-run       print the commands of one start, and run none

Errors of Google's service that pass, such as HTTP 503, are waited out: 60 looks in a row at most. The exit code is 0
when the run is done, 2 for input that cannot be used (by this script, by gcloud or by ftjax), else 1.
END
}

die() {
  printf 'tpu_pod_run: %s\n' "$*" >&2
  exit 2
}

say() {
  printf 'tpu_pod_run: %s\n' "$*" >&2
}

run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  [[ -n $dry_run ]] || "$@"
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or later; this is $BASH_VERSION"
shopt -s inherit_errexit

# ---- on a worker: `tpu_pod_run.sh --on-worker train ...`, in the checkout ----------------------------------------------

on_worker() {
  local pid code=0 pid_file=$HOME/.ftjax.pid
  # What an earlier start left running when its connection was lost holds the TPU.
  if [[ -s $pid_file ]]; then
    pid=$(<"$pid_file")
    if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q ftjax; then
      kill -TERM "$pid" || true
      for _ in {1..60}; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 1
      done
      kill -KILL "$pid" 2>/dev/null || true
    fi
  fi
  .venv/bin/ftjax "$@" 2>&1 &
  pid=$!
  printf '%s\n' "$pid" >"$pid_file"
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM INT HUP
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not ftjax
    code=0
    wait "$pid" || code=$?
  done
  rm -f "$pid_file"
  printf 'ftjax ended with code %s\n' "$code"
  exit "$code"
}

# ---- the TPU -----------------------------------------------------------------------------------------------------------

# Its state as gcloud calls it (READY, CREATING, PREEMPTED, ...); MISSING, QUEUED, GONE where it must be made anew, or
# FAILED where the queue could not make it.
state() {
  local queue=ACTIVE
  if [[ -n $queued ]]; then
    queue=$(describe queued-resources 'value(state.state)')
  fi
  case $queue in
    ACTIVE) describe tpu-vm 'value(state)' ;;
    SUSPENDED | SUSPENDING) echo GONE ;;
    MISSING | FAILED) echo "$queue" ;;
    *) echo QUEUED ;;
  esac
}

describe() {
  local said look
  for ((look = 1; ; look++)); do
    if said=$(gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="$2" 2>&1); then
      printf '%s\n' "$said"
      return
    elif [[ ${said,,} == *not_found* || ${said,,} == *"not found"* ]]; then
      echo MISSING
      return
    fi
    again "$look" "$said" "gcloud does not say how $name is"
  done
}

# `again NUMBER SAID WHAT`, after the error SAID of gcloud, the NUMBERth in a row: ends the script where it is of no use
# to try again, else waits.
again() {
  case $2 in
    *PERMISSION_DENIED* | *UNAUTHENTICATED* | *INVALID_ARGUMENT* | *"unrecognized argument"* | *"Invalid choice"* | \
      *"Invalid value"* | *"active account selected"* | *eauthentication*) die "$3: $2" ;;
    *"per minute"* | *RATE_LIMIT*) ;; # of requests, which is soon over
    *[Qq]uota* | *QUOTA*) die "$3, because of your project's quota: $2" ;;
  esac
  (($1 < looks)) || die "$3, $1 times in a row: $2"
  say "$3; trying again: $2"
  sleep "$wait"
}

create() {
  if [[ -n $queued ]]; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$type" --runtime-version="$version" "${tier[@]}"
  else
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      --accelerator-type="$type" --version="$version" "${tier[@]}"
  fi
}

delete() {
  if [[ -n $queued ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# Waits until the TPU is there, making it where need be.
make_ready() {
  local now refused=0 errors=0
  while true; do
    now=$(state)
    case $now in
      READY) return ;;
      MISSING | PREEMPTED | TERMINATED | GONE | FAILED)
        [[ $now != FAILED ]] || refused=$((refused + 1))
        ((refused < tries)) ||
          die "$name could not be made; gcloud compute tpus queued-resources describe $name tells why"
        [[ -n $type ]] || die "$name is $now; --type and --version let this script make it"
        if [[ $now != MISSING ]]; then
          say "$name is $now: making it anew"
          # What is said to be deleted is looked at again: the request may have failed.
          if ! delete 2>&1 | tee "$scratch/said" >&2; then
            errors=$((errors + 1))
            again "$errors" "$(<"$scratch/said")" "$name could not be deleted"
            continue
          fi
        fi
        if ! create 2>&1 | tee "$scratch/said" >&2; then
          case $(<"$scratch/said") in
            *ALREADY_EXISTS* | *"already exists"*) ;; # by a request that seemed to fail
            *"no more capacity"* | *[Ss]tockout*)
              refused=$((refused + 1))
              ((refused < tries)) || die "$name could not be made: no TPUs are free; --queued waits for them"
              ;;
            *)
              errors=$((errors + 1))
              again "$errors" "$(<"$scratch/said")" "$name could not be made"
              continue
              ;;
          esac
        fi
        ;;
      STOPPED | STOPPING | HIDDEN | HIDING | DELETING) die "$name is $now; start it, or wait until it is gone" ;;
      *) say "$name is $now; waiting" ;;
    esac
    sleep "$wait"
  done
}

# ---- one start ---------------------------------------------------------------------------------------------------------

# A connection whose other end is gone, as after a preemption, is given up after three signs of life that do not come.
alive=-oServerAliveInterval=30

on_all() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --ssh-flag="$alive" --command="$1" "${@:2}"
}

copy() {
  run gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all --scp-flag="$alive"
}

start() {
  local out=$1 tail_pid='' code=0
  copy "$scratch/ftjax.tar.gz" ftjax.tar.gz || return
  on_all "mkdir -p ftjax && tar -xzf ftjax.tar.gz -C ftjax && ftjax/scripts/tpu_vm_setup.sh" || return
  if [[ -n $hub_token ]]; then
    copy "$scratch/token" ftjax.token || return
    on_all "install -D -m 600 ftjax.token .cache/huggingface/token && rm ftjax.token" || return
  fi
  if [[ -n $before ]]; then
    on_all "$before" || return
  fi
  if [[ -z $dry_run ]]; then
    mkdir -p "$out"
    : >"$out/0.log"
    tail -n +1 -f "$out/0.log" &
    tail_pid=$!
  fi
  on_all "cd ftjax && scripts/tpu_pod_run.sh --on-worker$(printf ' %q' "${command[@]}")" \
    --output-directory="$out" || code=$?
  if [[ -n $tail_pid ]]; then
    sleep 1 # for its last lines
    kill "$tail_pid" 2>/dev/null || true
  fi
  return "$code"
}

# ---- the command line --------------------------------------------------------------------------------------------------

if [[ ${1-} == --on-worker ]]; then
  on_worker "${@:2}"
fi

name='' zone='' project='' type='' version='' queued='' before='' hub_token='' logs='' dry_run=''
tries=3 wait=30 looks=60 tier=()
while (($#)); do
  case $1 in
    --name | --zone | --project | --type | --version | --before | --hub-token | --logs | --tries | --wait)
      (($# > 1)) && [[ $2 != -- ]] || die "$1: expected a value"
      option=${1#--}
      printf -v "${option//-/_}" '%s' "$2"
      shift
      ;;
    --spot) tier=(--spot) ;;
    --queued) queued=1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown argument $1; --help lists them; the command of ftjax stands behind --" ;;
  esac
  shift
done
command=("$@")
[[ -n $name && -n $zone ]] || die "expected --name and --zone; --help tells more"
((${#command[@]})) || die "expected a command of ftjax behind --, such as: -- train --config configs/sft.py"
[[ -n $type || -z $version ]] && [[ -n $version || -z $type ]] || die "--type and --version: set both, or none"
[[ -n $type || (-z $queued && ${#tier[@]} == 0) ]] || die "--spot and --queued: say how the TPU is made; set --type too"
[[ $tries =~ ^[1-9][0-9]*$ ]] || die "--tries: expected a number from 1; found $tries"
[[ $wait =~ ^[0-9]+$ ]] || die "--wait: expected seconds; found $wait"
[[ -z $hub_token || -s $hub_token ]] || die "--hub-token: expected a file that holds a token, not the token"
logs=${logs:-logs/$name}
where=(--zone="$zone")
if [[ -n $project ]]; then
  where+=(--project="$project")
fi
if [[ -n $hub_token ]]; then
  hub_token=$(realpath -- "$hub_token")
fi
logs=$(mkdir -p "$(dirname "$logs")" && cd "$(dirname "$logs")" && pwd)/$(basename "$logs")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d -t ftjax.XXXXXX) # which others cannot read
trap 'rm -rf "$scratch"' EXIT
[[ -n $dry_run ]] || command -v gcloud >/dev/null || die "gcloud is not on the PATH"
if [[ -n $dry_run ]]; then
  [[ -z $type ]] || create
  start "$logs/1"
  exit
fi
# What git knows or does not ignore, as it stands now.
git ls-files -z --cached --others --exclude-standard --deduplicate |
  while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
  tar --null --files-from=- -czf "$scratch/ftjax.tar.gz"

if [[ -n $hub_token ]]; then
  install -m 600 "$hub_token" "$scratch/token"
fi

# The step that a start went on from, 0 for a start that got to no step.
gone_on_from() {
  local step
  step=$({ grep -hos 'going on after step [0-9,]*' "$1"/*.log || true; } | tr -dc '0-9\n' | sort -n | tail -n 1)
  printf '%s\n' "${step:-0}"
}

failed=0 reached=0
for ((number = 1; ; number++)); do
  make_ready
  while [[ -e $logs/$number ]]; do number=$((number + 1)); done
  code=0
  start "$logs/$number" || code=$?
  if ((code == 0)); then
    say "done; what the workers said is in $logs"
    exit
  fi
  if grep -qsx 'ftjax ended with code 2' "$logs/$number"/*.log; then
    grep -hs '^ftjax: ' "$logs/$number"/*.log | sort -u >&2
    die "ftjax cannot use its input; what the workers said is in $logs/$number"
  fi
  step=$(gone_on_from "$logs/$number")
  if ((step > reached)); then # the start before left a new checkpoint
    failed=0 reached=$step
  fi
  sleep "$wait" # a preemption takes a moment to show in the state
  now=$(state)
  if [[ $now == READY ]]; then
    failed=$((failed + 1))
    if ((failed >= tries)); then
      say "failed $failed times in a row without a new checkpoint (--tries); what the workers said is in $logs"
      exit 1
    fi
  fi
  say "start $number ended with code $code, $name is $now; going on"
done
