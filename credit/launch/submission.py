"""Jobs from a login node, by one call: submitit for Slurm and for this machine, qsub for PBS. No torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from credit.boundary import bounded
from credit.bounds import MOST
from credit.config import Config, load_config
from credit.errors import ConfigError, LaunchError, Stopped
from credit.launch.secret import VARIABLE
from credit.launch.shell import command, quote, words
from credit.launch.sites import CLOCK, Site, environment, job_script, load_site
from credit.launch.sites import checked as checked_site
from credit.layout import mesh_shape
from credit.stop import stop_requests

LOCAL = "local"
REQUEUE = f"trap '[ $? != {Stopped.exit_code} ] || scontrol requeue \"$job\"' EXIT  # stopped by a signal, and saved"


@dataclass(frozen=True)
class Submission:
    """A submitted job.

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
        """Train; end with the codes of `credit train`, among them that at which the job script requeues.

        submitit's own handler would save on rank 0 alone, and a collective save would wait for the others for ever. And
        a container has no scontrol.
        """
        code = bounded(self._train)
        if code:
            sys.exit(code)
        return "finished"

    def _train(self) -> None:
        with stop_requests() as request:
            from credit.launch.job import start_job
            from credit.training.train import train

            with start_job(lambda: load_config(self.config, self.changes)) as job:
                train(job, request)


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
        site: a name in `hpc/sites`, a site file of your own, or "local": ranks on this machine, without a scheduler.
        nodes, ranks_per_node: one rank a GPU of the site by default.
        container: image in which the ranks run, by the site's own container command.
        changes: assignments such as "trainer.epochs=2".
        walltime: hours:minutes:seconds, the site's longest by default.
        account: to be charged.
        options: more options of sbatch, by name.
        dry_run: submit nothing; give the exact script instead.

    Returns:
        The submission, or the script.

    Raises:
        ConfigError: if the config, the site or the layout is wrong, before anything is submitted.
        LaunchError: if the scheduler refuses the job, in its words.
    """
    checked = load_config(config, changes)
    known = load_site("generic_slurm" if site == LOCAL else site)
    ranks = ranks_per_node or (1 if site == LOCAL else known.gpus_per_node)
    _check_layout(checked, nodes, ranks)
    if walltime is not None:
        known = checked_site({**known.model_dump(), "walltime": walltime}, "the time of the job")
    task = TrainTask(str(Path(config).absolute()), changes)
    folder = checked.run.absolute() / "jobs"
    order = _Order(site, known, task, folder, nodes, ranks, container, account, options or {}, dry_run)
    if site == LOCAL:
        return _submit_locally(order)
    return _qsub(order) if known.scheduler == "pbs" else _sbatch(order)


def _check_layout(config: Config, nodes: int, ranks: int) -> None:
    for name, number in {"nodes": nodes, "ranks_per_node": ranks}.items():
        if type(number) is not int or not 1 <= number <= MOST:
            raise ConfigError(f"is {number!r}, and must be a whole number from 1 to {MOST}", name)
    try:
        mesh_shape(config.trainer.parallelism.model_dump(), nodes * ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _sbatch(order: _Order) -> Submission | str:
    import submitit

    site, ranks = order.site, order.ranks
    python, options = quote(sys.executable), words(site.launch.removeprefix("srun"))
    if order.container is not None:
        image = str(order.container)
        python = "python" if site.container_is_option else f"{command(site.container, image=quote(image))} python"
        options += words(site.container, image=image) if site.container_is_option else []
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
        "time": max(-(-site.seconds // 60), 1),  # 0 would be without end
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
    _refuse_unwritable(order.folder, given)
    executor.update_parameters(
        **{name: value for name, value in given.items() if name in known},
        additional_parameters={name: value for name, value in given.items() if name not in known},
    )
    if order.dry_run:
        shown = f"{python} -u -m submitit.core._submit {quote(order.folder)}"
        return executor._make_submission_file_text(shown, "dry-run")
    order.folder.mkdir(parents=True, exist_ok=True)
    try:
        job = executor.submit(order.task)
    except (subprocess.CalledProcessError, FileNotFoundError, submitit.core.utils.FailedJobError) as error:
        raise LaunchError(f"the scheduler did not take the job: {' '.join(str(error).split())}") from None
    log = Path(job.paths.stdout)
    return Submission(
        job.job_id, log, (f"squeue -j {job.job_id}", f"tail -F {quote(log)}", f"scancel {job.job_id}"), job
    )


def _refuse_unwritable(folder: Path, given: Mapping[str, Any]) -> None:
    """Raise a ConfigError for what submitit's #SBATCH lines would give to Slurm as something else.

    They are quoted, and Slurm knows quotes. But a line ends where it ends, a backslash counts within quotes too, and
    names of logs have patterns of their own.
    """
    for name, value in {"run": folder, **given}.items():
        if name in ("setup", "srun_args"):  # lines of the script itself
            continue
        bad = [one for one in str(value) if not one.isprintable() or one == "\\" or (name == "run" and one == "%")]
        if bad:
            raise ConfigError(f"{name} is {str(value)!r}, and {bad[0]!r} cannot stand in an #SBATCH line: leave it out")


def _submit_locally(order: _Order) -> Submission | str:
    import submitit

    if order.dry_run:
        return f"{order.ranks} x {quote(sys.executable)} -u -m submitit.core._submit {quote(order.folder)}"
    order.folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.LocalExecutor(folder=order.folder)
    executor.update_parameters(tasks_per_node=order.ranks, timeout_min=60 * 24 * 7)
    job = executor.submit(order.task)
    log = Path(job.paths.stdout)
    return Submission(job.job_id, log, (f"tail -F {quote(log)}", f"kill {job.job_id}"), job)


def _qsub(order: _Order) -> Submission | str:
    task = order.task
    # As sbatch does with all of them. The script would show a secret, and every job draws one.
    known = {name: value for name, value in os.environ.items() if name != VARIABLE}
    ours = {name: value for name, value in known.items() if re.fullmatch(r"CREDIT_\w+", name)}
    place = {"CREDIT_IMAGE": str(order.container or ""), "CREDIT_VENV": "" if order.container else sys.prefix}
    script = job_script(
        order.name,
        nodes=order.nodes,
        ranks=order.ranks,
        walltime=order.site.walltime,
        given={**ours, "CONFIG": task.config, **place},
        options=[word for change in task.changes for word in ("--set", change)],
    )
    call = ["qsub", *(["-A", order.account] if order.account else [])]
    if order.dry_run:
        return f"# {' '.join(map(quote, call))} <<'EOF'\n{script}"
    try:
        done = subprocess.run(call, input=script, text=True, capture_output=True, check=True)
    except FileNotFoundError:
        raise LaunchError("there is no qsub here: submit from a login node of the site") from None
    except subprocess.CalledProcessError as error:
        raise LaunchError(f"the scheduler did not take the job: {error.stderr.strip()}") from None
    job_id = done.stdout.strip()
    log = Path(f"credit.o{job_id.split('.')[0]}").absolute()
    return Submission(job_id, log, (f"qstat {job_id}", f"tail -F {quote(log)}", f"qdel {job_id}"))
