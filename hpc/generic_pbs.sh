#!/bin/bash
# Train over several nodes of any PBS Pro cluster. Written by `python -m credit.launch.sites` from
# hpc/sites/generic_pbs.yaml: edit that.
#   qsub -A PROJECT -v CONFIG=my.yaml hpc/generic_pbs.sh      (-l select=... for more nodes, as below)
#   CREDIT_IMAGE=/path/credit.sif  runs in that container; CREDIT_VENV=/path/venv in that environment; else the active one
# The job saves shortly before its time is up (CREDIT_STOP_BEFORE=120 seconds), and goes on in a new one until the epochs
# are done.
#PBS -N credit
#PBS -l select=1:ncpus=32:ngpus=4:mpiprocs=4
#PBS -l walltime=12:00:00
#PBS -j oe
#PBS -k oed
set -u
: "${CONFIG:?usage: qsub -v CONFIG=my.yaml hpc/generic_pbs.sh}"
set -- ${OPTIONS:-}
cd "$PBS_O_WORKDIR"
RANKS=$(wc -l < "$PBS_NODEFILE")
export CREDIT_FIRST_HOST=$(head -n 1 "$PBS_NODEFILE")  # the other nodes do not have the file
# PBS kills at the walltime without a word to the ranks: they stop by the clock.
export CREDIT_STOP_AT=$(( $(date +%s) + 43200 - ${CREDIT_STOP_BEFORE:-120} ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONNOUSERSITE=1
credit=(python -m credit)
if [ -n "${CREDIT_VENV:-}" ]; then credit=("$CREDIT_VENV/bin/python" -m credit); fi
if [ -n "${CREDIT_IMAGE:-}" ]; then credit=(apptainer exec --nv "$CREDIT_IMAGE" python -m credit); fi

mpiexec -n $RANKS --ppn 4 "${credit[@]}" train "$CONFIG" "$@"
code=$?

"${credit[@]}" status "$CONFIG" "$@"
if [ $? = 75 ]; then  # stopped by a signal or the clock, and saved
  qsub -W depend=afterany:"$PBS_JOBID" -v CONFIG="$CONFIG",OPTIONS="$*" "$PBS_O_WORKDIR/hpc/generic_pbs.sh"
fi
exit $code
