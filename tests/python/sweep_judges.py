"""Writes judges for sweeps: small programs that read a model and write JSON, or go wrong in one way or another."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

_SCRIPT = """\
import hashlib, json, os, pathlib, signal, subprocess, sys, time

model, out, name = sys.argv[1:4]
here = pathlib.Path(__file__).parent
with open(here / "judged.txt", "a") as file:
    file.write(name + "\\n")
print("judging", name)
print("this is said on stderr", file=sys.stderr)
how = json.loads((here / "how.json").read_text()).get(name)
weights = b"".join(file.read_bytes() for file in sorted(pathlib.Path(model).glob("*.safetensors")))
assert weights, "there is a model"
digest = hashlib.sha256(weights).digest()
document = {
    "refusals": {"rate": digest[0] / 255},
    "results": {"task.one": {"exact_match,none": [digest[1], digest[2]]}},
    "weights": digest.hex(),
}
if how == "fail":
    sys.exit("the judge's last words")
if how == "signal":
    os.kill(os.getpid(), signal.SIGTERM)
if how == "hang":
    # A process of its own, which must end as well.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (here / "child.txt").write_text(str(child.pid))
    time.sleep(600)
if how == "leave":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (here / "child.txt").write_text(str(child.pid))
if how == "garbage":
    pathlib.Path(out).write_bytes(b"\\xff{not json")
    sys.exit(0)
if how == "nothing":
    sys.exit(0)
if how == "lacks":
    document["refusals"] = {}
if how == "text":
    document["refusals"]["rate"] = "many"
if how == "nan":
    document["refusals"]["rate"] = float("nan")
if how == "kill":
    (here / "how.json").write_text("{}")
    os.kill(os.getppid(), signal.SIGKILL)
if how == "interrupt":
    (here / "how.json").write_text("{}")
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)
if how in ("beside", "several"):
    folder = pathlib.Path(out).parent / "of-the-model"
    folder.mkdir()
    (folder / "results_2026.json").write_text(json.dumps(document))
    if how == "several":
        (folder / "more.json").write_text("{}")
    sys.exit(0)
pathlib.Path(out).write_text(json.dumps(document))
"""

METRICS = {"refusals": "$.refusals.rate:max", "task": "$.results['task.one']['exact_match,none'][1]:min"}


class FakeJudge:
    """A judge in a directory of its own, which notes whom it judged.

    Attributes:
        command: What a sweep is given as eval.
    """

    def __init__(self, directory: Path, **how: str) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        (directory / "judge.py").write_text(_SCRIPT)
        self.misbehave(**how)
        self.command = shlex.join([sys.executable, str(directory / "judge.py"), "{model}", "{out}", "{name}"])

    def misbehave(self, **how: str) -> None:
        """Says what is to go wrong with which model, by its name with _ for other characters than letters."""
        (self._directory / "how.json").write_text(json.dumps(how))

    @property
    def judged(self) -> list[str]:
        """Names of the models that it was run on, in order."""
        file = self._directory / "judged.txt"
        return file.read_text().split() if file.exists() else []

    @property
    def child(self) -> int:
        """The process that it left."""
        return int((self._directory / "child.txt").read_text())
