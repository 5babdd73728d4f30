#!/usr/bin/env bash
# Train a tiny MMAR on this machine: all its GPUs, or one process on the CPU. Options are those of pretrain_mmar.py, for example
#   bash examples/pretrain_mmar_tiny.sh --config examples/configs/tiny.yaml --train.steps 100
# NPROC=2 starts that many processes. A run that was interrupted goes on where its run directory says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
case " $* " in
  *" --config "* | *" --config="*) ;;
  *) set -- --config examples/configs/tiny.yaml "$@" ;;
esac

if ((nproc == 1)); then
  exec python pretrain_mmar.py "$@"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Signals that ask to stop reach the processes, which have two minutes to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
exec torchrun --standalone --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --nproc_per_node "$nproc" pretrain_mmar.py "$@"
