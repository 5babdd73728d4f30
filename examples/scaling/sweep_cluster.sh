#!/usr/bin/env bash
# Plans the sweep, which needs neither a GPU nor memory for the weights, and puts it into SLURM's queue, 8 runs at a time.
# Again: what has failed or was cancelled is put there anew. Where there is no sbatch, DIR/slurm.sh is left to be submitted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
sweep=${1:-runs/sweep_cluster}

python tools/sweep.py plan examples/scaling/sweep_cluster.yaml --out "$sweep"
python tools/sweep.py run "$sweep" --slurm --retry-failed --jobs "${JOBS:-8}"
echo "then: python tools/sweep.py status $sweep"
echo "      python tools/sweep.py fit --sweep $sweep --budget 1e22"
