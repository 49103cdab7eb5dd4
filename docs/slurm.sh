#!/usr/bin/env bash
# All backbones of the profile `paper` on several nodes. A preempted job saves, is queued again and resumes;
# after its time limit submit it again.
#
#     sbatch --array=1-16 --nodes=1 --gpus-per-node=1 --cpus-per-task=12 docs/slurm.sh
#                                                 every backbone, each on one GPU (the best use of a cluster)
#     BACKBONE=sqrt sbatch docs/slurm.sh          one on all GPUs of the nodes below
#
# Set DATA (the data root) and LT_OUTPUT_ROOT (both on a file system that all nodes see), and the numbers of
# nodes, GPUs and cores to your cluster's. The batch of a recipe must divide by all GPUs together.

#SBATCH --job-name=lt_core
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

set -euo pipefail
: "${DATA:?name the data root in DATA}"
export LT_OUTPUT_ROOT="${LT_OUTPUT_ROOT:-$PWD}"
export OMP_NUM_THREADS=1
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    exec srun python -m lt_core train --profile paper --backbone all --data-root "$DATA" \
        --share "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
fi

first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m lt_core train --profile paper --backbone "${BACKBONE:-all}" --data-root "$DATA"
