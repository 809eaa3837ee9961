#!/usr/bin/env bash
# A fresh TPU VM made ready for ftjax: see usage below.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/tpu_vm_setup.sh [--venv DIR] [--extras NAMES] [--no-check] [--dry-run]

Run on a TPU VM, in a checkout of ftjax: makes a virtual environment, installs ftjax for TPUs in it, and checks that JAX
sees them. On a pod run it on all workers at once (scripts/tpu_pod_run.sh does): the check waits for the others. Run
again, it brings the environment up to date.

  --venv DIR      the environment; default: .venv in the checkout
  --extras NAMES  of pyproject.toml, comma-separated; default: tpu
  --no-check      do not look for TPUs
  --dry-run       print what would be done, and do nothing
END
}

die() {
  printf 'tpu_vm_setup: %s\n' "$*" >&2
  exit 2
}

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -n $dry_run ]] || "$@"
}

# apt-get, once other programs are done: on a fresh VM the system's own updates hold its locks for some minutes.
apt() {
  local said try
  for ((try = 1; ; try++)); do
    if run sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 --quiet "$@" 2>"$errors"; then
      return
    fi
    said=$(<"$errors")
    printf '%s\n' "$said" >&2
    case $said in
      *"Could not get lock"* | *"Unable to lock"* | *"Unable to acquire"*) ;;
      *) return 1 ;;
    esac
    ((try < 60)) || die "apt's locks are held by another program for 10 minutes; see: ps aux | grep -i apt"
    printf 'tpu_vm_setup: another program holds a lock of apt; waiting\n' >&2
    sleep 10
  done
}

# The first Python here that ftjax can run on, with what makes an environment; nothing where there is none.
find_python() {
  local python
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$python"
      return
    fi
  done
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv extras=tpu check=1 dry_run=
while (($#)); do
  case $1 in
    --venv | --extras)
      (($# > 1)) || die "$1: expected a value"
      if [[ $1 == --venv ]]; then venv=$2; else extras=$2; fi
      shift
      ;;
    --no-check) check= ;;
    --dry-run) dry_run=1 ;;
    --help | -h)
      usage
      exit
      ;;
    *) die "unknown argument $1; --help lists them" ;;
  esac
  shift
done
[[ $(uname -s) == Linux ]] || die "expected Linux, as TPU VMs have; this is $(uname -s)"

python=$(find_python)
if [[ -z $python ]]; then
  # The images of TPU VMs come with Python 3.10 or without venv.
  errors=$(mktemp -t ftjax.XXXXXX)
  trap 'rm -f "$errors"' EXIT
  apt update
  apt install --yes python3.11 python3.11-venv
  python=python3.11
fi
if [[ ! -x $venv/bin/python ]]; then
  run "$python" -m venv "$venv"
fi
run "$venv/bin/pip" install --quiet --disable-pip-version-check --editable "${root}[$extras]"
if [[ -n $check ]]; then
  run "$venv/bin/python" -c '
import sys
from ftjax.training import hosts
hosts.start()
import jax
devices = jax.devices()
print(f"{len(devices)} x {devices[0].device_kind} on {jax.process_count()} machines, "
      f"{jax.local_device_count()} of them here")
sys.exit(0 if devices[0].platform == "tpu" else "no TPU: JAX runs on " + devices[0].platform)'
fi
