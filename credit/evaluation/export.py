"""What `credit export` does: a run's weights as one file that any program reads, or a directory with all it takes."""

from __future__ import annotations

from pathlib import Path

from credit.data.dataset import Fields
from credit.data.prepare import open_fields
from credit.errors import CreditError
from credit.evaluation.forecast import load_weights
from credit.evaluation.package import write_forcings, write_package
from credit.launch.job import Job
from credit.parallel.collectives import together
from credit.parallel.weights import WEIGHTS, export_plain
from credit.training.facts import run_facts
from credit.training.setup import open_store, prepare_model


def export(job: Job, path: Path) -> dict[str, str]:
    """Write the newest good checkpoint's weights (averaged ones if there are) under the plain model's names.

    On any mesh, one process included; the mesh need not be that of the run.

    Args:
        path: of a file, *.safetensors or *.pt; or of a directory, for all of `credit.evaluation.package` but the
            certificate.

    Returns:
        Digests of what it was made from, for a certificate.

    Raises:
        CreditError: on every rank, if the directory is there already.
    """
    alone = bool(path.suffix)
    with together("writing a model"):
        if not alone and job.is_first and path.exists():
            raise CreditError("is there already", str(path), "remove it, or choose another directory")
    store, statistics = open_store(job)
    with together("opening the data"):
        fields = Fields(job.config, store, statistics, job.rows(store.grid.shape[0]))
    model = prepare_model(job, fields)
    facts = run_facts(job.config, statistics, store.grid)
    newest = load_weights(job, model, facts)
    prefix = "model." if job.config.constraints else ""
    with together("writing a model"):
        if not alone and job.is_first:  # not before: an export without a checkpoint leaves nothing behind
            path.mkdir(parents=True)
    export_plain(model, path if alone else path / WEIGHTS, prefix, facts)
    with together("writing a model"):
        if not alone and job.is_first:
            globe = Fields(job.config, open_fields(job.config), statistics, range(store.grid.shape[0]))
            write_package(path, globe, statistics.units)
            write_forcings(path, statistics.forcings.on(store.grid))
    job.say(f"{newest} -> {path}")
    return {"config": job.config.digest, "statistics": statistics.digest, "checkpoint": newest.name}
