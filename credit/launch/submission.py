"""Jobs from a login node, by one call: submitit for Slurm and for this machine, qsub for PBS. No torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from credit.config import load_config
from credit.errors import ConfigError, LaunchError, Stopped
from credit.launch.sites import CLOCK, Site, environment, job_script, load_site
from credit.launch.stop import stop_requests
from credit.layout import mesh_shape

LOCAL = "local"
REQUEUE = (
    f"trap '[ $? != {Stopped.exit_code} ] || scontrol requeue $SLURM_JOB_ID' EXIT  # stopped by a signal, and saved"
)


@dataclass(frozen=True)
class Submission:
    """A job that was handed in.

    Attributes:
        job_id: the scheduler's.
        log: where its output goes; of rank 0 under submitit.
        follow: commands to watch it with.
        job: submitit's handle; None under PBS.
    """

    job_id: str
    log: Path
    follow: tuple[str, ...]
    job: Any = None

    def __str__(self) -> str:
        return "\n".join([f"job {self.job_id}, log {self.log}", *(f"  {command}" for command in self.follow)])


@dataclass(frozen=True)
class _Order:
    """What `submit` was asked for, checked."""

    name: str
    site: Site
    task: TrainTask
    folder: Path
    nodes: int
    ranks: int
    container: str | Path | None
    account: str | None
    options: dict[str, Any]
    dry_run: bool


class TrainTask:
    """What every rank of a submitted job runs. Pickled by reference: the job imports it from its own installation."""

    def __init__(self, config: str, changes: Sequence[str]) -> None:
        self.config, self.changes = config, tuple(changes)

    def __call__(self) -> str:
        """Train; when asked to stop save, and end with the code at which the job script requeues.

        submitit's own handler would save on rank 0 alone, and a collective save would wait for the others for ever. And
        a container has no scontrol.
        """
        try:
            with stop_requests() as request:
                from credit.launch.job import start_job
                from credit.training.train import train

                with start_job(lambda: load_config(self.config, self.changes)) as job:
                    train(job, request)
        except Stopped as stopped:
            if os.environ.get("SLURM_PROCID") == "0":
                print(f"credit: stopped: {stopped}", flush=True)
            sys.exit(Stopped.exit_code)
        return "finished"


def submit(
    config: str | Path,
    *,
    site: str = "generic_slurm",
    nodes: int = 1,
    ranks_per_node: int | None = None,
    container: str | Path | None = None,
    changes: Sequence[str] = (),
    walltime: str | None = None,
    account: str | None = None,
    options: dict[str, Any] | None = None,
    dry_run: bool = False,
) -> Submission | str:
    """Hand a training job in.

    Args:
        config: path of a YAML config, which is checked first.
        site: a name in `hpc/sites`, or "local": ranks on this machine, without a scheduler.
        nodes, ranks_per_node: one rank a GPU of the site by default.
        container: image in which the ranks run, by the site's own container command.
        changes: assignments such as "trainer.epochs=2".
        walltime: hours:minutes:seconds, the site's longest by default.
        account: to be charged.
        options: more options of sbatch, by name.
        dry_run: hand nothing in; the exact script instead.

    Returns:
        The submission, or the script.

    Raises:
        ConfigError: if the config, the site or the layout is wrong, before anything is handed in.
        LaunchError: if the scheduler refuses the job, in its words.
    """
    checked = load_config(config, changes)
    known = load_site("generic_slurm" if site == LOCAL else site)
    ranks = ranks_per_node or (1 if site == LOCAL else known.gpus_per_node)
    try:
        mesh_shape(checked.trainer.parallelism.model_dump(), nodes * ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if walltime is not None:
        known = Site.model_validate({**known.model_dump(), "walltime": walltime})
    task = TrainTask(str(Path(config).absolute()), changes)
    folder = checked.run.absolute() / "jobs"
    order = _Order(site, known, task, folder, nodes, ranks, container, account, options or {}, dry_run)
    if site == LOCAL:
        return _submit_locally(order)
    return _qsub(order) if known.scheduler == "pbs" else _sbatch(order)


def _sbatch(order: _Order) -> Submission | str:
    import submitit

    site, ranks = order.site, order.ranks
    python, options = shlex.quote(sys.executable), shlex.split(site.launch.removeprefix("srun"))
    if order.container is not None:
        inside = site.in_container(str(order.container))
        python = "python" if site.container_is_option else f"{inside} python"
        options += shlex.split(inside) if site.container_is_option else []
    order.folder.mkdir(parents=True, exist_ok=True)
    # It refuses to be made where there is no srun. A dry run needs none, and without sbatch `submit` says so.
    kind = type("SlurmExecutor", (submitit.SlurmExecutor,), {"affinity": classmethod(lambda cls: 2)})
    executor = kind(folder=order.folder, python=python, max_num_timeout=1000)
    known = submitit.SlurmExecutor._valid_parameters()
    wanted = {
        "job_name": "credit",
        "nodes": order.nodes,
        "ntasks_per_node": ranks,
        "gpus_per_node": ranks,
        "cpus_per_task": max(site.cores_per_node // ranks, 1),
        "time": site.seconds // 60,
        "signal": "B:CONT@60",  # instead of submitit's, which see CLOCK
        "srun_args": options,
        "setup": [*CLOCK.splitlines(), *environment(site, ranks), REQUEUE],
        "requeue": True,
        site.queue_option: site.queue,
        "constraint": site.constraint,
        "account": order.account,
        **order.options,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    executor.update_parameters(
        **{name: value for name, value in given.items() if name in known},
        additional_parameters={name: value for name, value in given.items() if name not in known},
    )
    if order.dry_run:
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(order.folder))}"
        return executor._make_submission_file_text(command, "dry-run")
    try:
        job = executor.submit(order.task)
    except (subprocess.CalledProcessError, FileNotFoundError, submitit.core.utils.FailedJobError) as error:
        raise LaunchError(f"the scheduler did not take the job: {' '.join(str(error).split())}") from None
    log = Path(job.paths.stdout)
    return Submission(job.job_id, log, (f"squeue -j {job.job_id}", f"tail -F {log}", f"scancel {job.job_id}"), job)


def _submit_locally(order: _Order) -> Submission | str:
    import submitit

    if order.dry_run:
        folder = shlex.quote(str(order.folder))
        return f"{order.ranks} x {shlex.quote(sys.executable)} -u -m submitit.core._submit {folder}"
    order.folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.LocalExecutor(folder=order.folder)
    executor.update_parameters(tasks_per_node=order.ranks, timeout_min=60 * 24 * 7)
    job = executor.submit(order.task)
    log = Path(job.paths.stdout)
    return Submission(job.job_id, log, (f"tail -F {log}", f"kill {job.job_id}"), job)


def _qsub(order: _Order) -> Submission | str:
    task = order.task
    script = job_script(order.name, nodes=order.nodes, ranks=order.ranks, walltime=order.site.walltime)
    values = {"CONFIG": task.config, "OPTIONS": " ".join(f"--set {change}" for change in task.changes)}
    values |= {"CREDIT_IMAGE": str(order.container)} if order.container else {"CREDIT_VENV": sys.prefix}
    given = ",".join(f'{key}="{value}"' for key, value in values.items() if value)
    command = ["qsub", *(["-A", order.account] if order.account else []), "-v", given]
    if order.dry_run:
        return f"# {shlex.join(command)} <<'EOF'\n{script}"
    try:
        done = subprocess.run(command, input=script, text=True, capture_output=True, check=True)
    except FileNotFoundError:
        raise LaunchError("there is no qsub here: submit from a login node of the site") from None
    except subprocess.CalledProcessError as error:
        raise LaunchError(f"the scheduler did not take the job: {error.stderr.strip()}") from None
    job_id = done.stdout.strip()
    log = Path(f"credit.o{job_id.split('.')[0]}").absolute()
    return Submission(job_id, log, (f"qstat {job_id}", f"tail -F {log}", f"qdel {job_id}"))
