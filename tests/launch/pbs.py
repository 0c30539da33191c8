"""A stand-in for PBS, of which no server can be had here: qsub, qstat and mpiexec as programs in a folder.

qsub reads options, #PBS lines, and -v as PBS Pro's manual says: commas part variables, quotes protect commas and are
taken away, a backslash protects what follows, a name alone takes its value from the environment. qstat prints a job as
PBS does, in lines of at most 79 characters that go on after a tab.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

QSUB = r'''#!{python} -I
import json, os, re, shlex, sys
from pathlib import Path

folder = Path({folder!r})


def variables(text):
    """Those of -v."""
    found, word, quote, escaped = [], "", "", False
    for one in text:
        if escaped:
            word, escaped = word + one, False
        elif one == "\\":
            escaped = True
        elif one == quote:
            quote = ""
        elif not quote and one in "\"'":
            quote = one
        elif one == "," and not quote:
            found, word = [*found, word], ""
        else:
            word += one
    if quote:
        sys.exit("qsub: unmatched quote in -v")
    pairs = [item.partition("=") for item in [*found, word] if item]
    return dict((name, value if sign else os.environ.get(name, "")) for name, sign, value in pairs)


def read(words, job):
    """Options into the job; what is left."""
    words = list(words)
    while words and words[0].startswith("-"):
        option, value = words.pop(0), words.pop(0)
        if option == "-l":
            for part in value.split(",") if not value.startswith("select=") else [value]:
                name, _, amount = part.partition("=")
                if not re.fullmatch(r"\w+", name) or not re.fullmatch(r"[\w:=+.@/-]+", amount):
                    sys.exit(f"qsub: illegal -l value {{value!r}}")
                job["l"][name] = amount
        elif option == "-v":
            job["v"].update(variables(value))
        elif option in ("-A", "-P", "-N", "-q", "-j", "-k", "-m", "-M", "-W", "-o"):
            job["options"][option] = value
        else:
            sys.exit(f"qsub: illegal option {{option}}")
    return words


asked = dict(l={{}}, v={{}}, options={{}})
files = read(sys.argv[1:], asked)
script = Path(files[0]).read_bytes().decode() if files else sys.stdin.buffer.read().decode()
job = dict(l={{}}, v={{}}, options={{}})
for line in script.splitlines():
    if line.startswith("#PBS "):
        read(shlex.split(line[5:]), job)
    elif line.strip() and not line.startswith("#"):
        break
for kind in job:
    job[kind].update(asked[kind])
number = len(list(folder.glob("*.json"))) + 1
job.update(id=f"{{number}}.server", folder=os.getcwd(), script=script, home=os.environ.get("HOME", "/"))
(folder / f"{{number}}.json").write_text(json.dumps(job))
print(job["id"])
'''

QSTAT = r"""#!{python} -I
import json, re, sys
from pathlib import Path

assert sys.argv[1] == "-f", sys.argv
job = json.loads((Path({folder!r}) / (sys.argv[2].split(".")[0] + ".json")).read_text())
options = job["options"]
names = {{"-N": "Job_Name", "-A": "Account_Name", "-j": "Join_Path", "-k": "Keep_Files", "-m": "Mail_Points"}}
lines = [f"{{names[option]}} = {{value}}" for option, value in options.items() if option in names]
lines += ["server = server", "Checkpoint = u", "project = _pbs_project_default"]
amounts = dict(job["l"], nodect="1", ncpus="64", ngpus="4", mpiprocs="4")
lines += [f"Resource_List.{{name}} = {{amount}}" for name, amount in amounts.items()]
given = {{"PBS_O_HOME": job["home"], "PBS_O_WORKDIR": job["folder"], **job["v"]}}
escaped = (name + "=" + re.sub(r"([\\,\"'])", r"\\\1", value) for name, value in given.items())
lines += ["Variable_List = " + ",".join(escaped), "etime = Sat Nov 28 03:00:00 2026"]
print("Job Id: " + job["id"])
for line in lines:
    line = "    " + line
    print(line[:79])
    for start in range(79, len(line), 70):
        print("\t" + line[start : start + 70])
print()
"""

MPIEXEC = r"""#!/bin/bash
printf '%s\0' "$@" > {folder}/argv
env -0 > {folder}/env
exit {code}
"""


class Pbs:
    """Jobs that were handed in, and what the launcher was given when they ran."""

    def __init__(self, folder: Path, code: int) -> None:
        """The launcher ends with this exit code."""
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name, text in (("qsub", QSUB), ("qstat", QSTAT)):
            self.program(name, text.format(python=sys.executable, folder=str(folder)))
        self.program("mpiexec", MPIEXEC.format(folder=shlex.quote(str(folder)), code=code))

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def jobs(self) -> list[dict]:
        found = sorted(self.folder.glob("*.json"), key=lambda path: int(path.stem))
        return [json.loads(path.read_text()) for path in found]

    def qsub(self, *words: str, cwd: Path, script: str = "", **env: str) -> dict:
        """The job that was handed in."""
        done = subprocess.run(
            [self.bin / "qsub", *words],
            input=script.encode(),
            cwd=cwd,
            env={**os.environ, **env},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return self.jobs()[-1]

    def run(self, job: dict) -> subprocess.CompletedProcess:
        """As PBS starts it: in the home, with the variables that were given, and nothing else of who gave them."""
        nodes = self.folder / "nodes"
        nodes.write_text("head\nhead\nsecond\nsecond\n")
        own = {"PBS_JOBID": job["id"], "PBS_O_WORKDIR": job["folder"], "PBS_NODEFILE": str(nodes), "TMPDIR": "/tmp"}
        if "-q" in job["options"]:
            own["PBS_O_QUEUE"] = job["options"]["-q"]
        env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": "/", **job["v"], **own}
        script = self.folder / "script"
        script.write_text(job["script"])
        return subprocess.run(["bash", script], env=env, cwd="/", text=True, capture_output=True, timeout=60)

    @property
    def argv(self) -> list[str]:
        """Of the launcher, when it ran last."""
        return (self.folder / "argv").read_bytes().decode().split("\0")[:-1]

    @property
    def env(self) -> dict[str, str]:
        items = (self.folder / "env").read_bytes().decode().split("\0")[:-1]
        return dict(item.split("=", 1) for item in items)
