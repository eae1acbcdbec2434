"""Thousands of random disturbances of whole runs, each followed by a resume: prints what came of them.

    python tests/soak/soak.py --minutes 10 --directory .soak
    python tests/soak/soak.py --count 5000 --seed 7

Each case takes a kind of output, an older one or none, and one disturbance: a kill at a fail point or at any moment, an
error there, a signal. Then it checks what stands under the output's name, does what the error advises, and compares the
output with one that was made without a disturbance. The first case that is not as promised ends it, with all that is
needed to repeat it; its directory is left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from forking import Done, Server
from protocol import Case, World, job_of

from safemerge_fast import _engine

POINTS = _engine.fault_points()
KINDS = ("scored", "measured", "single", "adapter", "fold", "mergekit")
ERRORS = ("enospc", "edquot", "efbig", "eio", "eacces", "eintr", "short")


@dataclass(frozen=True)
class Disturbance:
    """What happens to a run.

    Attributes:
        number: Of the case.
        kind: Of the output.
        old: Of what stands there, or None.
        flag: How that is replaced.
        points: Fail points.
        after: When it is sent a signal, as a share of a whole run, or None.
        signal: Which.
    """

    number: int
    kind: str
    old: str | None
    flag: str
    points: str
    after: float | None
    signal: int

    @property
    def sort(self) -> str:
        """What it is counted as."""
        old = "fresh" if self.old is None else f"over an older output, {self.flag}"
        if self.after is not None:
            return f"{signal.Signals(self.signal).name} at a random moment, {old}"
        action = self.points.rpartition("return(")[2].rstrip(")")
        return f"kill at a fail point, {old}" if action == "kill" else f"{action} at a fail point, {old}"


def draw(number: int, seed: int) -> Disturbance:
    """The case of this number, the same each time."""
    dice = random.Random(f"{seed} {number}")
    kind = dice.choice(KINDS)
    old = dice.choice((None, None, *KINDS))
    flag = "" if old is None else dice.choice(("--overwrite", "--overwrite", "--overwrite=in-place"))
    points, after, number_of_signal = "", None, int(signal.SIGKILL)
    what = dice.random()
    if what < 0.4:
        after = dice.uniform(0.2, 1.1)
        number_of_signal = int(dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)))
    else:
        action = "kill" if what < 0.7 else dice.choice(ERRORS)
        skipped = dice.choice((0, 0, 0, 1, 2, 4))
        points = f"{dice.choice(POINTS)}={f'{skipped}*off->' if skipped else ''}1*return({action})"
        if dice.random() < 0.15:
            points = "publish.exchange=return(einval);" + points.replace(
                "publish.exchange", "publish.move-in"
            )
    return Disturbance(number, kind, old, flag, points, after, number_of_signal)


def check(world: World, it: Disturbance, whole: dict[str, float]) -> str:
    """Carries a case out; what came of it."""
    flags = (it.flag,) if it.flag else ()
    case = world.case(it.kind, world.path / "cases" / str(it.number), *flags, old=it.old)
    options = {} if it.after is None else {"after": it.after * whole[it.kind], "signal": it.signal}
    done = case.work(*flags, points=it.points, **options)
    outcome = look(case, it, done)
    shutil.rmtree(case.output.parent)
    return outcome


def look(case: Case, it: Disturbance, done: Done) -> str:
    """Judges a run that was disturbed; what came of it."""
    if done.code == 0:
        assert done.stderr == "", done
        case.check_done()
        return "went through"
    nothing = it.flag == "--overwrite=in-place" or "publish.exchange=return(einval)" in it.points
    case.check_whole(nothing=nothing)
    stood = (
        "the old output" if case.is_old() and case.old else "the new output" if case.is_new() else "nothing"
    )
    if done.code == -signal.SIGKILL:
        return f"killed, {stood} stood there, {case.check_resumed()}"
    assert done.code == (5 if it.after is None else 130), done
    assert done.stdout == "", done
    assert done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done
    assert "unexpected" not in done.stderr, done
    word = "refused" if it.after is None else "interrupted"
    if "--resume" in done.stderr:
        again = case.work("--resume")
        assert (again.code, again.stderr) == (0, ""), f"{done.stderr!r} advised --resume, but: {again}"
        case.check_done()
        return f"{word}, {stood} stood there, resumed as advised"
    if job_of(case.output).exists():
        return f"{word}, {stood} stood there, {case.check_resumed()}"
    again = case.work(*case.flags)
    assert (again.code, again.stderr) == (0, ""), f"after {done.stderr!r}: {again}"
    case.check_done()
    return f"{word}, {stood} stood there, run anew"


def main() -> int:
    """Runs until the time is up or a case is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, help="how long to go on")
    parser.add_argument("--count", type=int, help="how many cases to run")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other cases")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to repeat one")
    parser.add_argument("--servers", type=int, default=2, help="cases at a time")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="a word of what a case is counted as (kill, fresh); repeatable",
    )
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory if not given")
    given = parser.parse_args()
    if not POINTS:
        parser.error("the engine has no fail points; make soak builds one that has")
    if given.minutes is None and given.count is None:
        parser.error("give --minutes or --count")
    if given.directory is not None:
        given.directory.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="soak-", dir=given.directory)).resolve()
    deadline = time.monotonic() + (60 * given.minutes if given.minutes is not None else float("inf"))
    counts: Counter[tuple[str, str]] = Counter()
    failed: list[str] = []
    numbers = iter(
        range(given.first, given.first + (given.count if given.count is not None else sys.maxsize))
    )

    with ExitStack() as stack:
        servers = [stack.enter_context(Server()) for _ in range(given.servers)]
        world = World(place, servers)
        whole = {kind: world.case(kind, place / "timed" / kind).work().seconds for kind in KINDS}

        def work() -> None:
            while time.monotonic() < deadline and not failed and (number := next(numbers, None)) is not None:
                it = draw(number, given.seed)
                if not all(word in it.sort.lower() for word in given.only):
                    continue
                try:
                    counts[it.sort, check(world, it, whole)] += 1
                except BaseException as error:
                    failed.append(f"case {it}: {error}")

        with ThreadPoolExecutor(given.servers) as executor:
            for future in [executor.submit(work) for _ in servers]:
                future.result()

    for sort in sorted({sort for sort, _ in counts}):
        outcomes = {outcome: count for (found, outcome), count in counts.items() if found == sort}
        print(f"{sum(outcomes.values()):6} {sort}")
        for outcome, count in sorted(outcomes.items()):
            print(f"{count:13} {outcome}")
    print(f"{sum(counts.values()):6} cases as promised, {len(failed)} not")
    for failure in failed:
        print(failure)
    if failed:
        print(f"what is left lies in {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
