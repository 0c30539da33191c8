"""credit score: forecasts against the truth."""

from __future__ import annotations

import argparse
from typing import Any

from credit.commands.verb import add_verb, load
from credit.terminal import print_table

EXAMPLES = """examples:
  credit score configs/quickstart.yaml
  torchrun --nproc-per-node 4 -m credit score my.yaml
"""


def add(verbs: Any) -> None:
    summary = "compare forecasts with the truth: RMSE, ACC, bias, CRPS and spectra, as a table, CSV files and pictures"
    add_verb(verbs, "score", run, summary, EXAMPLES)


def run(arguments: argparse.Namespace) -> None:
    from credit.launch.ranks import choose

    ranks = choose().size  # contradictions are refused before torch is imported
    from credit.evaluation.score import score
    from credit.launch.job import sole_writer, start_job
    from credit.status import claimed

    if ranks == 1:
        config = load(arguments)
        with claimed(config.run):
            show(config, score(config))
        return
    with start_job(lambda: load(arguments)) as job, sole_writer(job):
        scores = score(job.config, job.ranks.rank, job.ranks.world_size)
        if job.is_first:
            show(job.config, scores)


def show(config: Any, scores: Any) -> None:
    print_table(scores.table(), *scores.cells())
    made = [config.run / "scores.csv"]
    scores.save(made[0])
    has_waves = not config.data.is_region
    if has_waves:
        made.append(config.run / "spectra.csv")
        scores.save_spectra(made[1])
    try:
        from credit.evaluation.plots import plot_map, plot_scores, plot_spectra
    except ModuleNotFoundError as error:
        print(f"no pictures: {error.name} is not installed (pip install 'credit-hpc[plots]')")
    else:
        made += [plot_map(config, scores), plot_scores(config, scores)]
        made += [plot_spectra(config, scores)] if has_waves else []
    print(*made)
