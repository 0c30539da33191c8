"""What is known of an HPC site, as data (`hpc/sites/*.yaml`), and the job scripts written from it. No torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from credit.errors import ConfigError

FOLDER = Path(__file__).parent / "hpc"
"""The project's `hpc/`, which is a part of the installed package too."""
Scheduler = Literal["slurm", "pbs"]
CLOCK = """\
# By the clock: a signal to the ranks would also end the helper that mounts a container's image.
end=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)
export CREDIT_STOP_AT=$(( $(date -d "$end" +%s 2>/dev/null || echo 9999999999) - ${CREDIT_STOP_BEFORE:-120} ))"""
"""Lines of a Slurm job that say when it is to stop."""


class Site(BaseModel):
    """One file of `hpc/sites`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    source: str
    """Where the facts are from, with the date."""
    tested: str
    """Whether this ran, and where."""
    scheduler: Scheduler
    """The one that runs there."""
    gpus_per_node: Annotated[int, Field(ge=1)]
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    """Of each, in GB."""
    cores_per_node: Annotated[int, Field(ge=1)]
    """Cores that jobs may use."""
    walltime: Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d$")]
    """Longest job, hours:minutes:seconds."""
    queue: str | None = None
    queue_option: Literal["partition", "qos"] = "partition"
    """What Slurm calls the queue there."""
    constraint: str | None = None
    launch: str
    """Starts one process a rank; the command follows."""
    container: Annotated[str, Field(pattern=r"\{image\}")]
    """Runs the command that follows in a container, or, if it begins with --, an option of `launch` that does so."""
    interface: str | None = None
    """Network interface of the fabric, for NCCL a prefix."""
    setup: list[str] = []
    """Lines of the job script before the launch."""
    env: dict[str, str] = {}

    @property
    def seconds(self) -> int:
        hours, minutes, seconds = map(int, self.walltime.split(":"))
        return 3600 * hours + 60 * minutes + seconds

    @property
    def container_is_option(self) -> bool:
        return self.container.startswith("--")

    def in_container(self, image: str) -> str:
        """What stands before a command, or among the launcher's options, to run it in `image`."""
        return self.container.replace("{image}", f'"{image}"')

    @property
    def gloo_interface(self) -> str | None:
        """gloo wants the whole name of one interface."""
        name = self.interface
        return f"{name}0" if name and not name[-1].isdigit() else name


def site_names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "sites").glob("*.yaml"))


def load_site(name: str) -> Site:
    """Raises ConfigError if there is no such site, or its file is wrong."""
    path = FOLDER / "sites" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no site {name!r}; known: {', '.join(site_names())}, local")
    try:
        return Site.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None


def environment(site: Site, ranks: int) -> list[str]:
    """Lines of every job before its launch."""
    threads = max(site.cores_per_node // ranks, 1)
    lines = [f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}} PYTHONNOUSERSITE=1"]
    if site.scheduler == "slurm":
        lines += ["export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it since Slurm 22.05"]
    if site.interface:
        lines += [f"export NCCL_SOCKET_IFNAME=${{NCCL_SOCKET_IFNAME-{site.interface}}}"]
        lines += [f"export GLOO_SOCKET_IFNAME=${{GLOO_SOCKET_IFNAME-{site.gloo_interface}}}"]
    return [*lines, *(f"export {name}={shlex.quote(value)}" for name, value in site.env.items()), *site.setup]


def job_script(
    name: str,
    scheduler: Scheduler | None = None,
    nodes: int = 1,
    ranks: int | None = None,
    walltime: str | None = None,
) -> str:
    """The job script of a site.

    Args:
        scheduler: the site's own by default; derecho.sh is for Slurm though the site runs PBS.
        nodes, ranks: as many nodes, and ranks on each; one a GPU by default.
        walltime: the site's longest by default.
    """
    import jinja2

    site = load_site(name)
    if walltime is not None:
        site = site.model_copy(update={"walltime": walltime})
    each = ranks or site.gpus_per_node
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("job.sh.j2")
    # Queues, constraints and the launcher of a PBS site mean nothing to another scheduler.
    chosen = scheduler or site.scheduler
    if chosen != site.scheduler:
        site = site.model_copy(
            update={"scheduler": chosen, "queue": None, "constraint": None, "launch": "srun --wait=60"}
        )
    return template.render(
        site=site,
        name=name,
        file=f"{name}.pbs" if chosen != "slurm" and name == "derecho" else f"{name}.sh",
        scheduler=chosen,
        nodes=nodes,
        ranks=each,
        clock=CLOCK,
        environment="\n".join(environment(site, each)),
    )


def scripts() -> dict[str, str]:
    """What `hpc/` holds: file name to text. A test compares."""
    written = {}
    for name in site_names():
        written[f"{name}.sh"] = job_script(name)
    # The site runs PBS, where qsub takes derecho.pbs; its users know the name, so derecho.sh is for a Slurm.
    written["derecho.pbs"] = written["derecho.sh"]
    written["derecho.sh"] = job_script("derecho", "slurm")
    return written


def write_scripts() -> None:
    """Write `hpc/*.sh` and `hpc/*.pbs` anew after a change to the sites or the template."""
    for name, text in scripts().items():
        path = FOLDER / name
        path.write_text(text)
        path.chmod(0o755)


if __name__ == "__main__":
    write_scripts()
