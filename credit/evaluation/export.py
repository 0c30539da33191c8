"""What `credit export` does: a run's weights as one file that needs nothing of this package to be read."""

from __future__ import annotations

from pathlib import Path

from credit.data.dataset import Fields
from credit.evaluation.forecast import load_weights
from credit.launch.job import Job
from credit.parallel.collectives import together
from credit.parallel.weights import export_plain
from credit.training.facts import run_facts
from credit.training.setup import open_store, prepare_model


def export(job: Job, path: Path) -> None:
    """Write the newest good checkpoint's weights (averaged ones if there are) under the plain model's names.

    On any mesh, one process included; the mesh need not be that of the run.
    """
    store, statistics = open_store(job)
    with together("opening the data"):
        fields = Fields(job.config, store, statistics, job.rows(store.grid.shape[0]))
    model = prepare_model(job, fields)
    facts = run_facts(job.config, statistics, store.grid)
    newest = load_weights(job, model, facts)
    prefix = "model." if job.config.constraints else ""
    export_plain(model, path, prefix, facts)
    job.say(f"{newest} -> {path}")
