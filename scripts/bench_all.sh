#!/usr/bin/env bash
# Every benchmark in turn, on a machine where nothing else runs (about an hour), and the tables of docs/performance.md from what they measured:
#   scripts/bench_all.sh [FOLDER]    FOLDER: of the JSON files; default: runs/bench. A file that is there is not measured again.
# ENCODER=DIR SST2=DIR add the encoders, see scripts/bench_encoders.py; TURNS=N sets the turns of each side (3).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/bench}
turns=${TURNS:-3}
mkdir -p "$out"

measure() {
    name=$1
    shift
    [ -s "$out/$name.json" ] && return
    echo "== $name: python scripts/$*"
    python "scripts/$@" --out "$out/$name.part"
    mv "$out/$name.part" "$out/$name.json"
}

measure steps bench_torch.py --turns "$turns"
measure steps_malloc bench_torch.py --turns "$turns" --malloc
measure steps_as_started bench_torch.py --turns "$turns" --as-started
measure devices bench_devices.py --malloc
measure share bench_share.py
measure lean bench_torch.py --turns "$turns" --lean --only 40m-lora-float32 40m-full-float32
measure generate bench_generate.py --turns "$turns"
measure generate_rounded bench_generate.py --turns "$turns" --weights bfloat16
measure generate_bfloat16 bench_generate.py --turns "$turns" --dtype bfloat16
measure preference bench_preference.py
measure load bench_load.py
measure start bench_start.py
measure lengths bench_lengths.py --methods lora --unroll 1 --turns "$turns" --picture docs/lengths.png
measure compile bench_compile.py --picture docs/compile.png
if [ -n "${ENCODER:-}" ] && [ -n "${SST2:-}" ]; then
    measure encoders bench_encoders.py speed --model "$ENCODER" --data "$SST2" --turns "$turns"
fi
python scripts/bench_tables.py "$out" docs/performance.md
