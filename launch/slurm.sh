#!/bin/bash
# sbatch launch/slurm.sh --config=configs/gpt2_124m.py --workdir=runs/gpt2
#
# A process a GPU; on a cluster of CPUs leave the line about GPUs out and set --ntasks-per-node to 1. The workdir and the
# data must lie where all nodes see the same files. JAX reads what SLURM sets, so nothing is said here of addresses.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8        # not per task: JAX gives each process the GPU of its number on the node
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180        # before time is up: all processes save the same step and end with status 143
#SBATCH --requeue                # after a preemption or a failed node the same command goes on from there
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

# Since SLURM 22.05 srun does not take this over from sbatch: each process would have one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" main.py train "$@"
status=$?
if [ $status -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
