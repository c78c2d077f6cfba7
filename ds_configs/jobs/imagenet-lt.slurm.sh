#!/bin/bash
#SBATCH --job-name=imagenet-lt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --nodelist=node1,node2
set -uo pipefail
cd /shared/work || exit 2

export NCCL_SOCKET_IFNAME=eth0
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

status=0
# ranks get the time to say which one was lost
# shellcheck disable=SC2016  # variables of the task, not of this script
srun --kill-on-bad-exit=0 bash -c \
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_SIZE=8; exec "$@"' rank \
    paco-train --config imagenet_lt_resnet50 --output /shared/runs/imagenet-lt --set data.shards=/shared/imagenet_lt --set step.micro_batches=16 --expect-ranks 16 || status=$?

case "$status" in
    75|76|137) [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
