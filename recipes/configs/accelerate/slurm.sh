#!/bin/bash
#
# Two nodes of eight GPUs under SLURM, from the root of the repository:
#
#   sbatch recipes/configs/accelerate/slurm.sh recipes/configs/pneumonia.yaml --data.source … --run.output_dir …
#
# Other numbers of nodes or GPUs: sbatch --nodes 4 --gpus-per-node 4 recipes/configs/accelerate/slurm.sh …
# Account, partition and memory are your cluster's to name. The run directory, data.source and data.cache_dir must lie
# on a file system that all nodes see.

# A launcher on each node, which starts one process a GPU.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32

# After a pre-emption or a broken node SLURM starts this script again, in the same log. The same command goes on with
# the run, so there is nothing else to do.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cxr-backbone-%j.log

# Three minutes before the time is up this shell (B) gets SIGTERM, and `stop` passes it on. At a pre-emption too, where
# the cluster has SlurmctldParameters=preempt_send_user_signal.
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@180

set -euo pipefail

HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # (head would break the pipe)
PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
GPUS=${SLURM_GPUS_PER_NODE##*:}        # which may say h100:8
PROCESSES=$((SLURM_NNODES * GPUS))
export HEAD_NODE PORT PROCESSES

is_stopped=false
stop() {
    is_stopped=true
    # To the tasks of the job. A SIGTERM to srun would have them killed at once.
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop TERM

# SLURM may signal a task alone and not what it starts. With `exec` the task is the launcher, which passes SIGTERM on to
# the recipe's processes and gives them half a minute to save; a shell in its place would die and leave them behind.
# $SLURM_NODEID differs between tasks, so it is the task that reads it.
# A launcher that ends first must not have the others killed: one of them may still be saving.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    exec accelerate launch --config_file recipes/configs/accelerate/two_nodes.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$HEAD_NODE" --main_process_port "$PORT" \
        recipes/two_stage.py "$@"
' launcher "$@" &
launchers=$!

# In the background, because bash runs a trap only between commands. The trap ends `wait`, so wait again.
while true; do
    status=0
    wait "$launchers" || status=$?
    kill -0 "$launchers" 2>/dev/null || break
done

# SLURM queues a job again that it has ended itself; this one ended before.
if $is_stopped && ((status != 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
