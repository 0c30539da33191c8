#!/bin/bash
# Train over several nodes of any Slurm cluster. Written from the site file generic_slurm.yaml by
# `credit init --site`: edit that.
#   sbatch -A PROJECT -N 4 generic_slurm.sh my.yaml [--set trainer.epochs=20 ...]
#   CREDIT_IMAGE=/path/credit.sif  runs in that container; CREDIT_VENV=/path/venv in that environment; else the active one
# The job saves shortly before its time is up (CREDIT_STOP_BEFORE=120 seconds), and goes on in a new one until the epochs
# are done.
#SBATCH --job-name=credit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
CONFIG=${1:?usage: sbatch generic_slurm.sh CONFIG [options of credit train]}; shift
cd "$SLURM_SUBMIT_DIR" || exit
job=$SLURM_JOB_ID  # of an array's last task, also the number of the array
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# By the clock: a signal to the ranks would also end the helper that mounts a container's image.
end=$(squeue --noheader --jobs "$job" --format %e)
export CREDIT_STOP_AT=$(( $(date -d "$end" +%s 2>/dev/null || echo 9999999999) - ${CREDIT_STOP_BEFORE:-120} ))
# What the ranks of this job know and nobody else does; launchers hand it to them in their environment.
CREDIT_SECRET=${CREDIT_SECRET:-$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')}; export CREDIT_SECRET
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it since Slurm 22.05
credit=(python -m credit)
if [ -n "${CREDIT_VENV:-}" ]; then credit=("$CREDIT_VENV/bin/python" -m credit); fi
if [ -n "${CREDIT_IMAGE:-}" ]; then credit=(apptainer exec --nv "$CREDIT_IMAGE" python -m credit); fi

srun --wait=60 --kill-on-bad-exit=0 "${credit[@]}" train "$CONFIG" "$@"
code=$?
if [ $code = 75 ]; then  # this run was stopped by a signal or the clock, and saved
  scontrol requeue "$job"
fi
exit $code
