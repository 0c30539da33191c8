"""The job scripts under a real bash: words arrive as they were given, and the next job is the same job.

The launchers and schedulers are stand-ins that write down what they are given. No PBS can be had here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from credit.cli import main
from credit.errors import ConfigError
from credit.launch.shell import command, directive, quote, words
from credit.launch.sites import SECRET, job_script, load_site, scripts
from credit.launch.submission import submit
from tests.launch.pbs import Pbs

HPC = Path(__file__).parents[2] / "hpc"
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
WORD = WORDS.filter(bool)
EVIL = ["$(touch evil)", "`touch evil`", "it's", 'a "b" c', "a\nb", "\\", "a,b", "${HOME}", "*", "--set", "é \t", "!x"]
QUICK = settings(max_examples=25, deadline=None)
TOLD = """#!/bin/bash
printf '%s\\0' "$@" > "$SEEN/${0##*/}"
env -0 > "$SEEN/env"
exit ${CODE:-0}
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """Programs that write down what they are given, and end with $CODE."""
    folder = tmp_path_factory.mktemp("tools")
    for name in ("srun", "scontrol", "squeue"):
        (folder / name).write_text(TOLD)
        (folder / name).chmod(0o755)
    return folder


def run_slurm(tools: Path, seen: Path, script: str | Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    own = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(seen), "SEEN": str(seen), "PATH": f"{tools}:/usr/bin:/bin"}
    return subprocess.run(["bash", script, *arguments], env={**own, **env}, cwd="/", capture_output=True, timeout=60)


def told(seen: Path, program: str) -> list[str]:
    return (seen / program).read_bytes().decode().split("\0")[:-1]


@QUICK
@given(WORDS)
@example("".join(EVIL))
def test_a_quoted_word_is_one_word_of_bash(word: str) -> None:
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {quote(word)}"], capture_output=True, check=True)
    assert done.stdout.decode() == word + "\0"


def test_a_command_keeps_its_words_and_is_filled_in() -> None:
    line = "run --bind '/a b' --image={image} {other}"
    assert words(line, image="x y") == ["run", "--bind", "/a b", "--image=x y", "{other}"]
    assert command(line, image='"$IMAGE"') == "run --bind '/a b' --image=\"$IMAGE\" '{other}'"


@pytest.mark.parametrize("word", ["a b", "a\nb", "it's", 'a"', "a\\b", "$(x)", "", "a;b", "a#b"])
def test_what_a_header_line_cannot_carry_is_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=r"the queue is .* which no #SBATCH or #PBS line can carry"):
        directive(word, "the queue")


@QUICK
@given(WORD, st.lists(WORDS, max_size=4), WORD)
@example("$(touch evil)", EVIL, "$(touch evil).sif")
@pytest.mark.parametrize("site", ["generic_slurm", "alps"])
def test_arguments_of_sbatch_arrive_at_the_launcher(site, tools, config, options, image) -> None:
    with tempfile.TemporaryDirectory() as name:
        done = run_slurm(tools, Path(name), HPC / f"{site}.sh", config, *options, CREDIT_IMAGE=image)
        assert done.returncode == 0, done.stderr
        before = shlex.split(load_site(site).launch)[1:] + words(load_site(site).container, image=image)
        assert told(Path(name), "srun") == [*before, "python", "-m", "credit", "train", config, *options]
        assert not list(Path(name).glob("*evil*"))


@QUICK
@given(WORD, WORDS, WORDS, st.lists(WORD, min_size=1, max_size=3))
@example("$(touch evil)", "`touch evil`", "$(touch evil)", EVIL)
def test_values_of_a_site_arrive_as_they_are(tools, interface, value, image, launch) -> None:
    """Of a user's own site file: its words, not what they would be to a shell."""
    with tempfile.TemporaryDirectory() as name:
        site = yaml.safe_load((HPC / "sites/generic_slurm.yaml").read_text())
        asked = [word for word in launch if word.isprintable()]
        site |= {"interface": interface, "env": {"SOME_VALUE": value}, "launch": shlex.join(["srun", *asked])}
        path = Path(name, "own.yaml")
        path.write_text(yaml.safe_dump(site))
        Path(name, "own.sh").write_text(job_script(str(path)), newline="")
        done = run_slurm(tools, Path(name), Path(name, "own.sh"), "c.yaml", CREDIT_IMAGE=image)
        assert done.returncode == 0, done.stderr
        assert told(Path(name), "srun")[: len(asked)] == asked
        env = dict(item.split("=", 1) for item in told(Path(name), "env"))
        assert env["SOME_VALUE"] == value
        assert env["NCCL_SOCKET_IFNAME"] == interface
        assert env["PYTHONSAFEPATH"] == env["PYTHONNOUSERSITE"] == "1"
        assert not list(Path(name).glob("*evil*"))


def test_every_job_draws_a_secret_that_only_its_ranks_see(tools, tmp_path) -> None:
    """Not the words of the launcher, not the log; and one that is given is kept."""
    secrets = []
    for env in ({}, {}, {"CREDIT_SECRET": ""}, {"CREDIT_SECRET": "0123456789abcdef of mine"}):
        done = run_slurm(tools, tmp_path, HPC / "derecho.sh", "c.yaml", **env)
        assert done.returncode == 0, done.stderr
        secrets.append(dict(item.split("=", 1) for item in told(tmp_path, "env"))["CREDIT_SECRET"])
        assert not any(secrets[-1] in word for word in told(tmp_path, "srun"))
        assert secrets[-1].encode() not in done.stdout + done.stderr
    assert len({*secrets}) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in secrets[:3])
    assert secrets[3] == "0123456789abcdef of mine"


@pytest.mark.parametrize("site", ["generic_slurm", "perlmutter"])
def test_every_submitted_job_draws_a_secret(site) -> None:
    text = submit("configs/quickstart.yaml", site=site, dry_run=True)
    assert SECRET in str(text)
    assert str(text).index(SECRET) < str(text).index("\nsrun ")


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (2, False), (1, False), (0, False), (137, False)])
def test_the_exit_code_of_this_run_decides_whether_slurm_gets_it_back(tools, tmp_path, code, requeued) -> None:
    """Whatever a status file says that an earlier run has left. The code is passed on."""
    done = run_slurm(tools, tmp_path, HPC / "derecho.sh", "c.yaml", CODE=str(code))
    assert done.returncode == code
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert told(tmp_path, "scontrol") == ["requeue", "7"]


def test_a_task_of_an_array_asks_for_itself_alone(tools, tmp_path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # the last task has the number of the whole array
    run_slurm(tools, tmp_path, HPC / "generic_slurm.sh", "c.yaml", CODE="75", **array)
    assert told(tmp_path, "scontrol") == ["requeue", "7_3"]
    assert "7_3" in told(tmp_path, "squeue")


@pytest.mark.parametrize("name", scripts())
def test_a_directory_that_is_gone_ends_the_job(tools, tmp_path, name: str) -> None:
    gone = {"SLURM_SUBMIT_DIR": str(tmp_path / "gone"), "PBS_O_WORKDIR": str(tmp_path / "gone"), "CONFIG": "c.yaml"}
    done = run_slurm(tools, tmp_path, HPC / name, "c.yaml", **gone)
    assert done.returncode != 0
    assert not (tmp_path / "srun").exists()


EXTRA = {
    "CREDIT_VENV": "/a venv",
    "NCCL_DEBUG": "a,b\\\"c'",
    "CREDIT_STOP_BEFORE": "300",
    "UNRELATED": "$(touch evil)\nx",
}
RESOURCES = {"select": "3:ncpus=64:ngpus=4:mpiprocs=4", "walltime": "01:30:00", "filesystems": "home"}
ASKED = ["-A", "proj", *(word for name, value in RESOURCES.items() for word in ("-l", f"{name}={value}"))]


def by_hand(pbs: Pbs, folder: Path) -> dict:
    """`qsub -v ... derecho.pbs`, with the options in quotes."""
    options = "--set 'run=a b,c' --set \"x=it's\" --set y=\\\\"
    env = {"OPTIONS": options, **EXTRA}
    (folder / "job.pbs").write_text((HPC / "derecho.pbs").read_text())
    return pbs.qsub(*ASKED, "-v", ",".join(["CONFIG='my, conf.yaml'", *env]), "job.pbs", cwd=folder, **env)


def test_the_next_pbs_job_is_the_same_job(tmp_path) -> None:
    """Account, resources, variables, and options, three jobs long, after the script and the checkout are gone."""
    pbs, folder = Pbs(tmp_path / "pbs", code=75), tmp_path / "a 'dir'"
    folder.mkdir()
    first, secrets = by_hand(pbs, folder), []
    (folder / "job.pbs").unlink()
    for number in range(3):
        job = pbs.jobs()[-1]
        assert len(pbs.jobs()) == number + 1
        done = pbs.run(job)
        assert done.returncode == 75, done.stderr
        assert job["folder"] == str(folder)
        assert job["l"] == RESOURCES
        same = {"-A": "proj", "-q": "main", "-N": "credit", "-j": "oe", "-k": "oed"}
        assert {name: job["options"].get(name) for name in same} == same
        start = ["-n", "4", "--ppn", "4", "--cpu-bind", "none", "/a venv/bin/python", "-m", "credit", "train"]
        assert pbs.argv == [*start, "my, conf.yaml", "--set", "run=a b,c", "--set", "x=it's", "--set", "y=\\"]
        assert {name: pbs.env[name] for name in EXTRA} == EXTRA
        assert pbs.env["CREDIT_FIRST_HOST"] == "head"
        secrets.append(pbs.env["CREDIT_SECRET"])
        assert not any(secrets[-1] in json.dumps(one) for one in pbs.jobs())  # a script of the next job, too
        late = float(pbs.env["CREDIT_STOP_AT"]) - (pbs.folder / "argv").stat().st_mtime - (5400 - 300)
        assert -600 < late <= 1
        assert ("-W" in job["options"]) == (number > 0)
    assert len({*secrets}) == 3
    assert first["options"].items() <= job["options"].items()
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_a_pbs_job_that_failed_hands_in_no_next_one(tmp_path, code) -> None:
    pbs = Pbs(tmp_path / "pbs", code=code)
    assert pbs.run(by_hand(pbs, tmp_path)).returncode == code
    assert len(pbs.jobs()) == 1


def test_options_with_an_open_quote_are_refused(tmp_path) -> None:
    pbs = Pbs(tmp_path / "pbs", code=0)
    job = pbs.qsub("-v", "CONFIG=c,OPTIONS", str(HPC / "generic_pbs.sh"), cwd=tmp_path, OPTIONS="--set 'a")
    done = pbs.run(job)
    assert done.returncode == 2
    assert "OPTIONS cannot be split into words: --set 'a" in done.stderr


def test_without_qstat_the_job_runs_and_says_that_none_follows(tmp_path) -> None:
    pbs = Pbs(tmp_path / "pbs", code=75)
    job = by_hand(pbs, tmp_path)
    pbs.program("qstat", "#!/bin/sh\nexit 1\n")
    done = pbs.run(job)
    assert done.returncode == 75
    assert "qstat says nothing of this job: it stops after 12:00:00, and submits no next one" in done.stderr
    assert len(pbs.jobs()) == 1


@QUICK
@given(WORD, st.lists(WORDS, max_size=3), WORD)
@example("$(touch evil)", EVIL, "'$(touch evil)'.sif")
def test_words_of_a_submitted_pbs_job_arrive_and_are_handed_on(config, options, image) -> None:
    with tempfile.TemporaryDirectory() as name:
        pbs = Pbs(Path(name, "pbs"), code=75)
        text = job_script("derecho", ranks=2, given={"CONFIG": config, "CREDIT_IMAGE": image}, options=options)
        pbs.qsub("-A", "p", cwd=Path(name), script=text)
        for _ in range(2):
            done = pbs.run(pbs.jobs()[-1])
            assert done.returncode == 75, done.stderr
            begin = [
                "-n",
                "4",
                "--ppn",
                "2",
                "--cpu-bind",
                "none",
                "apptainer",
                "exec",
                "--nv",
                "--bind",
                "/glade",
                image,
            ]
            assert pbs.argv == [*begin, "python", "-m", "credit", "train", config, *options]
        assert not list(Path(name).rglob("*evil*"))


def test_credit_submit_under_pbs(tmp_path, monkeypatch, capsys) -> None:
    pbs = Pbs(tmp_path / "pbs", code=75)
    monkeypatch.setenv("PATH", str(pbs.bin), prepend=os.pathsep)
    monkeypatch.setenv("CREDIT_START_TIMEOUT", "17")
    monkeypatch.setenv("CREDIT_SECRET", "0123456789abcdef of the login node")
    run = f'run={tmp_path}/it\'s a, "run"'
    words = ["--site", "derecho", "--nodes", "2", "--account", "a b", "--time", "0:30:00", "--container", "$(x) y.sif"]
    assert main(["submit", "configs/quickstart.yaml", *words, "--set", run]) == 0
    assert "job 1.server" in capsys.readouterr().out
    (job,) = pbs.jobs()
    assert "of the login node" not in json.dumps(job)
    assert job["options"]["-A"] == "a b"
    assert job["l"] == {"select": "2:ncpus=64:ngpus=4:mpiprocs=4", "walltime": "0:30:00"}
    assert pbs.run(job).returncode == 75
    assert pbs.run(pbs.jobs()[-1]).returncode == 75
    assert pbs.env["CREDIT_START_TIMEOUT"] == "17"
    assert pbs.argv[-5:] == ["credit", "train", str(Path("configs/quickstart.yaml").absolute()), "--set", run]
    assert "$(x) y.sif" in pbs.argv


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"account": "a\nb"}, "account is 'a.nb', and '.n' cannot stand in an #SBATCH line"),
        ({"options": {"comment": "a\\b"}}, "comment is .* and .* cannot stand in an #SBATCH line"),
        ({"changes": [r'run="a\nb"']}, "run is .* and .* cannot stand in an #SBATCH line"),
        ({"changes": [r"run='a\b'"]}, "run is .* and .* cannot stand in an #SBATCH line"),
        ({"changes": ["run=a%jb"]}, "run is .* and '%' cannot stand in an #SBATCH line"),
        ({"changes": ["run=r"], "container": "a\0b"}, "holds a NUL character"),
    ],
)
def test_what_slurm_would_read_as_something_else_is_not_handed_in(more, message) -> None:
    with pytest.raises(ConfigError, match=message):
        submit("configs/quickstart.yaml", site="generic_slurm", **more, dry_run=True)


def test_a_queue_that_no_line_can_carry_is_refused(tmp_path) -> None:
    site = yaml.safe_load((HPC / "sites/generic_pbs.yaml").read_text())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**site, "queue": "a\n#PBS -l x"}))
    with pytest.raises(ConfigError, match=r"own.yaml's queue or constraint is 'a.n#PBS -l x', which no"):
        job_script(str(tmp_path / "own.yaml"))
