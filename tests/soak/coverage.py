"""How often the intervals of ρ miss, for every look of the schedule, down to the probabilities that whole models need.

    python tests/soak/coverage.py spectra            what the half width is calibrated on: eigenvalues alone
    python tests/soak/coverage.py modules            whole modules: V, Δ, test columns, controls, logarithms
    python tests/soak/coverage.py spectra --look 0   one look only
    python tests/soak/coverage.py modules --columns 48 16 --only lora

A miss at 1e-10 is never seen by chance, so columns are drawn from a mixture of normal laws that provoke misses (the
top directions too small, everything a little too large, …), and each counts by how likely the true law makes it.
Printed is the frequency of misses to one side in units of the nominal one: 1 or less is honest. "seen" is how many
draws missed: where that is 0, no proposal has reached a miss, which does not say that there is none.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

import sketches
from sketches import Floats

from safemerge_fast.analysis.interval import Form, estimate_rho, scatter
from safemerge_fast.analysis.quantiles import chi_square_low, student_high
from safemerge_fast.analysis.schedule import LOOKS

FAILURES = (1e-3, 1e-6, 1e-10)
BATCH = 64

Source = Callable[[Floats], tuple[Floats, list[Floats]]]
"""Of columns (N, n, k): what log ρ is off by, truth less estimate (NaN: no interval), and half widths for FAILURES."""


@dataclass(frozen=True)
class Mixture:
    """Normal columns of several laws: in one of the bases, a variance for each direction.

    Attributes:
        bases: (B, n, n).
        variances: (B, J, n): J laws in each basis.
    """

    bases: Floats
    variances: Floats

    def draw(
        self, rng: np.random.Generator, columns: int, law: tuple[int, int], count: int
    ) -> tuple[Floats, Floats]:
        """So many draws (count, n, columns) of one law, and their weights in the whole."""
        basis, variances = self.bases[law[0]], self.variances[law]
        w = basis @ (rng.standard_normal((count, len(variances), columns)) * np.sqrt(variances)[:, None])
        ratios = []
        for turned, each in zip(self.bases, self.variances, strict=True):
            lengths = np.square(turned.T @ w).sum(axis=2)
            ratios.append(-0.5 * columns * np.log(each).sum(axis=1) - 0.5 * lengths @ (1.0 / each - 1.0).T)
        every = np.concatenate(ratios, axis=1)
        top = every.max(axis=1)
        return w, every.shape[1] * np.exp(-top) / np.exp(every - top[:, None]).sum(axis=1)

    def laws(self) -> list[tuple[int, int]]:
        return [(basis, law) for basis in range(len(self.bases)) for law in range(self.variances.shape[1])]


def tilted(eigenvalues: Floats, shift: float) -> Floats:
    """The variances 1/(1 - 2θλ) that move Σ λ·variance by so much: how large deviations come about, after Cramér."""
    moved = math.copysign(1.0, shift) * eigenvalues
    low, high = 0.0, 0.999 / (2.0 * moved.max()) if moved.max() > 0.0 else 1e4 / np.abs(moved).max()
    for _ in range(60):
        middle = 0.5 * (low + high)
        if np.sum(moved * (1.0 / (1.0 - 2.0 * middle * moved) - 1.0)) < abs(shift):
            low = middle
        else:
            high = middle
    return 1.0 / (1.0 - 2.0 * low * moved)


def provoking(eigenvalues: Floats, columns: int) -> Floats:
    """Variances that may make the interval of a form of these eigenvalues miss with one of the FAILURES."""
    order = np.argsort(-np.abs(eigenvalues))
    parts = [np.ones(len(eigenvalues))]
    for failure in FAILURES:
        student = student_high(columns * columns / 2.0, failure) * math.sqrt(2.0 / columns)
        for group in (1, 2, 4):
            top = order[:group]
            rest = eigenvalues.copy()
            rest[top] = 0.0
            small = chi_square_low(columns * group, failure) / (columns * group)
            others = [np.ones(len(eigenvalues))]
            if group <= 2 and rest.any():
                size = student * np.linalg.norm(rest)
                others += [
                    tilted(rest, -math.copysign(share * size, eigenvalues[order[0]])) for share in (0.3, 0.6)
                ]
            for factor in (0.8, 1.0, 1.3, 1.7):
                for other in others:
                    part = other.copy()
                    part[top] = min(small * factor, 1.0)
                    parts.append(part)
        size = student * np.linalg.norm(eigenvalues)
        parts += [
            tilted(eigenvalues, sign * share * size) for sign in (1, -1) for share in (0.6, 1.0, 1.5, 2.2)
        ]
    return np.array(parts)


@dataclass(frozen=True)
class Found:
    """Misses of one source: (2 sides, FAILURES) each, in units of the nominal frequency."""

    rate: Floats
    error: Floats
    seen: Floats


def misses(source: Source, law: Mixture, columns: int, draws: int, rng: np.random.Generator) -> Found:
    """Counts them, with so many draws from each part of the mixture."""
    sums, squares, seen = (np.zeros((2, len(FAILURES))) for _ in range(3))
    laws = law.laws()
    for one in laws:
        for start in range(0, draws, BATCH):
            w, weights = law.draw(rng, columns, one, min(BATCH, draws - start))
            off, widths = source(w)
            for place, width in enumerate(widths):
                for side, missed in enumerate((off > width, -off > width)):
                    sums[side, place] += weights[missed].sum()
                    squares[side, place] += np.square(weights[missed]).sum()
                    seen[side, place] += missed.sum()
    count = draws * len(laws)
    nominal = count * np.array(FAILURES)
    return Found(sums / nominal, np.sqrt(squares) / nominal, seen)


def spectra(rng: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    """Eigenvalues of M: few and many, of one sign and both, one among many; and some that nothing was calibrated on."""
    flat = np.ones(64) / 8.0
    turns = (-1.0) ** np.arange(64)
    ranks = np.arange(1.0, 65.0)
    for name, values in {
        "1": [1],
        "1, 1": [1, 1],
        "1, -1": [1, -1],
        "1, ½": [1, 0.5],
        "1, -½": [1, -0.5],
    }.items():
        yield name, np.array(values, dtype=np.float64)
    for count in (4, 8, 16, 64):
        yield f"{count} × 1", np.ones(count)
    for power in (0.5, 1.0, 2.0):
        yield f"1/i^{power}", ranks**-power
        yield f"±1/i^{power}", ranks**-power * turns
    for size in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0):
        yield f"1 and 64 of size {size}", np.append(1.0, flat * size)
        yield f"-1 and 64 of size {size}", np.append(-1.0, flat * size)
        yield f"1 and ±64 of size {size}", np.append(1.0, flat * size * turns)
    for size in (0.25, 0.5, 1.0, 2.0):
        yield f"1, 1 and 64 of size {size}", np.append([1.0, 1.0], flat * size)
        yield f"1 and 8 of size {size}", np.append(1.0, np.ones(8) * size / math.sqrt(8.0))
    for number in range(14):
        count = int(rng.integers(1, 65))
        values = ranks[:count] ** -rng.uniform(0.0, 2.5) * np.exp(
            rng.normal(size=count) * rng.uniform(0.0, 1.0)
        )
        if rng.random() < 0.5:
            values *= rng.choice([-1.0, 1.0], count, p=[0.3, 0.7])
        yield f"held out {number}", values


def of_spectrum(eigenvalues: Floats) -> Source:
    """The form alone, as if three controls had been taken out."""

    def source(w: Floats) -> tuple[Floats, list[Floats]]:
        form = Form.of(w.swapaxes(1, 2) @ (eigenvalues[:, None] * w), eigenvalues.sum())
        found = scatter(form.entries, 3)
        return -form.mean, [found.deviation(failure) for failure in FAILURES]

    return source


def of_module(v: Floats, delta: Floats, g: Floats) -> Source:
    """A whole module."""
    truth = math.log(sketches.dense(v, delta).rho)

    def source(w: Floats) -> tuple[Floats, list[Floats]]:
        parts = [sketches.moments_of(v, delta, one, g) for one in w]
        estimate = estimate_rho(sketches.stacked(parts))
        return truth - estimate.log_rho, [estimate.half_width(failure) for failure in FAILURES]

    return source


def linearised(v: Floats, delta: Floats, g: Floats) -> list[tuple[Floats, Floats]]:
    """Eigenvalues and eigenvectors of M = A'/a - ½B'/b after the best use of the controls, and of A before it."""
    v, delta = v / np.linalg.norm(v), delta / np.linalg.norm(delta)
    moved = v @ (v.T @ delta)
    a, b = delta.T @ moved, moved.T @ moved
    m = a / np.trace(a) - 0.5 * b / np.trace(b)
    p = v @ g
    p /= np.linalg.norm(p, axis=0)
    kp = v @ (v.T @ p)
    values, vectors = np.linalg.eigh(p.T @ kp)
    kept = values > 1e-5 * values[-1]
    e = kp @ (vectors[:, kept] / np.sqrt(values[kept]))
    image = delta.T @ e
    controls = [delta.T @ delta, image @ image.T, image @ (e.T @ e) @ image.T]
    design = np.stack([control.ravel() / np.linalg.norm(control) for control in controls], axis=1)
    weights = np.linalg.lstsq(design, m.ravel(), rcond=1e-12)[0]
    return [np.linalg.eigh(m - (design @ weights).reshape(m.shape)), np.linalg.eigh(a / np.trace(a))]


def run(what: str, columns: int, tests: int, draws: int, seed: int, only: str) -> None:
    rng = np.random.default_rng([seed, columns])
    sources: Iterator[tuple[str, Callable[[], tuple[Source, Mixture]]]]
    if what == "spectra":
        sources = (
            (n, lambda e=e: (of_spectrum(e), alone(e, columns))) for n, e in spectra(np.random.default_rng(5))
        )
    else:
        # Small, for that is harder than large, but well above the test columns, which otherwise say all of V.
        shape = (max(128, 2 * tests + 32), max(192, 2 * tests))
        sources = ((n, lambda n=n: prepared(n, shape, columns, tests)) for n in sketches.KINDS)
    worst = np.zeros((2, len(FAILURES)))
    print(f"# {what}, {columns} + {tests} columns, {draws} draws a part; failures {FAILURES}")
    for name, prepare in sources:
        if not re.search(only, name):
            continue
        start = time.monotonic()
        source, law = prepare()
        found = misses(source, law, columns, draws, rng)
        cells = []
        for place in range(len(FAILURES)):
            side = int(np.argmax(found.rate[:, place]))
            rate, error, seen = (one[side, place] for one in (found.rate, found.error, found.seen))
            cells.append(f"{rate:.2g} ± {error:.1g} ({seen:.0f} seen)")
        worst = np.maximum(worst, found.rate)
        print(
            f"{name:28s}",
            " | ".join(f"{cell:28s}" for cell in cells),
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    print("worst:", np.array2string(worst.max(axis=0), precision=2), flush=True)


def alone(eigenvalues: Floats, columns: int) -> Mixture:
    """What provokes the misses of a form that is diagonal."""
    return Mixture(np.eye(len(eigenvalues))[None], provoking(eigenvalues, columns)[None])


def prepared(kind: str, shape: tuple[int, int], columns: int, tests: int) -> tuple[Source, Mixture]:
    """A module of a kind, and what provokes its misses."""
    v, delta = sketches.pair(kind, *shape, seed=1)
    g = np.random.default_rng(2).standard_normal((shape[1], tests))
    forms = linearised(v, delta, g)
    laws = [provoking(values, columns) for values, _ in forms]
    count = min(len(each) for each in laws)
    return of_module(v, delta, g), Mixture(
        np.stack([basis for _, basis in forms]), np.stack([e[:count] for e in laws])
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("spectra", "modules"))
    parser.add_argument(
        "--look", type=int, choices=range(len(LOOKS)), action="append", help="number of a look; all"
    )
    parser.add_argument(
        "--columns", type=int, nargs=2, metavar=("K", "P"), help="so many columns and tests instead"
    )
    parser.add_argument(
        "--draws", type=int, default=0, help="from each part of the mixture; 0: what takes minutes"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a regular expression: of what is looked at, by name")
    given = parser.parse_args()
    counts = (
        [tuple(given.columns)] if given.columns else [LOOKS[look] for look in given.look or range(len(LOOKS))]
    )
    for columns, tests in counts:
        usual = max(1, (256 if given.what == "spectra" else 32) * 32**2 // columns**2)
        run(given.what, columns, tests, given.draws or usual, given.seed, given.only)


if __name__ == "__main__":
    main()
