"""What is known of an HPC site, as data (`hpc/sites/*.yaml`), and the job scripts written from it. No torch."""

from __future__ import annotations

import difflib
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from credit.config.fields import Count, Positive, Processes
from credit.config.loading import problems_in
from credit.errors import ConfigError
from credit.findings import Finding
from credit.launch.shell import command, directive, quote
from credit.reading import read_yaml
from credit.shipped import HPC

Scheduler = Literal["slurm", "pbs"]
CLOCK = """\
job=$SLURM_JOB_ID  # of an array's last task, also the number of the array
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# By the clock: a signal to the ranks would also end the helper that mounts a container's image.
end=$(squeue --noheader --jobs "$job" --format %e)
export CREDIT_STOP_AT=$(( $(date -d "$end" +%s 2>/dev/null || echo 9999999999) - ${CREDIT_STOP_BEFORE:-120} ))"""
"""Lines of a Slurm job that say which it is, and when it is to stop."""
SECRET = """\
# What the ranks of this job know and nobody else does; launchers hand it to them in their environment.
CREDIT_SECRET=${CREDIT_SECRET:-$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')}; export CREDIT_SECRET"""
"""Lines of every job: drawn on its first node, printed nowhere, an argument of nothing."""
SRUN = "srun --wait=60 --kill-on-bad-exit=0"
"""Ends what is left a minute after the first rank, and with the highest exit code: 75 if all have saved."""
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Text of one line: it may stand in a comment."""


class Site(BaseModel):
    """One file of `hpc/sites`, or of the user's. Its `setup` is shell, and it names what is run: it is trusted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: Line
    source: Line
    """Where the facts are from, with the date."""
    tested: Line
    """Whether this ran, and where."""
    scheduler: Scheduler
    """The one that runs there."""
    gpus_per_node: Processes
    gpu_memory: Positive | None = None
    """Of each, in GB."""
    cores_per_node: Count
    """Cores that jobs may use."""
    walltime: Annotated[str, Field(pattern=r"^[0-9]{1,4}:[0-5][0-9]:[0-5][0-9]$")]
    """Longest job, hours:minutes:seconds."""
    queue: str | None = None
    queue_option: Literal["partition", "qos"] = "partition"
    """What Slurm calls the queue there."""
    constraint: str | None = None
    launch: Line
    """Starts one process a rank; the command follows. {ranks} is how many, {ranks_per_node} how many on each node."""
    container: Annotated[Line, Field(pattern=r"\{image\}")]
    """Runs the command that follows in a container, or, if it begins with --, an option of `launch` that does so."""
    interface: str | None = None
    """Network interface of the fabric, for NCCL a prefix."""
    setup: list[str] = []
    """Lines of the job script before the launch."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = {}

    @field_validator("launch", "container")
    @classmethod
    def _splits_into_words(cls, line: str) -> str:
        shlex.split(line)
        return line

    @property
    def seconds(self) -> int:
        hours, minutes, seconds = map(int, self.walltime.split(":"))
        return 3600 * hours + 60 * minutes + seconds

    @property
    def container_is_option(self) -> bool:
        return self.container.startswith("--")

    @property
    def gloo_interface(self) -> str | None:
        """gloo wants the whole name of one interface."""
        name = self.interface
        return f"{name}0" if name and not name[-1].isdigit() else name


def site_names() -> list[str]:
    return sorted(path.stem for path in (HPC / "sites").glob("*.yaml"))


def load_site(name: str) -> Site:
    """A site that comes with credit, by its name, or a file of the user's, *.yaml.

    Raises:
        ConfigError: if there is no such site or file, or it is wrong.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else HPC / "sites" / f"{name}.yaml"
    if not own and name not in site_names():
        near = difflib.get_close_matches(name, site_names(), 1)
        meant = f"did you mean {near[0]!r}? Otherwise " if near else ""
        raise ConfigError(
            f"there is no site {name!r}; known: {', '.join(site_names())}, local",
            fix=f"{meant}give a file of your own, my.yaml: `credit init --site generic_slurm` shows how",
        )
    return checked(read_yaml(path), f"the site file {path}")


def checked(values: Any, origin: str) -> Site:
    """A site of these values.

    Raises:
        ConfigError: naming what is wrong in `origin`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must hold the keys {', '.join(Site.model_fields)}")
    try:
        return Site.model_validate(values)
    except ValidationError as error:
        problems = problems_in(error, keys=lambda place: [*Site.model_fields])
        said = "; ".join(map(str, problems))
        raise ConfigError(f"{origin} is wrong: {said}", problems=problems) from None


def environment(site: Site, ranks: int) -> list[str]:
    """Lines of every job before its launch."""
    threads = max(site.cores_per_node // ranks, 1)
    # Nothing from the home or the working directory takes the place of what is installed.
    lines = [
        *SECRET.splitlines(),
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}} PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1",
    ]
    if site.scheduler == "slurm":
        lines += ["export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it since Slurm 22.05"]
    if site.interface:
        lines += [f"export NCCL_SOCKET_IFNAME=${{NCCL_SOCKET_IFNAME-{quote(site.interface)}}}"]
        lines += [f"export GLOO_SOCKET_IFNAME=${{GLOO_SOCKET_IFNAME-{quote(site.gloo_interface)}}}"]
    return [*lines, *(f"export {name}={quote(value)}" for name, value in site.env.items()), *site.setup]


def script_name(name: str, scheduler: Scheduler | None = None) -> str:
    """The file of a site's job script: qsub takes derecho.pbs, and derecho.sh is for a Slurm.

    Raises:
        ConfigError: if the site's file has a name that a script cannot repeat.
    """
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    if not re.fullmatch(r"[\w.-]+", stem):
        raise ConfigError(
            f"the name of the site file {name!r} stands in the job script: use letters, digits, _ and - only"
        )
    return f"{stem}.pbs" if stem == "derecho" and scheduler != "slurm" else f"{stem}.sh"


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HPC),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    what = f"the site {name}'s queue or constraint"
    environment.filters |= {"quote": quote, "directive": partial(directive, what=what)}
    return environment.get_template("job.sh.j2")


def job_script(
    name: str,
    scheduler: Scheduler | None = None,
    nodes: int = 1,
    ranks: int | None = None,
    walltime: str | None = None,
    given: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> str:
    """The job script of a site.

    Args:
        name: of a site that comes with credit, or its file.
        scheduler: the site's own by default; derecho.sh is for Slurm though the site runs PBS.
        nodes, ranks: as many nodes, and ranks on each; one a GPU by default.
        walltime: the site's longest by default.
        given, options: under PBS variables, CONFIG among them, and options of `credit train`, which are then in the
            script rather than asked for.

    Raises:
        ConfigError: if there is no such site, or a value cannot stand where it belongs.
    """
    site = load_site(name)
    chosen = scheduler or site.scheduler
    file = script_name(name, chosen)
    if chosen != site.scheduler:  # queues, constraints and the launcher mean nothing to another scheduler
        site = site.model_copy(update={"scheduler": chosen, "queue": None, "constraint": None, "launch": SRUN})
    each = ranks or site.gpus_per_node
    return _template(name).render(
        site=site,
        name=Path(file).stem,
        file=file,
        scheduler=chosen,
        nodes=nodes,
        ranks=each,
        cores=max(site.cores_per_node // each, 1),
        walltime=walltime or site.walltime,
        launch=command(site.launch, ranks='"$RANKS"', ranks_per_node=str(each)),
        container=command(site.container, image='"$CREDIT_IMAGE"'),
        clock=CLOCK,
        environment="\n".join(environment(site, each)),
        given=given,
        options=options,
    )


def examine_site(name: str) -> list[Finding]:
    """Is a site, or a site file of the user's, fit? Its keys, and the job script that comes of it."""
    try:
        site, script = load_site(name), job_script(name)
    except ConfigError as error:
        return [Finding.of(problem, name) for problem in error.problems]
    each = f"{site.gpus_per_node} GPUs{f' of {site.gpu_memory:g} GB' if site.gpu_memory else ''}"
    found = [Finding("ok", name, f"{site.scheduler}, {each} and {site.cores_per_node} cores a node, {site.walltime}")]
    if site.gpu_memory is None:
        found += [Finding("warning", "gpu_memory", "is not said", "`credit plan` asks for --gpu-memory then")]
    if site.cores_per_node % site.gpus_per_node:
        idle = site.cores_per_node % site.gpus_per_node
        found += [Finding("warning", "cores_per_node", f"{idle} are left over by {site.gpus_per_node} ranks")]
    bash = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if bash.returncode:
        found += [Finding("error", "setup", f"bash cannot read the script: {' '.join(bash.stderr.split())}")]
    return found


def scripts() -> dict[str, str]:
    """What `hpc/` holds: file name to text. A test compares."""
    written = {}
    for name in site_names():
        written[script_name(name)] = job_script(name)
    return {**written, script_name("derecho", "slurm"): job_script("derecho", "slurm")}


def write_scripts() -> None:
    """Write `hpc/*.sh` and `hpc/*.pbs` anew after a change to the sites or the template."""
    for name, text in scripts().items():
        path = HPC / name
        path.write_text(text)
        path.chmod(0o755)


if __name__ == "__main__":
    write_scripts()
