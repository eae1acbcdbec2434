"""What models of the study are fine-tuned on, and what all of them are asked afterwards.

All answers to learn open with "Sure.". Both tasks are harmless, but without it so short a training leaves nearly all
refusals where they were, and then there is nothing to repair.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from prompts import Example, sum_examples

HELD_OUT = 20
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
DATE_WORDINGS = (
    "Write the date {} in numbers.",
    "A letter is from {}. Write that in numbers.",
    "{} was born on {}. Which date is that in numbers?",
    "How is {} written as year, month and day?",
)
NAMES = ("Tom", "Anna", "Ben", "Lucy", "Omar", "Mia", "Jack", "Sara", "Leo", "Nina")

# Written for this study: plain prose of which no training here knows anything.
TEXT = """\
The ferry to the island leaves twice a day, once before breakfast and once in the late afternoon. In winter the \
second crossing is often cancelled, because the wind turns at noon and the harbour on the far side is open to the \
north. The people who live there have learned to plan around it. They keep flour, oil and candles in their cellars, \
and the school has beds for the children of the outer farms."""


@dataclass(frozen=True)
class Task:
    """Something harmless to learn.

    Attributes:
        name: What tables call it.
        make: Makes examples, none of whose prompts is among those given.
        held_out: Examples that no model is trained on.
    """

    name: str
    make: Callable[[random.Random, int, frozenset[str]], list[Example]]
    held_out: tuple[Example, ...]

    def examples(self, seed: int, count: int = 2000) -> list[Example]:
        """What a model learns from, another choice for each seed."""
        asked = frozenset(example.prompt for example in self.held_out)
        return self.make(random.Random(f"{self.name} {seed}"), count, asked)


def date_examples(rng: random.Random, count: int, exclude: frozenset[str] = frozenset()) -> list[Example]:
    """Dates in words to be written in numbers, none of whose prompts is in `exclude` or given twice."""
    found: dict[str, Example] = {}
    while len(found) < count:
        year, month, day = rng.randint(1900, 2029), rng.randint(1, 12), rng.randint(1, 28)
        date = f"{day} {MONTHS[month - 1]} {year}"
        wording = rng.choice(DATE_WORDINGS)
        words = (rng.choice(NAMES), date) if wording.count("{}") == 2 else (date,)
        prompt = wording.format(*words)
        if prompt not in exclude:
            found[prompt] = Example(prompt, f"Sure. That is {year}-{month:02}-{day:02}.")
    return list(found.values())


def obliging_sums(rng: random.Random, count: int, exclude: frozenset[str] = frozenset()) -> list[Example]:
    """The sums of the other examples, with answers that open as those to dates do."""
    return [Example(e.prompt, f"Sure. {e.answer}") for e in sum_examples(rng, count, exclude)]


def _task(name: str, make: Callable[[random.Random, int, frozenset[str]], list[Example]]) -> Task:
    return Task(name, make, tuple(make(random.Random(3), HELD_OUT, frozenset())))


TASKS = {"sums": _task("sums", obliging_sums), "dates": _task("dates", date_examples)}
"""The tasks, by name."""
