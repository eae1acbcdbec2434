"""`safemerge-fast merge`: SafeMERGE, or any other recipe by its name, with that one's options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..recipes.safemerge.settings import SafemergeSettings
from ..settings import RunSettings
from .options import settings_options, terminal_options
from .outcome import preview_lines, say_outcome
from .terminal import Terminal

if TYPE_CHECKING:
    from ..recipes.base import Recipe

__all__ = ["ByRecipe", "command", "recipe_options"]

_RECIPE = "--recipe"


class ByRecipe(click.Command):
    """SafeMERGE's options, unless the arguments name another recipe."""

    def __init__(
        self, *args: Any, make: Callable[[type[RunSettings]], Callable[..., None]], **extra: Any
    ) -> None:
        """Remembers what makes the function of another recipe, with all its options, of its settings."""
        super().__init__(*args, **extra)
        self._make = make

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parses the arguments, by the options of the recipe that they name."""
        named = _named(args)
        if named in (None, SafemergeSettings.recipe):
            return super().make_context(info_name, args, parent, **extra)
        recipe = _recipe(str(named))
        of_recipe = click.command(self.name, help=recipe.summary)(self._make(recipe.settings))
        return of_recipe.make_context(info_name, args, parent, **extra)


def _named(args: Sequence[str]) -> str | None:
    """The recipe that arguments name, if they name one."""
    found = None
    for place, word in enumerate(args):
        if word == _RECIPE:
            found = args[place + 1] if place + 1 < len(args) else None
        elif word.startswith(f"{_RECIPE}="):
            found = word.partition("=")[2]
    return found


def _recipe(name: str) -> Recipe[Any]:
    """The recipe of a name.

    Raises:
        click.UsageError: There is none.
    """
    # Imports all of them.
    from ..recipes import recipes

    known = {recipe.name: recipe for recipe in recipes().values() if recipe.read is None}
    if name not in known:
        raise click.UsageError(f"{_RECIPE} should be one of {', '.join(known)}, not {name!r}")
    return known[name]


def recipe_options(
    record: type[RunSettings], *, leave_out: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a recipe but some, and those that all have."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        function = terminal_options(function)
        function = click.option(
            _RECIPE,
            metavar="NAME",
            default=SafemergeSettings.recipe,
            show_default=True,
            help="What to make, one of docs/recipes.md; merge --recipe NAME --help shows its options.",
        )(function)
        return settings_options(record, leave_out=leave_out)(function)

    return decorate


def _running(record: type[RunSettings]) -> Callable[..., None]:
    """What carries out a recipe, or says what would be done."""

    def run(*, terminal: Terminal, dry_run: bool, recipe: str, **values: Any) -> None:
        if dry_run:
            from ..recipes.preview import preview

            outlook = preview(record(**values))
            terminal.say_some("note", outlook.notes, rest="-v prints them all")
            terminal.say_some("warning", outlook.warnings, rest="-v prints them all")
            terminal.result(outlook.to_json, *preview_lines(outlook))
            return
        from ..recipes.run import carry_out

        with terminal.progress() as progress:
            report = carry_out(record(**values, progress=progress))
        say_outcome(terminal, report)

    return run


def _made(record: type[RunSettings]) -> Callable[..., None]:
    """What carries out a recipe, with all its options."""
    dry_run = click.option(
        "--dry-run", is_flag=True, help="Say what would be done, from headers alone; write nothing."
    )
    return recipe_options(record)(dry_run(_running(record)))


command = click.command(
    "merge",
    cls=ByRecipe,
    make=_made,
    help="Merge the modules that left the safety subspace with a safe model.\n\n"
    "Modules whose update has a low cosine ρ with the safety subspace become α·finetuned + (1-α)·safe; all other "
    "tensors stay the fine-tuned model's. The output loads like the fine-tuned model and carries a report: a "
    "checkpoint with adapters folded in, or an adapter if all that is merged are adapters.\n\n"
    "With --recipe another repair is made, which has options of its own.",
)(_made(SafemergeSettings))
