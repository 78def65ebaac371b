#!/bin/bash
# One process a node over Slurm: sbatch launch/slurm.sh COMMAND, such as
#
#   sbatch --nodes 4 launch/slurm.sh tuco-jax score --base X --tuned Y --prompts P.jsonl --out S.jsonl
#
# JAX reads from Slurm's own variables where process 0 is, how many there are and which each is: no
# option says so. Models, prompts and results lie where all nodes see them. A job that was cut off
# goes on when it is submitted again (for runs in a directory: with --resume true).
#SBATCH --job-name=tuco-reward-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --output=slurm-%j.log

set -euo pipefail
if [ $# -eq 0 ]; then
  echo "usage: sbatch launch/slurm.sh COMMAND ..." >&2
  exit 2
fi
# JAX would give the one process of a node its first GPU alone.
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 1 ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# A process that is lost ends the others, and Slurm says which it was.
exec srun --kill-on-bad-exit=1 "$@"
