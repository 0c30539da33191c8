#!/bin/bash
# Train over several nodes of any PBS Pro cluster. Written from the site file generic_pbs.yaml by
# `credit init --site`: edit that.
#   qsub -A PROJECT -v CONFIG=my.yaml generic_pbs.sh      (-l select=... for more nodes, as below)
#   More options of credit train: export OPTIONS="--set trainer.epochs=20" and qsub -v CONFIG=my.yaml,OPTIONS ...
#   CREDIT_IMAGE=/path/credit.sif  runs in that container; CREDIT_VENV=/path/venv in that environment; else the active one
# The job saves shortly before its time is up (CREDIT_STOP_BEFORE=120 seconds), and goes on in a new one until the epochs
# are done.
#PBS -N credit
#PBS -l select=1:ncpus=32:ngpus=4:mpiprocs=4
#PBS -l walltime=12:00:00
#PBS -j oe
#PBS -k oed
set -u
given=(CONFIG)  # the variables that the next job gets, too

# What PBS knows of this job: its time, the words of qsub for the next one, and the variables that it was given.
ask_pbs() {
  local line name value
  while IFS= read -r line; do
    name=${line%% = *} value=${line#* = }
    name=${name//[[:blank:]]/}
    case $name in
      Job_Name) again+=(-N "$value") ;;
      Account_Name) again+=(-A "$value") ;;
      project) [ "$value" = _pbs_project_default ] || again+=(-P "$value") ;;
      Join_Path) again+=(-j "$value") ;;
      Keep_Files) again+=(-k "$value") ;;
      Mail_Points) again+=(-m "$value") ;;
      Mail_Users) again+=(-M "$value") ;;
      group_list) again+=(-W "group_list=$value") ;;
      Resource_List.nodect | Resource_List.ncpus | Resource_List.ngpus) ;;  # sums over select, as the next line
      Resource_List.mpiprocs | Resource_List.mem) ;;
      Resource_List.*)
        again+=(-l "${name#Resource_List.}=$value")
        if [ "$name" = Resource_List.walltime ]; then walltime=$value; fi
        ;;
      Variable_List)
        for name in $(grep -oE '(^|,)[A-Za-z_][A-Za-z0-9_]*=' <<< "$value" | tr -d ',='); do
          case $name in
            PBS_* | TMPDIR | NCPUS | PWD | OLDPWD | SHLVL | HOSTNAME | CREDIT_SECRET | _) ;;
            *) given+=("$name") ;;
          esac
        done
        ;;
    esac
  done < <(qstat -f "$PBS_JOBID" | sed ':a; N; $!ba; s/\n\t//g')
  [ -n "${again[*]}" ] || echo "credit: qstat says nothing of this job: it stops after $walltime, and submits no next one" >&2
}

# The next job is a script on qsub's input: no word of it is read by the rules of -v, and nothing else needs to be there.
hand_in_the_next() {
  local name
  [ -n "${again[*]}" ] || return
  {
    printf '%s\n' '#!/bin/bash' 'set -u'
    for name in "${given[@]}"; do
      if [ -n "${!name+x}" ]; then declare -p "$name"; fi
    done
    declare -p given
    declare -f ask_pbs hand_in_the_next job
    printf 'job %s\n' "${*@Q}"
  } | qsub "${again[@]}" ${PBS_O_QUEUE:+-q "$PBS_O_QUEUE"} -W depend=afterany:"$PBS_JOBID"
}

job() {
  local again=() walltime=12:00:00 hours minutes seconds
  cd "$PBS_O_WORKDIR" || exit
  ask_pbs
  RANKS=$(wc -l < "$PBS_NODEFILE")
  CREDIT_FIRST_HOST=$(head -n 1 "$PBS_NODEFILE")  # the other nodes do not have the file
  # PBS kills at the walltime without a word to the ranks: they stop by the clock.
  IFS=: read -r hours minutes seconds <<< "$walltime"
  CREDIT_STOP_AT=$(( $(date +%s) + 3600 * 10#$hours + 60 * 10#$minutes + 10#$seconds - ${CREDIT_STOP_BEFORE:-120} ))
  export CREDIT_FIRST_HOST CREDIT_STOP_AT
  # What the ranks of this job know and nobody else does; launchers hand it to them in their environment.
  CREDIT_SECRET=${CREDIT_SECRET:-$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')}; export CREDIT_SECRET
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1
  credit=(python -m credit)
  if [ -n "${CREDIT_VENV:-}" ]; then credit=("$CREDIT_VENV/bin/python" -m credit); fi
  if [ -n "${CREDIT_IMAGE:-}" ]; then credit=(apptainer exec --nv "$CREDIT_IMAGE" python -m credit); fi

  mpiexec -n "$RANKS" --ppn 4 "${credit[@]}" train "$CONFIG" "$@"
  code=$?
  if [ $code = 75 ]; then  # this run was stopped by a signal or the clock, and saved
    hand_in_the_next "$@"
  fi
  exit $code
}

: "${CONFIG:?usage: qsub -A PROJECT -v CONFIG=my.yaml generic_pbs.sh}"
# Words in quotes as in a shell, of which nothing is run.
mapfile -d '' -t options < <(xargs -r printf '%s\0' <<< "${OPTIONS:-}")
wait $! || { echo "OPTIONS cannot be split into words: $OPTIONS" >&2; exit 2; }
job "${options[@]}"
