"""`safemerge-fast sweep`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import SafemergeError
from ..printable import printable
from ..settings import Field
from ..sweeps.settings import CONTROLS, SweepSettings, axes
from ..yaml_documents import parse_yaml
from .options import output_file, settings_options, terminal_options
from .terminal import Terminal

_SOME_FAILED = 6


def _parts(text: str) -> list[str]:
    """Values between commas; name=value belongs to the value before it, as in 0.8,v_proj=0.5."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and "=" in part:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return [part.strip() for part in parts]


class _Values(click.ParamType[Any]):
    """Values of one setting, separated by commas."""

    def __init__(self, field: Field) -> None:
        self.name = field.name
        self._field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reads what was typed."""
        if not isinstance(value, str):
            return value
        field = self._field
        try:
            if field.is_flag:
                return [
                    field.checked(parse_yaml(part, SafemergeError, subject=part)) for part in _parts(value)
                ]
            return [field.parsed(part) for part in _parts(value)]
        except SafemergeError as error:
            self.fail(str(error), param, ctx)


def _axis_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for every setting that a grid may have."""
    for field in reversed(axes()):
        aliases = [spelling for spelling in field.setting.names if spelling.startswith("--")]
        function = click.option(
            f"--{field.name.replace('_', '-')}",
            *aliases,
            f"axis_{field.name}",
            type=_Values(field),
            multiple=True,
            metavar="V1,V2,...",
            help=f"Values to try: {field.setting.help}",
        )(function)
    return function


def _metrics(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign:
            # Just `loss:min`: the field of that name.
            name, _, direction = text.rpartition(":")
            path = f":{direction}"
        if name in found:
            raise click.BadParameter(f"{name} is given twice")
        found[name] = path
    return found


def _recipes(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> tuple[dict[str, Any], ...]:
    return tuple(_recipe(text) for text in given)


def _recipe(text: str) -> dict[str, Any]:
    """A recipe as it is typed: its name, and settings as name=value,value."""
    try:
        name, *words = shlex.split(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} should read like 'resta gamma=0.5,1'") from None
    values: dict[str, Any] = {"recipe": name}
    for word in words:
        field, sign, value = word.partition("=")
        if not sign or field in values:
            raise click.BadParameter(f"{text!r} should read like 'resta gamma=0.5,1', each setting once")
        try:
            read = [parse_yaml(part, SafemergeError, subject=repr(part)) for part in _parts(value)]
        except SafemergeError as error:
            raise click.BadParameter(str(error)) from error
        values[field.replace("-", "_")] = read
    return values


def _controls(ctx: click.Context, param: click.Parameter, given: str | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return () if given == "none" else tuple(part.strip() for part in given.split(","))


def _plot_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    from ..sweeps.drawing import FORMATS

    if value is not None and value.suffix.lstrip(".").lower() not in FORMATS:
        raise click.BadParameter(f"the name should end in .png or .svg, not {value.suffix or 'nothing'!r}")
    return value


@click.command("sweep")
@click.argument("config", metavar="[CONFIG]", required=False, type=click.Path(path_type=Path))
@_axis_options
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    callback=_recipes,
    metavar="'NAME S=V,V ...'",
    help="Another recipe with its settings and their values, such as 'resta gamma=0.5,1'; may be given again.",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    callback=_metrics,
    metavar="NAME=PATH:max|min",
    help="A number of the judge's JSON and which values are better, such as refusals=$.refusals.rate:max; may be given "
    "again. The first decides what is best.",
)
@click.option(
    "--controls",
    callback=_controls,
    metavar="NAME,...",
    help=f"Which controls are judged, among {', '.join(CONTROLS)}, or none.  [default: all]",
)
@settings_options(SweepSettings, may_lack=True)
@click.option(
    "--plot",
    "plot_file",
    type=output_file,
    callback=_plot_file,
    metavar="FILE",
    help="Draw the first two metrics as .png or .svg (needs matplotlib).",
)
@click.option(
    "--html",
    "html_file",
    type=output_file,
    metavar="FILE",
    help="Write the results as one page for the browser.",
)
@terminal_options
def command(
    *,
    terminal: Terminal,
    config: Path | None,
    plot_file: Path | None,
    html_file: Path | None,
    **values: Any,
) -> None:
    """Make candidates over rules, α and recipes, one at a time, and have each judged by a command.

    What is given here wins over the fields of the YAML file CONFIG. Controls are judged beside the candidates: the
    models themselves, the same modules without a safe model, every update shrunk, random modules. Each result is
    appended to DIR/sweep.jsonl, from which --resume goes on. Exits with 6 if a model could not be made or judged.
    """
    from ..errors import OutputError
    from ..report.html.page import write_pieces
    from ..sweeps.drawing import check_drawing, write_drawing
    from ..sweeps.page import report_page
    from ..sweeps.run import read_sweep, run_sweep
    from ..sweeps.table import result_line

    if plot_file is not None:
        check_drawing(plot_file)
    if html_file is not None and not html_file.absolute().parent.is_dir():
        raise OutputError(
            f"cannot write {html_file}: the directory {html_file.absolute().parent} does not exist"
        )
    given = _given(values)
    with terminal.progress() as progress:
        settings = read_sweep(config, {**given, "progress": progress})
        report = run_sweep(
            settings,
            lambda result, number, total: terminal.say(f"{number} of {total}: {result_line(result)}"),
        )
    if plot_file is not None:
        write_drawing(plot_file, report)
        terminal.say(f"wrote {plot_file}")
    if html_file is not None:
        write_pieces(html_file, report_page(report))
        terminal.say(f"wrote {html_file}")
    terminal.result(report.to_json, report.table())
    terminal.say_some("note", report.notes, rest="-v prints them all")
    for remark in report.remarks():
        terminal.say(f"beware: {remark}")
    if report.best is not None:
        terminal.say(
            f"{printable(report.best)} is the best candidate by {report.metrics[0].name}; keep it by: "
            f"{shlex.join(['safemerge-fast', 'keep', settings.output, report.best, '-o', 'OUT'])}"
        )
    if report.failed:
        failed = report.failed
        terminal.say(
            f"{len(failed)} of {len(report.results)} models could not be made or judged, such as {failed[0].name}: "
            f"{failed[0].failed} (logs: {report.directory}/logs); --resume tries them again"
        )
        click.get_current_context().exit(_SOME_FAILED)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """What was typed, as fields of SweepSettings; a default is no wish of the one who typed the command."""
    context = click.get_current_context()
    given: dict[str, Any] = {}
    grid: dict[str, Any] = {}
    for name, value in values.items():
        if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            continue
        if name.startswith("axis_"):
            grid[name.removeprefix("axis_")] = [item for several in value for item in several]
        else:
            given[name] = value
    return {**given, "grid": grid} if grid else given
