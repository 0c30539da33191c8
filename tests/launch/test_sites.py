"""Sites as data, the scripts written from them, and jobs that are only shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from credit.cli import main
from credit.errors import ConfigError, LaunchError
from credit.launch.sites import load_site, scripts, site_names
from credit.launch.submission import submit

HPC = Path(__file__).parents[2] / "hpc"


@pytest.mark.parametrize("name", scripts())
def test_scripts_are_those_that_the_sites_give(name: str) -> None:
    """After a change to a site or the template: python -m credit.launch.sites."""
    assert (HPC / name).read_text() == scripts()[name]
    subprocess.run(["bash", "-n", HPC / name], check=True)


def test_every_file_is_of_a_site() -> None:
    assert {path.name for path in HPC.iterdir()} == {*scripts(), "job.sh.j2", "sites"}


@pytest.mark.parametrize("name", site_names())
def test_sites_say_where_their_facts_are_from(name: str) -> None:
    site = load_site(name)
    assert site.source.startswith("http")
    assert site.tested
    assert site.gpus_per_node <= site.cores_per_node


def test_no_script_for_slurm_holds_a_line_for_pbs() -> None:
    """sbatch would take #PBS lines for its own, before #SBATCH ones."""
    for name, text in scripts().items():
        assert ("#PBS -" in text) != ("#SBATCH --" in text), name


def test_a_dry_run_shows_the_script_and_imports_no_torch() -> None:
    code = (
        "import sys; from credit.cli import main; main(['submit', 'configs/quickstart.yaml', '--site', 'perlmutter', "
        "'--account', 'm1', '--container', 'c.sif', '--nodes', '2', '--time', '0:30:00', '--dry-run']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HPC.parent)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --account=m1",
        "#SBATCH --time=30",
        "#SBATCH --signal=B:CONT@60",
        "CREDIT_STOP_AT",
    ):
        assert line in done.stdout
    assert "--cpu-bind=cores shifter '--module=gpu,nccl-plugin' --image=c.sif python -u -m submitit" in done.stdout


def test_a_container_engine_is_an_option_of_srun() -> None:
    text = submit("configs/quickstart.yaml", site="alps", container="credit.toml", dry_run=True)
    assert isinstance(text, str)
    assert "--wait=60 --kill-on-bad-exit=0 --environment=credit.toml python -u -m submitit.core._submit" in text
    assert '[ $? != 75 ] || scontrol requeue "$job"\' EXIT' in text
    assert 'srun --wait=60 --kill-on-bad-exit=0 "${container[@]}" "${credit[@]}" train' in (HPC / "alps.sh").read_text()


def test_pbs_is_shown_with_its_command() -> None:
    text = submit("configs/quickstart.yaml", site="derecho", nodes=3, account="p", changes=["run=r"], dry_run=True)
    assert isinstance(text, str)
    assert text.startswith("# qsub -A p <<'EOF'")
    assert "#PBS -l select=3:ncpus=64:ngpus=4:mpiprocs=4" in text
    assert "job --set run=r\n" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"site": "derehco"}, "there is no site 'derehco'; known: alps, derecho, frontier"),
        ({"site": "derecho", "ranks_per_node": 3}, "3 ranks do not divide into replicas"),
        ({"site": "derecho", "nodes": -1}, "nodes: is -1, and must be a whole number from 1"),
        ({"site": "derecho", "nodes": True}, "nodes: is True, and must be a whole number from 1"),
        ({"site": "derecho", "walltime": "12:99:00"}, "the time of the job is wrong: walltime: "),
    ],
)
def test_what_cannot_run_is_not_handed_in(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        submit("configs/quickstart.yaml", **given)


def test_without_slurm_a_job_is_shown_but_not_handed_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    given = {"site": "generic_slurm", "changes": [f"run={tmp_path}"]}
    assert "#SBATCH --nodes=1" in str(submit("configs/quickstart.yaml", **given, dry_run=True))
    with pytest.raises(LaunchError, match=r"the scheduler did not take the job: .* No such file .* 'sbatch'"):
        submit("configs/quickstart.yaml", **given)


def test_the_doctor_finds_this_place_fit(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"versions", "launcher", "mpi", "network", "devices", "processors", "caches", "leaks", "package"} <= {
        one["where"] for one in found
    }


def test_the_doctor_names_what_is_wrong(tmp_path, capsys, monkeypatch) -> None:
    """A fabric that is not here, a cache that cannot be written, another package of the same name."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "hsn0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    other = tmp_path / "miles_credit-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: miles-credit\nVersion: 1.0\n")
    (other / "top_level.txt").write_text("credit\n")
    (other / "RECORD").write_text("credit/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "error    network: GLOO_SOCKET_IFNAME names hsn0, which is not here" in said
    assert "error    package: miles-credit also provides `import credit`. pip uninstall miles-credit" in said
    assert "warning  leaks: PYTHONPATH=" in said
    assert "error    caches: cannot be written: XDG_CACHE_HOME /proc/cache" in said


def test_a_check_finds_what_would_stop_a_job(tmp_path, capsys) -> None:
    good = ["configs/era5_sample.yaml", "--set", f"run={tmp_path}/run"]
    assert main(["check", *good]) == 0
    assert "ok       model: unet" in capsys.readouterr().out
    bad = ["--set", "trainer.batch_size=3", "--set", "trainer.parallelism.data=ddp", "--ranks", "4", "--json"]
    assert main(["check", *good, *bad]) == 1
    errors = {one["where"]: one for one in json.loads(capsys.readouterr().out) if one["severity"] == "error"}
    assert errors["trainer.batch_size"]["fix"] == "a multiple of 2"
    assert main(["check", *good, "--set", "trainer.epoch=1", "--set", "trainer.batch_size=x", "--json"]) == 1
    where = {one["where"] for one in json.loads(capsys.readouterr().out)}
    assert where == {"trainer.epoch", "trainer.batch_size"}
