#!/usr/bin/env bash
# Train on several nodes under Slurm: sbatch docs/slurm.sh CONFIG.yaml run=FOLDER [a.b=c ...]
# The job is put back into the queue when its time is nearly over and the run has saved, and goes on from its checkpoint.
# FOLDER has to lie on a file system that all nodes see. Set the lines below to your cluster.
#SBATCH --job-name=fastrdm
#SBATCH --output=%x-%j.out
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail

# The environment of the run: a virtual environment here, or `module load ...`, or a container before fastrdm below.
[ -f "$HOME/fastrdm/bin/activate" ] && . "$HOME/fastrdm/bin/activate"

most_requeues=50
saved=75 # status of a run that was asked to stop and has saved
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
over=0
trap 'over=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # to the launcher on each node, and from there to its workers

# srun does not take the number of cores from sbatch since Slurm 22.05
srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
    fastrdm train --processes gpu --nodes "$SLURM_NNODES" --max-restarts 3 \
    --rdzv-endpoint "$head:29400" --rdzv-id "$SLURM_JOB_ID" "$@" &
training=$!
wait "$training"
status=$?
if [ "$over" = 1 ]; then # the trap has ended the wait above
    wait "$training"
    status=$?
fi
if [ "$over" = 1 ] && [ "$status" = "$saved" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$most_requeues" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
