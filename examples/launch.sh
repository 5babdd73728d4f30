#!/usr/bin/env bash
# Starts pretrain_mmar.py on a machine, on several, or in a SLURM job. The scripts beside it are a few lines over this one; alone:
#   bash examples/launch.sh --config my.yaml --run_dir runs/mine [--section.key VALUE ...]
# However it is started, the same command goes on where the run stands. docs/cluster.md is the guide.
#
#   SLURM            sbatch examples/pretrain_mmar_13b.sh; in an allocation `bash ...`, or `srun --ntasks-per-node=1 bash ...`
#   several nodes    NNODES=4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [MASTER_PORT=29500] bash ..., on each with its own NODE_RANK
#   one node         bash ...
#   only a plan      NNODES=128 bash ... --dry_run, on any machine: for NNODES x NPROC processes
#
# NPROC      processes on each node; unset: one for each of its GPUs, else one
# SETUP      a file that each node sources first: modules, virtual environment, NCCL_SOCKET_IFNAME
# LOG_DIR    gets what each rank prints; unset: beside the run directory, with -logs at its end
# CHECK=0    trains without running tools/check_cluster.py before
# STAGE      of `launch_stage`: 1 or 2; unset: 1
# INIT_FROM  of `launch_stage`: checkpoint or run whose weights are the beginning, or `scratch`
set -euo pipefail

# launch OPTION...: the options of pretrain_mmar.py.
launch() {
  case " $* " in
    *" --dry_run "* | *" --help "* | *" --print_config"*)
      # The plan is that of the job's first process.
      RANK=0 WORLD_SIZE=$((${NNODES:-1} * $(processes))) exec python pretrain_mmar.py "$@"
      ;;
  esac
  # shellcheck source=/dev/null
  [[ -z ${SETUP:-} ]] || source "$SETUP"
  RUN_DIR=$(value_of --run_dir "$@")
  [[ -n $RUN_DIR ]] || RUN_DIR=$(python pretrain_mmar.py "$@" --print_config | sed -n 's/^run_dir: //p') # of a configuration file
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    launch_node "$@"
  elif ((${SLURM_STEP_ID:-0xfffffffb} < 0xfffffffa)); then # above are batch scripts, and the shells that salloc gives
    launch_task "$@"
  else
    launch_job "$@"
  fi
}

# launch_stage MODEL OPTION...: a stage of the paper's with the model of configs/MODEL.yaml.
launch_stage() {
  local model=$1 stage=${STAGE:-1} init_from made_by run_dir
  shift
  case $stage in
    1) init_from=models/$model made_by="tools/convert_ckpt.py from-hf (docs/cluster.md)" ;;
    2) init_from=runs/${model}_stage1 made_by="STAGE=1" ;;
    *) fail "STAGE is $stage, but must be 1 or 2." ;;
  esac
  init_from=${INIT_FROM:-$init_from}
  set -- --run_dir "runs/${model}_stage$stage" "$@"
  run_dir=$(value_of --run_dir "$@")
  if [[ $init_from != scratch ]]; then
    [[ -e $init_from || -d $run_dir/checkpoints || " $* " == *" --dry_run "* ]] ||
      fail "$init_from, the weights to begin with, is not there: make it by $made_by, or set INIT_FROM to a path or scratch."
    set -- --checkpoint.init_from "$init_from" "$@"
  fi
  export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-8}}
  launch --config "examples/configs/$model.yaml" --config "examples/configs/data_stage$stage.yaml" \
    --config "examples/configs/stage$stage.yaml" "$@"
}

# --- SLURM ----------------------------------------------------------------------------------------------------------------------

# The batch script: one task on each node. Warned by USR1 (#SBATCH --signal=B:USR1@300) it has the run save and stop, and goes
# back into the queue. So it does after a failure, if this start has brought a new checkpoint: else it might do so for ever.
launch_job() {
  local before asked="" status=0 step
  # Since SLURM 22.05 srun gives its tasks one CPU each unless it is told here; loaders need the rest.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  before=$(newest_checkpoint)
  # A node that cannot start ends the others, which would wait for it. All processes of a node are in one task: nothing is bound.
  srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 --cpu-bind=none \
    bash examples/launch.sh "$@" &
  step=$!
  trap 'asked=1; kill -USR1 "$step"' USR1
  # Of a preemption or a cancellation SLURM tells the tasks too, and puts a preempted job back by itself.
  trap : TERM
  wait "$step" || status=$?
  # A signal ends `wait`, not what it waits for.
  while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
  done
  if [[ -n $asked || ($status != 0 && $(newest_checkpoint) != "$before") ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

# A task of srun, one for each node.
launch_task() {
  local hosts asked="" status=0
  ((SLURM_STEP_NUM_TASKS == SLURM_STEP_NUM_NODES)) ||
    fail "srun has $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes, but torchrun starts processes: give it one a node."
  hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
  NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=$SLURM_NODEID MASTER_ADDR=${hosts%%$'\n'*}
  # Jobs that share a node must not share a port; above 32767 the kernel hands them out to anybody.
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
  # SLURM signals torchrun and its processes too: here it is only noted. torchrun ends with an error however well the run has
  # stopped, which would have srun kill the other nodes, where processes may not have ended yet.
  trap 'asked=1' USR1 TERM
  (launch_node "$@") || status=$?
  [[ -z $asked ]] || status=0
  exit "$status"
}

# --- one node -------------------------------------------------------------------------------------------------------------------

# This node of NNODES (one, unless set): its processes.
launch_node() {
  local nnodes=${NNODES:-1} nproc logs place=(--standalone)
  nproc=$(processes)
  if ((nnodes > 1)); then
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
      fail "NNODES is $nnodes: give each node its NODE_RANK (0 to $((nnodes - 1))), and all MASTER_ADDR, the name of the first."
    place=(--nnodes "$nnodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  settings
  if ((nnodes * nproc == 1)); then
    exec python pretrain_mmar.py "$@"
  fi
  logs=${LOG_DIR:-${RUN_DIR:-runs/launch}-logs}/node_${NODE_RANK:-0}/$(date +%Y%m%d-%H%M%S)${SLURM_JOB_ID:+-job$SLURM_JOB_ID}
  # The last rank of all speaks for the run, on the terminal too.
  place+=(--nproc-per-node "$nproc" --redirects 3 --tee "$((${NODE_RANK:-0} == nnodes - 1 ? nproc - 1 : nproc)):3")
  place+=(--signals-to-handle "SIGTERM,SIGINT,SIGUSR1")
  if [[ ${CHECK:-1} != 0 ]]; then
    torchrun "${place[@]}" --log-dir "$logs/check" tools/check_cluster.py "$@" || exit
  fi
  exec torchrun "${place[@]}" --log-dir "$logs" pretrain_mmar.py "$@"
}

# What the processes find in their environment. Whatever is set already stays as it is.
settings() {
  # torch's threads on the CPU: loaders are processes of their own, and torchrun would say this at each start.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # A signal that asks to stop leaves the processes this long to finish their step and save; less than SLURM's warning in advance.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
  # How many rows have a label or a mask differs from step to step: memory in fixed blocks would fall to pieces that fit nothing.
  export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
  # Without it a failing NCCL says "unhandled system error" and not which; it prints nothing while all is well.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Each tensor that a loader hands over is an open file, and 1,024, which many systems begin with, are few.
  ulimit -Sn "$(ulimit -Hn)"
}

# --- small things ---------------------------------------------------------------------------------------------------------------

fail() {
  echo "error: $*" >&2
  exit 1
}

# Processes on this node.
processes() {
  local gpus
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  echo "${NPROC:-${SLURM_GPUS_ON_NODE:-$((gpus > 0 ? gpus : 1))}}"
}

# value_of --option WORD...: what the words give it, the last time; nothing, if they do not.
value_of() {
  local option=$1 value=""
  shift
  while (($#)); do
    case $1 in
      "$option") value=${2:-} ;;
      "$option="*) value=${1#*=} ;;
    esac
    shift
  done
  echo "$value"
}

newest_checkpoint() {
  local checkpoints=("$RUN_DIR"/checkpoints/step_????????)
  echo "${checkpoints[-1]}"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  cd "$(dirname "$0")/.."
  launch "$@"
fi
