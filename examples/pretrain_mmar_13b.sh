#!/usr/bin/env bash
#SBATCH --job-name=mmar-13b
#SBATCH --nodes=32
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# An MMAR of the shape of LLaMA-2-13B, begun from its weights or, with INIT_FROM=scratch, from random ones:
#   INIT_FROM=scratch sbatch --nodes 128 examples/pretrain_mmar_13b.sh
#   STAGE=2 sbatch examples/pretrain_mmar_13b.sh
#   NNODES=128 bash examples/pretrain_mmar_13b.sh --dry_run
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
[[ -e $root/examples/launch.sh ]] || root=$SLURM_SUBMIT_DIR # SLURM runs a copy of this file, elsewhere
cd "$root"
source examples/launch.sh
# Before Blackwell, kernels must come to the device in the order of their launch for tensor parallelism to overlap communication.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
launch_stage mmar_13b "$@"
