"""`safemerge-fast run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..plan.methods import known_methods
from ..settings import RunSettings, fields_of
from .options import settings_options, terminal_options
from .outcome import say_outcome
from .terminal import Terminal


def _epilog() -> str:
    """Recipes with their fields, and methods with what they do."""
    from ..recipes import recipes

    of_the_run = {field.name for field in fields_of(RunSettings)}
    lines = ["\b", "Recipes:"]
    for recipe in recipes().values():
        record: type[RunSettings] = recipe.settings
        lines.append(f"  {recipe.name:<11} {recipe.summary}")
        fields = [
            field.name
            for field in fields_of(record)
            if field.name not in of_the_run and field.setting.in_files
        ]
        # A recipe that is known by its document's fields has none of its own.
        if fields:
            lines.append(f"{'':<13} Fields: {', '.join(fields)}.")
    lines += ["", "\b", "Methods (docs/methods.md has their parameters):"]
    lines += [f"  {method.name:<17} {method.summary}" for method in known_methods().values()]
    return "\n".join(lines)


class _Command(click.Command):
    """Lists recipes and methods where they are asked for, since that imports all of them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the lists below the options."""
        self.epilog = _epilog()
        super().format_epilog(ctx, formatter)


@click.command("run", cls=_Command)
@click.argument("config", metavar="CONFIG", type=click.Path(path_type=Path))
@settings_options(RunSettings, leave_out=("allow_nonfinite",))
@click.option("--dry-run", is_flag=True, help="Say what would be done, from headers alone; write nothing.")
@terminal_options
def command(*, terminal: Terminal, config: Path, dry_run: bool, **values: Any) -> None:
    """Make what the YAML file CONFIG says: a recipe, or a merge as mergekit's configurations say it.

    Its field `recipe` is one of those below, and its other fields are that recipe's settings; what is given here wins.
    With the field `merge_method` in place of `recipe` it is in mergekit's format: models or slices, base_model,
    parameters, dtype, tokenizer_source. Paths in CONFIG are relative to the working directory.
    """
    from ..recipes.run import carry_out, read_recipe

    # Defaults are no wish of the one who typed the command.
    context = click.get_current_context()
    given = {
        name: value
        for name, value in values.items()
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    if dry_run:
        from ..recipes.preview import preview
        from .outcome import preview_lines

        outlook = preview(read_recipe(config, given))
        terminal.say_some("note", outlook.notes, rest="-v prints them all")
        terminal.result(outlook.to_json, *preview_lines(outlook))
        return
    with terminal.progress() as progress:
        report = carry_out(read_recipe(config, {**given, "progress": progress}))
    say_outcome(terminal, report)
