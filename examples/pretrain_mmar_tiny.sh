#!/usr/bin/env bash
# Train a tiny MMAR on this machine: all its GPUs, or one process on the CPU (NPROC=2: two). Options are pretrain_mmar.py's:
#   bash examples/pretrain_mmar_tiny.sh --train.steps 100
#   STAGE=2 bash examples/pretrain_mmar_tiny.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/launch.sh
if [[ ${STAGE:-1} == 2 ]]; then
  set -- --config examples/configs/tiny_stage2.yaml "$@"
fi
launch --config examples/configs/tiny.yaml "$@"
