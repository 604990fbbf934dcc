#!/usr/bin/env bash
# Fine-tunes on several nodes with GPUs under SLURM, one process for each GPU. SLURM queues a preempted job again, and
# the script queues one that reaches its time limit; either resumes from its last checkpoint:
#
#   sbatch train/launch/slurm.sh
#
# Settings, data and output are in a folder that all nodes share.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300

# --- Place 1 of 2: the nodes, and the environment in which phi3-jax[train] and jax[cuda13] are installed.
#SBATCH --job-name=phi3-jax-finetune
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
environment=/shared/phi3-jax/venv

# --- Place 2 of 2: the command.
command=(phi3-jax finetune /shared/finetune.yaml --output-dir /shared/mine --mesh fsdp=16 --distributed)

# --- Nothing below needs a change.
set -euo pipefail
PATH=$environment/bin:$PATH
trap true TERM  # the run saves its state; this script must wait for it

# Each process sees all GPUs of its node and takes the one of its local number, as JAX expects under SLURM.
code=0
srun --wait=300 "${command[@]}" || code=$?

# 143 is 128 + SIGTERM: the run has saved its state. 75: another machine is gone. The same command resumes.
if [ "$code" -eq 143 ] || [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
