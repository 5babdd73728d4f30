#!/usr/bin/env bash
# From a plan to a prediction on a CPU, in about an hour. Stopped, it goes on where it was. JOBS runs at a time (2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
sweep=${1:-runs/sweep_tiny}

[[ -e data/emoji/index.json ]] || python tools/prepare_data.py emoji --out data/emoji
python tools/sweep.py plan examples/scaling/sweep_tiny.yaml --out "$sweep"
python tools/sweep.py run "$sweep" --jobs "${JOBS:-2}"
python tools/sweep.py status "$sweep"
python tools/sweep.py fit --sweep "$sweep" --budget 1e14
