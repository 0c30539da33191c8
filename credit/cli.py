"""The command `credit`, also `python -m credit`. Verbs import what they need, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from credit import __version__
from credit.errors import ConfigError, CreditError, Stopped

EXAMPLES = """examples:
  credit train configs/era5_sample.yaml
  torchrun --nproc-per-node 4 -m credit train configs/quickstart.yaml
  torchrun --nproc-per-node 2 -m credit forecast configs/quickstart.yaml --set trainer.parallelism.data=none
  credit score configs/quickstart.yaml
  credit check my.yaml --ranks 16
  credit check parity my.yaml --ranks 4
  credit submit my.yaml --site derecho --nodes 4 --dry-run
  credit plan my.yaml --gpus 16 --gpu-memory 40
  credit data stats my.yaml
"""

PARITY_EXAMPLES = """examples:
  credit check parity configs/quickstart.yaml --ranks 3
  torchrun --nproc-per-node 2 -m credit check parity configs/quickstart.yaml

Exit code 0 if the sharded model is exact, 1 if it is not, 2 if it is refused or cannot be built.
"""


PLAN_EXAMPLES = """examples:
  credit plan configs/quickstart.yaml --gpus 8 --gpu-memory 40
  credit plan my.yaml --site frontier --nodes 16
  credit plan my.yaml --gpus 256 --gpu-memory 80 --gpus-per-node 8 --set trainer.amp=bf16
"""


CHECK_EXAMPLES = """examples:
  credit check my.yaml --ranks 16
  credit check my.yaml --json
  credit check parity my.yaml --ranks 4
"""


SUBMIT_EXAMPLES = """examples:
  credit submit my.yaml --site perlmutter --nodes 4 --account m1234
  credit submit my.yaml --site derecho --nodes 4 --container credit.sif --dry-run
  credit submit configs/quickstart.yaml --site local --ranks-per-node 4
"""


LAYOUT_EXAMPLES = """examples:
  credit layout my.yaml --nodes 4 --gpus-per-node 4
  srun -N 4 --ntasks-per-node 4 python -m credit layout my.yaml
"""


SILENT_S = 3.0
"""How long a failed rank that says nothing stays: launchers end all ranks with the first, and one has yet to speak."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0; 1 if a check fails; 2 for an error the user can mend, printed as a paragraph; 75 if a signal
        stopped it and the same command goes on.
    """
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["check"] and given[1:] and given[1] not in ("parity", "config", "-h", "--help"):
        given = ["check", "config", *given[1:]]
    arguments = _parser().parse_args(given)
    try:
        return arguments.verb(arguments) or 0
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        # All ranks know the same error by now: one says it. Without ranks this is the only process.
        from credit.launch.ranks import speaks

        if getattr(error, "speaks", None) or (not hasattr(error, "speaks") and speaks()):
            word = "stopped" if isinstance(error, Stopped) else "error"
            print(f"credit: {word}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SILENT_S)
        return getattr(error, "exit_code", 2)


def _user_errors() -> tuple[type[Exception], ...]:
    if "torch" not in sys.modules:
        return (CreditError,)
    from credit.parallel.collectives import USER_ERRORS

    return USER_ERRORS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="credit",
        description="Train weather models over a mesh of devices (dp, tp, domain), with the numbers of one device.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"credit {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    train = _verb(verbs, "train", _train, "train the model; run the same command again to resume")
    train.add_argument("--dry-run", action="store_true", help="check config, data and layout, print them, and stop")
    train.add_argument("--ranks", type=int, default=None, help="with --dry-run: lay out this many ranks")
    train.add_argument("--profile", type=int, default=0, metavar="STEPS", help="write a chrome trace of some steps")
    _verb(verbs, "forecast", _forecast, "forecast the test period with the newest checkpoint, into forecast.zarr")
    _verb(
        verbs, "score", _score, "RMSE, ACC, bias, CRPS and spectra of forecast.zarr: a table, CSV files, and pictures"
    )
    check = verbs.add_parser(
        "check",
        help="check a config without starting ranks; `check parity`: the sharded model against the plain one",
        description="credit check CONFIG: what can be checked without ranks. credit check parity CONFIG: with ranks, "
        "which are threads of this process unless a launcher has started some.",
        epilog=CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checks = check.add_subparsers(title="verbs", required=True, metavar="VERB")
    config = _verb(checks, "config", _check, "config, data, mesh, model and run directory; the word may be left out")
    config.add_argument("--ranks", type=int, default=None, help="ranks in all (default: tensor x domain)")
    config.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    parity = _verb(checks, "parity", _parity, "run the model sharded and plain, and compare outputs and gradients")
    parity.add_argument("--ranks", type=int, default=None, help="ranks in all (default: tensor x domain)")
    parity.epilog, parity.formatter_class = PARITY_EXAMPLES, argparse.RawDescriptionHelpFormatter
    planned = _verb(
        verbs, "plan", _plan, "memory and traffic of a rank on every mesh of some devices, without any device"
    )
    planned.add_argument("--site", default=None, help="a name in hpc/sites, which knows its GPUs")
    planned.add_argument("--nodes", type=int, default=1, help="of the site (default: 1)")
    planned.add_argument("--gpus", type=int, default=None, help="devices in all, without a site")
    planned.add_argument("--gpu-memory", type=float, default=None, metavar="GB", help="memory of each, in 1e9 bytes")
    planned.add_argument("--gpus-per-node", type=int, default=None, help="default: the site's, or 4")
    planned.epilog, planned.formatter_class = PLAN_EXAMPLES, argparse.RawDescriptionHelpFormatter
    export = _verb(verbs, "export", _export, "write the newest checkpoint's weights as one plain state dict")
    export.add_argument("path", type=Path, help="the file to write, for torch.load or trainer.init_from")
    _verb(
        verbs, "status", _status, "how far the run is; exit code 0 if finished, 75 if stopped by a signal, 1 otherwise"
    )
    layout = _verb(verbs, "layout", _layout, "where every rank stands on the mesh: of this job, or of a planned one")
    layout.add_argument("--nodes", type=int, default=None, help="plan for this many nodes, without starting ranks")
    layout.add_argument("--gpus-per-node", type=int, default=4, help="ranks a node of the plan (default: 4)")
    layout.epilog, layout.formatter_class = LAYOUT_EXAMPLES, argparse.RawDescriptionHelpFormatter
    submit = _verb(verbs, "submit", _submit, "hand a training job in, from a login node")
    submit.add_argument("--site", required=True, help="a name in hpc/sites, or local: ranks on this machine")
    submit.add_argument("--nodes", type=int, default=1)
    submit.add_argument("--ranks-per-node", type=int, default=None, help="default: one a GPU of the site")
    submit.add_argument("--container", type=Path, default=None, help="image in which the ranks run")
    submit.add_argument("--time", default=None, metavar="H:MM:SS", help="default: the site's longest")
    submit.add_argument("--account", default=None)
    submit.add_argument("--dry-run", action="store_true", help="print the exact script, and hand nothing in")
    submit.epilog, submit.formatter_class = SUBMIT_EXAMPLES, argparse.RawDescriptionHelpFormatter
    doctor = verbs.add_parser("doctor", help="is this machine, environment or container fit? exit code 1 if not")
    doctor.add_argument("--json", action="store_true", help="findings as JSON: severity, where, message, fix")
    doctor.set_defaults(verb=_doctor)
    data = verbs.add_parser("data", help="make data, and statistics of data")
    kinds = data.add_subparsers(title="verbs", required=True, metavar="VERB")
    _verb(kinds, "stats", _stats, "write the normalisation statistics of the training period")
    demo = kinds.add_parser("demo", help="write the demo weather, a CF zarr store")
    demo.add_argument("path", type=Path)
    demo.add_argument("--states", type=int, default=600, help="6-hourly states (default: 600)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(verb=_demo)
    return parser


def _verb(verbs: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.add_argument("config", help="a YAML config, see configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the config, as in --set trainer.epochs=2; may be given again",
    )
    parser.set_defaults(verb=function)
    return parser


def _load(arguments: argparse.Namespace) -> Any:
    from credit.config import load_config

    return load_config(arguments.config, arguments.set)


def _train(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        from credit.training.dry_run import dry_run

        print(dry_run(_load(arguments), arguments.ranks))
        return
    from credit.launch.stop import stop_requests

    _refuse_contradictions()
    with stop_requests() as request:  # from here on, however long the ranks take to come up
        from credit.launch.job import start_job
        from credit.training.train import train

        with start_job(lambda: _load(arguments)) as job:
            train(job, request, arguments.profile)


def _refuse_contradictions() -> None:
    """Before torch is imported, which takes seconds."""
    from credit.launch.ranks import choose

    choose()


def _forecast(arguments: argparse.Namespace) -> None:
    _refuse_contradictions()
    from credit.launch.job import start_job
    from credit.training.forecast import forecast

    with start_job(lambda: _load(arguments)) as job:
        forecast(job)


def _score(arguments: argparse.Namespace) -> None:
    from credit.launch.ranks import choose

    ranks = choose().size  # contradictions are refused before torch is imported
    from credit.launch.job import sole_writer, start_job
    from credit.status import claimed
    from credit.training.score import score

    if ranks == 1:
        config = _load(arguments)
        with claimed(config.run):
            _show_scores(config, score(config))
        return
    with start_job(lambda: _load(arguments)) as job, sole_writer(job):
        scores = score(job.config, job.ranks.rank, job.ranks.world_size)
        if job.is_first:
            _show_scores(job.config, scores)


def _show_scores(config: Any, scores: Any) -> None:
    print(scores.table())
    made = [config.run / "scores.csv", config.run / "spectra.csv"]
    scores.save(made[0])
    scores.save_spectra(made[1])
    try:
        from credit.plots import plot_map, plot_scores, plot_spectra
    except ModuleNotFoundError as error:
        print(f"no pictures: {error.name} is not installed (pip install 'credit-hpc[plots]')")
    else:
        made += [plot_map(config, scores), plot_scores(config, scores), plot_spectra(config, scores)]
    print(*made)


def _parity(arguments: argparse.Namespace) -> int:
    from credit.launch.ranks import choose

    if arguments.ranks is not None:
        tensor = _load(arguments).trainer.parallelism.tensor
        if arguments.ranks % tensor:
            raise ConfigError(f"--ranks {arguments.ranks} is not a multiple of trainer.parallelism.tensor: {tensor}")
        arguments.set = [*arguments.set, f"trainer.parallelism.domain={arguments.ranks // tensor}"]
    if choose().size == 1:
        from credit.training.check import check_parity

        report = check_parity(_load(arguments))
        print(report)
        return 0 if report.exact else 1
    from credit.launch.job import start_job
    from credit.training.check import check_parity_of

    with start_job(lambda: _load(arguments)) as job:
        report = check_parity_of(job)
        job.say(str(report))
    return 0 if report.exact else 1


def _plan(arguments: argparse.Namespace) -> None:
    from credit.training.plan import plan

    config = _load(arguments)
    site = None
    if arguments.site is not None:
        from credit.launch.sites import load_site

        site = load_site(arguments.site)
    per_node = arguments.gpus_per_node or (site.gpus_per_node if site else 4)
    gpus = arguments.gpus or (arguments.nodes * per_node if site else None)
    memory = arguments.gpu_memory or (site.gpu_memory if site else None)
    if gpus is None or memory is None:
        raise ConfigError("which devices? Give --gpus and --gpu-memory, or a --site that knows its GPUs' memory")
    print(plan(config, gpus, memory, per_node))


def _export(arguments: argparse.Namespace) -> None:
    from credit.launch.job import start_job
    from credit.training.export import export

    with start_job(lambda: _load(arguments)) as job:
        export(job, arguments.path)


def _status(arguments: argparse.Namespace) -> int:
    from credit.status import read_status

    line, code = read_status(_load(arguments).run)
    print(line)
    return code


def _check(arguments: argparse.Namespace) -> int:
    from credit.findings import report
    from credit.training.preflight import preflight

    text, code = report(preflight(arguments.config, arguments.set, arguments.ranks), arguments.json)
    print(text)
    return code


def _doctor(arguments: argparse.Namespace) -> int:
    from credit.findings import report
    from credit.launch.doctor import examine

    text, code = report(examine(), arguments.json)
    print(text)
    return code


def _submit(arguments: argparse.Namespace) -> None:
    from credit.launch.submission import submit

    print(
        submit(
            arguments.config,
            site=arguments.site,
            nodes=arguments.nodes,
            ranks_per_node=arguments.ranks_per_node,
            container=arguments.container,
            changes=arguments.set,
            walltime=arguments.time,
            account=arguments.account,
            dry_run=arguments.dry_run,
        )
    )


def _layout(arguments: argparse.Namespace) -> None:
    from credit.layout import Seat, mesh_shape, table

    if arguments.nodes is not None:
        parallelism = _load(arguments).trainer.parallelism
        seats = [Seat(f"node{n}", f"gpu {i}") for n in range(arguments.nodes) for i in range(arguments.gpus_per_node)]
        try:
            print(table(mesh_shape(parallelism.model_dump(), len(seats)), seats))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return
    _refuse_contradictions()
    from credit.launch.job import start_job

    with start_job(lambda: _load(arguments)) as job:
        job.say(table(job.shape, job.seats))


def _stats(arguments: argparse.Namespace) -> None:
    from credit.data.prepare import write_statistics

    statistics = write_statistics(_load(arguments))
    for name, mean in statistics.mean.items():
        change = statistics.increment_std.get(name)
        step = "" if change is None else f"  change per step {change:.6g}"
        print(f"{name}: mean {mean:.6g}  std {statistics.std[name]:.6g}{step}")


def _demo(arguments: argparse.Namespace) -> None:
    from credit.data.demo import write_demo
    from credit.data.prepare import printer

    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    write_demo(arguments.path, states=arguments.states, seed=arguments.seed, progress=printer(str(arguments.path)))
