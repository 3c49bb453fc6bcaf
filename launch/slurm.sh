#!/usr/bin/env bash
# Trains under Slurm and goes on by itself after preemption, a time limit or a lost node:
#
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00 \
#       launch/slurm.sh --config configs/base_config.yaml [section.key=value ...]
#
# One task a node uses all of its GPUs. The tasks find one another; training.output_dir must be on a disk that
# all share, or be a gs:// or s3:// URL.
#SBATCH --job-name=l1_jax
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit 2

# Not --kill-on-bad-exit, whose signal would hide a task's own exit code: a lost task ends the others by itself.
srun --wait=120 --unbuffered "${PYTHON:-python}" scripts/train.py "$@" --resume --join-timeout 1800
code=$?

# 75: stopped by a signal, after saving; or the run directory, or a task, was not to be had yet, which the lock of a lost
# node is for a while. If it is another job that holds the directory, this one tries MAX_RESTARTS times and then fails.
# 128 and more: a task was killed. Anything else would happen again.
if [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-50}" ]; then
        echo "exit code $code: to be resumed in a new start"
        scontrol requeue "$SLURM_JOB_ID" && sleep 300 # until Slurm ends this start
    fi
fi
exit "$code"
