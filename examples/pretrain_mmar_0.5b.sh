#!/usr/bin/env bash
#SBATCH --job-name=mmar-0.5b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# MMAR-0.5B, begun from Qwen2-0.5B:
#   sbatch examples/pretrain_mmar_0.5b.sh
#   STAGE=2 sbatch examples/pretrain_mmar_0.5b.sh
#   bash examples/pretrain_mmar_0.5b.sh --train.global_batch_size 128    # one node; launch.sh says how on several
#   NNODES=4 bash examples/pretrain_mmar_0.5b.sh --dry_run
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
[[ -e $root/examples/launch.sh ]] || root=$SLURM_SUBMIT_DIR # SLURM runs a copy of this file, elsewhere
cd "$root"
source examples/launch.sh
launch_stage mmar_0.5b "$@"
