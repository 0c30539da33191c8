"""Trainings that something happens to. They sleep most of the time, see `SlowUNet`: they are run beside other work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.launch import cluster
from tests.launch.jobs import DEADLINE_S, PYTHON, ROOT, environment, ranks_of, run, state, steps_done, until

SLOW = ["--set", "model.name=tests.launch.slow.SlowUNet"]
EPOCHS, STEPS = 40, 200
LONG = [*SLOW, "--set", f"trainer.epochs={EPOCHS}", "--set", "trainer.checkpoint_every=10"]
STEP_S = 0.1
"""Of a run that is to be interrupted by hand: all its steps take 20 s and more."""
TWO_NODES = ["-N2", "-n2", "--ntasks-per-node=1"]


def train(base: Path, folder: Path) -> subprocess.CompletedProcess:
    """The long run, or what is left of it, at full speed."""
    return run("srun", *TWO_NODES, PYTHON, "-m", "credit", "train", base, "--set", f"run={folder}", *LONG)


def submitted(base: Path, folder: Path, step_s: float, *options: str, **env: str) -> str:
    """Hand the long run in; the job's number."""
    more = [*TWO_NODES, f"--output={folder}/job.log", *options]
    words = ["hpc/generic_slurm.sh", base, "--set", f"run={folder}", *LONG]
    done = run("sbatch", "--parsable", *more, *words, CREDIT_TEST_STEP_S=f"{step_s:.4f}", **env)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def is_gone(job: str) -> bool:
    """From Slurm's queue."""
    return not run("squeue", "-h", "-j", job).stdout.strip().startswith(job)


def reach_the_time_limit(base: Path, folder: Path, startup_s: float) -> str:
    """A limit of minutes, of which some seconds are used; the job chains itself. Its log."""
    return with_time_enough(2 * startup_s + 5, partial(_reach_the_time_limit, base, folder))


def _reach_the_time_limit(base: Path, folder: Path, used_s: float) -> str:
    minutes = int(used_s // 60) + 1
    shutil.rmtree(folder)
    folder.mkdir()
    kept = {"CREDIT_STOP_BEFORE": f"{60 * minutes - used_s:.0f}"}
    job = submitted(base, folder, used_s / STEPS, f"--time={minutes}", **kept)
    until(lambda: state(folder) == "finished" or is_gone(job), "the epochs are done", seconds=2 * DEADLINE_S)
    return (folder / "job.log").read_text()


def with_time_enough(seconds: float, job: Callable[[float], str]) -> str:
    """What a job printed that is given this long; where it was over before the first step, as on a machine that other
    tests have slowed down, it is given twice as long, as the error says."""
    said = job(seconds)
    if "before its first step" not in said:
        return said
    assert seconds < DEADLINE_S, said
    return with_time_enough(2 * seconds, job)


def suffer(base: Path, folder: Path) -> str:
    """First `scontrol requeue`; then the second node dies with all its processes, and Slurm starts the job again; then
    `scancel`, at which it saves; and the same command goes on to the end. What that one printed."""
    job = submitted(base, folder, STEP_S, "--partition=frail")
    until(lambda: steps_done(folder) > 10, "steps are done")
    run("scontrol", "requeue", job)
    goes_on(folder, starts=2)
    nodes = run("scontrol", "show", "hostnames", run("squeue", "-h", "-j", job, "-o", "%N").stdout.strip())
    second = nodes.stdout.split()[1]
    cluster.crash_node(second)
    try:
        goes_on(folder, starts=3)
    finally:
        cluster.start_node(second)
    run("scancel", job)
    until(lambda: state(folder) == "stopped", "the job has saved", seconds=30)
    until(lambda: is_gone(job), "the job is gone", seconds=30)
    return train(base, folder).stdout


def goes_on(folder: Path, starts: int) -> None:
    """Wait until the job resumes, as the `starts`-th of its starts, and does more steps than it had done."""
    before = steps_done(folder)
    resumed = starts - 1
    until(lambda: (folder / "job.log").read_text().count("resuming from") == resumed, "the job resumes")
    until(lambda: steps_done(folder) > before and state(folder) == "running", "more steps are done")


def lose_a_rank(base: Path, folder: Path, how: signal.Signals) -> tuple[int, str]:
    """The second of two; srun's exit code, and all that was printed."""
    options = [*SLOW, "--set", "trainer.epochs=1000", "--set", f"run={folder}", "--set", "trainer.timeout=10"]
    with (folder / "out").open("w") as out:
        job = subprocess.Popen(
            ["srun", "-w", "n0,n1", *TWO_NODES, "--wait=3", PYTHON, "-m", "credit", "train", str(base), *options],
            **{"stdout": out, "stderr": out, "cwd": ROOT, "env": environment(CREDIT_TEST_STEP_S=str(STEP_S))},
        )
    until(lambda: steps_done(folder) > 10, "steps are done")
    second = [pid for pid in ranks_of(folder) if b"SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(second) == 1
    os.kill(second[0], how)
    code = job.wait(60)  # the peers' timeout, their roll call, and srun's wait: 10 + 10 + 3
    return code, (folder / "out").read_text()


ODD = 'it\'s a "run"\nof $(touch evil) `touch evil`, task'
"""The name of a run directory, but for the number of its task."""
ARRAY = """#!/bin/bash
exec bash hpc/generic_slurm.sh "${@//TASK/$SLURM_ARRAY_TASK_ID}"
"""


class Array(NamedTuple):
    """What became of an array of two jobs, and of one that was handed in again in a way that fails."""

    restarts: list[int]
    log: str
    broken: subprocess.CompletedProcess


def run_an_array(base: Path, folder: Path) -> Array:
    """Two tasks, each of 3 + 1 ranks on two nodes, into directories with quotes, blanks and line breaks in their names.

    The last, whose number is also that of the array, is told to stop: it alone is put back, and goes on. What it had
    saved until then is handed in once more, on 3 ranks, which do not divide into its mesh.
    """
    script = folder / "array.sh"
    script.write_text(ARRAY)
    runs = [folder / f"{ODD} {task}" for task in range(2)]
    where = ["--array=0-1", "-N2", "-n4", "--distribution=plane=3", "--requeue", "--open-mode=append"]
    run_key = json.dumps(f"{folder}/{ODD} TASK")
    words = [script, base, "--set", f"run={run_key}", *SLOW]
    done = run("sbatch", "--parsable", *where, f"--output={folder}/%a.log", *words, CREDIT_TEST_STEP_S="1")
    assert done.returncode == 0, done.stdout
    job = done.stdout.strip()
    until(lambda: steps_done(runs[1]) > 2, "steps are done")
    run("scancel", "--signal=USR2", f"{job}_1")
    until(lambda: state(runs[1]) == "stopped", "the task has saved")
    shutil.copytree(runs[1], folder / "broken")
    until(lambda: all(state(one) == "finished" for one in runs), "both tasks are done")
    until(lambda: is_gone(job), "the jobs are gone", seconds=60)
    restarts = [_restarts(f"{job}_{task}") for task in range(2)]
    return Array(restarts, "".join((folder / f"{task}.log").read_text() for task in range(2)), _broken(base, folder))


def _broken(base: Path, folder: Path) -> subprocess.CompletedProcess:
    """With the status of a run that was stopped. If it goes in circles it does not end, and this fails."""
    where = ["-N1", "-n3", "--ntasks-per-node=3", f"--output={folder}/broken.log"]
    words = ["hpc/generic_slurm.sh", str(base), "--set", f"run={folder}/broken"]
    done = run("sbatch", *where, *words, timeout=120)
    done.stdout = (folder / "broken.log").read_text()
    return done


def _restarts(job: str) -> int:
    told = run("scontrol", "-o", "show", "job", job).stdout
    return int(next(part for part in told.split() if part.startswith("Restarts=")).removeprefix("Restarts="))
