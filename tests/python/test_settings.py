"""Every setting, as option, field of a file and argument: what it may be, what it is if it is not given, and its name.

The tables below say it once more, on their own: a setting that is missing in one of the three places, or has another
default or range there, is found.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from invoke import assert_one_sentence, run

import safemerge_fast
from safemerge_fast import PlanError, SafemergeError, SettingError
from safemerge_fast.recipes import recipes
from safemerge_fast.recipes.check import CheckSettings
from safemerge_fast.recipes.run import read_recipe
from safemerge_fast.recipes.safemerge.settings import AnalysisSettings
from safemerge_fast.recipes.verify import VerifySettings
from safemerge_fast.settings import RunSettings, Settings

NUMBERS: tuple[Any, ...] = ("high", math.nan, math.inf, -math.inf, True, None, [0.5], {})
WHOLE: tuple[Any, ...] = ("two", 1.5, True, [1])


@dataclass(frozen=True)
class Known:
    """What is known of a setting.

    Attributes:
        default: What it is if it is not given; ... if it must be given.
        good: A value that it may have.
        bad: Values that it may not have.
        held: What a record holds for the good value, where that is something else.
        in_files: Whether a file may set it.
    """

    default: Any
    good: Any
    bad: tuple[Any, ...]
    held: Any = ...
    in_files: bool = True

    @property
    def kept(self) -> Any:
        """What a record holds for the good value."""
        return self.good if self.held is ... else self.held

    def bad_words(self) -> list[str]:
        """The bad values that can be typed and stay bad: any word is a text."""
        # 1.5 is no number of bytes, but the text "1.5" is a size.
        typed = int if self.held is not ... else int | float
        numbers = not isinstance(self.good, str) or self.held is not ...
        return [
            str(value)
            for value in self.bad
            if isinstance(value, str) or (numbers and isinstance(value, typed) and value is not True)
        ]


def optional(bad: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value for value in bad if value is not None)


MODEL = Known(..., "org/model", (3, None, [], True))
FLAG_BAD = ("yes", 1, 0, None, [])
SIZE_BAD = ("big", "0", 0, -1, 1.5, True, [1])

RUN = {
    "output": Known(..., "out", (3, None, True), in_files=False),
    "threads": Known(None, 3, (0, -1, 4097, *WHOLE)),
    "memory_budget": Known(None, "1GB", SIZE_BAD, held=10**9),
    "read_backend": Known("auto", "pread", ("telepathy", 1, None)),
    "expert_lora_layout": Known("peft", "unsloth", ("axolotl", 1, None)),
    "resume": Known(False, True, FLAG_BAD, in_files=False),
    "overwrite": Known(False, "in-place", ("yes", 1, None), in_files=False),
    "allow_nonfinite": Known(False, True, FLAG_BAD),
    "executor": Known("local", "ray:local", ("spark", "ray://h:1", 1, None), in_files=False),
    "task_cpus": Known(None, 3, (0, -1, 4097, *WHOLE), in_files=False),
    "stall_after": Known(120.0, 30.0, (4.9, -1.0, *NUMBERS), in_files=False),
}
SHAPE = {
    "dtype": Known("auto", "bfloat16", ("int8", "BF16", 16, None)),
    "max_shard_size": Known(None, "5GB", SIZE_BAD, held=5 * 10**9),
    "encode": Known("keep", "bfloat16", ("int4", 16, None)),
}
MASK = {"mask": Known(None, "mask.safetensors", (3, [], True))}
FORCE = {"force": Known(False, True, FLAG_BAD)}
WHOLE_MODEL = {
    "allow_missing": Known(False, True, FLAG_BAD),
    "fill_from": Known(None, "aligned", ("base", True, 1)),
    "untie": Known(False, True, FLAG_BAD),
}
SHARE = optional((-0.1, 1.1, *NUMBERS))
ANALYSED = {
    "delta_reference": Known("aligned", "base", ("safe", 1, None)),
    "include": Known(None, "embed.*weight", ("(", "(?=x)", 1)),
    "exclude": Known(None, "mlp", ("[", r"(a)\1", 1)),
    "estimator": Known("auto", "sketch", ("guess", 1, None)),
    "failure": Known(1e-3, 1e-6, (0.0, -0.1, 0.6, *NUMBERS)),
    "resolution": Known(None, 0.01, (0.0, 0.6, "1%", True)),
    "device": Known("auto", "cpu", (1, None)),
}
SAFEMERGE = {
    "base": MODEL,
    "aligned": MODEL,
    "finetuned": MODEL,
    "safe": Known(None, "org/safe", (3, [], True)),
    **RUN,
    "threshold": Known(0.35, 0.5, (-0.01, 1.01, *NUMBERS)),
    "select": Known(
        "threshold",
        "fraction:0.5",
        ("best", "lowest:-1", "lowest:x", "fraction:2", "null:-1", "z:nan", 3, None),
    ),
    "per_type": Known(False, True, FLAG_BAD),
    "modules": Known(None, "modules.txt", (3, True)),
    "granularity": Known("module", "layer", ("tensor", 1, None)),
    "on_undefined": Known("merge", "keep", ("drop", True, None)),
    "others": Known("keep", "merge", ("drop", True, None)),
    "scores": Known(None, "scores.json", (3, True)),
    "alpha": Known(0.8, 0.25, (-0.01, 1.01, "0.8,v_proj", "0.8,v_proj=2", "0.8,a=0,a=1", *NUMBERS)),
    "alpha_file": Known(None, "alphas.yml", (3, True)),
    "method": Known("linear", "ties", ("karcher", "soup", 1, None)),
    "density": Known(None, 0.5, SHARE),
    "seed": Known(None, 7, (-1, *WHOLE)),
    **MASK,
    "parameters": Known(None, "lambda=0.9", (1, {})),
    "output_format": Known("auto", "checkpoint", ("gguf", 1, None)),
    "adapter_rank": Known(None, 4, (0, -1, *WHOLE)),
    "compat": Known(None, "peft-linear", ("peft", 1)),
    **SHAPE,
    **WHOLE_MODEL,
    **ANALYSED,
    **FORCE,
}
SELECTED = {name: ANALYSED[name] for name in ("include", "exclude")}


def factors(*, kappa: float, rank: int) -> dict[str, Known]:
    """Settings of recipes that decompose matrices."""
    return {
        "kappa": Known(kappa, -0.25, (-10.1, 10.1, *NUMBERS)),
        "rank": Known(rank, 3, (0, -1, None, *WHOLE)),
        "iterations": Known(100, 7, (0, 1001, None, *WHOLE)),
        **SELECTED,
        "device": ANALYSED["device"],
    }


RECIPES: dict[str, dict[str, Known]] = {
    "safemerge": SAFEMERGE,
    "fold": {"model": MODEL, "adapter": MODEL, **RUN, **SHAPE, "untie": WHOLE_MODEL["untie"]},
    "resta": {
        "base": MODEL,
        "aligned": MODEL,
        "finetuned": MODEL,
        **RUN,
        "gamma": Known(0.5, -2.0, (-10.1, 10.1, *NUMBERS)),
        "density": Known(None, 0.3, SHARE),
        "seed": Known(0, 5, (-1, None, *WHOLE)),
        **SHAPE,
        **WHOLE_MODEL,
        **FORCE,
    },
    "wise-ft": {
        "aligned": MODEL,
        "finetuned": MODEL,
        **RUN,
        "alpha": Known(0.5, 0.25, (-0.01, 1.01, *NUMBERS)),
        **MASK,
        **SHAPE,
        **WHOLE_MODEL,
        **FORCE,
    },
    "shrink": {
        "aligned": MODEL,
        "finetuned": MODEL,
        **RUN,
        "alpha": Known(0.5, 0.25, (-0.01, 1.01, *NUMBERS)),
        **MASK,
        **SELECTED,
        **SHAPE,
        **WHOLE_MODEL,
        **FORCE,
    },
    "lox": {
        "base": MODEL,
        "aligned": MODEL,
        **RUN,
        **factors(kappa=1.0, rank=6),
        **SHAPE,
        "untie": WHOLE_MODEL["untie"],
        **FORCE,
    },
    "safe-lora": {
        "base": MODEL,
        "aligned": MODEL,
        "finetuned": MODEL,
        **RUN,
        **{name: SAFEMERGE[name] for name in ("select", "scores", "output_format")},
        "estimator": Known("auto", "exact", ("guess", 1, None)),
        "threshold": Known(0.35, 0.5, (-0.01, 1.01, *NUMBERS)),
        **SELECTED,
        "device": ANALYSED["device"],
        **SHAPE,
        **WHOLE_MODEL,
        **FORCE,
    },
    "safety-vector": {
        "aligned": MODEL,
        "finetuned": MODEL,
        **RUN,
        **factors(kappa=0.5, rank=16),
        **SHAPE,
        **WHOLE_MODEL,
        **FORCE,
    },
}
ANALYSIS = {
    "base": MODEL,
    "aligned": MODEL,
    "finetuned": MODEL,
    **ANALYSED,
    "seed": Known(None, 3, (-1, 1.5, "x", True)),
    **FORCE,
    "read_backend": RUN["read_backend"],
    "expert_lora_layout": RUN["expert_lora_layout"],
    "allow_nonfinite": RUN["allow_nonfinite"],
}
VERIFY = {
    "output": RUN["output"],
    "sample": Known(1.0, 0.5, (0.0, -0.5, 1.01, *NUMBERS)),
    "seed": Known(0, 3, (-1, 2**64, None, *WHOLE)),
    "threads": RUN["threads"],
}
CHECK = {
    "adapter": MODEL,
    "model": MODEL,
    "expert_lora_layout": RUN["expert_lora_layout"],
    "read_backend": RUN["read_backend"],
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Known]]] = {
    "merge": (safemerge_fast.merge, SAFEMERGE),
    "fold": (safemerge_fast.fold, RECIPES["fold"]),
    "resta": (safemerge_fast.resta, RECIPES["resta"]),
    "wise_ft": (safemerge_fast.wise_ft, RECIPES["wise-ft"]),
    "shrink": (safemerge_fast.shrink, RECIPES["shrink"]),
    "lox": (safemerge_fast.lox, RECIPES["lox"]),
    "safety_vector": (safemerge_fast.safety_vector, RECIPES["safety-vector"]),
    "safe_lora": (safemerge_fast.safe_lora, RECIPES["safe-lora"]),
    "analyze": (safemerge_fast.analyze, ANALYSIS),
    "check": (safemerge_fast.check, CHECK),
    "verify": (safemerge_fast.verify, VERIFY),
}
COMMANDS = {"merge": SAFEMERGE, "analyze": ANALYSIS, "check": CHECK, "verify": VERIFY, "run": RUN}
ARGUMENTS = {("verify", "output"), ("check", "adapter"), ("check", "model")}
RECORDS: dict[str, tuple[type[Settings], dict[str, Known]]] = {
    **{name: (recipe.settings, RECIPES[name]) for name, recipe in recipes().items() if name in RECIPES},
    "analyze": (AnalysisSettings, ANALYSIS),
    "check": (CheckSettings, CHECK),
    "verify": (VerifySettings, VERIFY),
}


def each(tables: Mapping[str, Mapping[str, Known]]) -> list[Any]:
    """Every setting of every table, as parameters of a test."""
    return [
        pytest.param(owner, name, known, id=f"{owner}-{name}")
        for owner, table in tables.items()
        for name, known in table.items()
    ]


def needed(table: Mapping[str, Known]) -> dict[str, Any]:
    """What must be given."""
    return {name: known.good for name, known in table.items() if known.default is ...}


class SeenError(SafemergeError):
    """The settings have arrived."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that recipes are opened with; nothing further is done."""
    arrived: list[Settings] = []

    def open_job(settings: Settings) -> Any:
        arrived.append(settings)
        raise SeenError("seen")

    known = {name: replace(recipe, open=open_job) for name, recipe in recipes().items()}
    monkeypatch.setattr("safemerge_fast.recipes.run.recipes", lambda: known)
    return arrived


# --- records and functions ------------------------------------------------------------------------


def test_these_are_the_recipes() -> None:
    assert set(recipes()) - {"mergekit"} == set(RECIPES)


@pytest.mark.parametrize("owner", FUNCTIONS)
def test_functions_take_just_these_settings_with_their_defaults(owner: str) -> None:
    function, table = FUNCTIONS[owner]
    parameters = inspect.signature(function).parameters
    assert set(parameters) == {*table, "progress"}
    for name, known in table.items():
        default = inspect.Parameter.empty if known.default is ... else known.default
        assert parameters[name].default == default, name
        assert f"    {name}: " in (function.__doc__ or ""), name
    assert parameters["progress"].default is None
    assert function.__name__ == owner


@pytest.mark.parametrize("owner", FUNCTIONS)
def test_models_may_be_given_by_position_and_the_rest_by_name(owner: str) -> None:
    function, table = FUNCTIONS[owner]
    parameters = inspect.signature(function).parameters.values()
    keyword_only = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    models = [name for name, known in table.items() if known is MODEL or name == "safe"]
    if owner not in ("analyze", "check", "verify"):
        assert keyword_only == {*table, "progress"} - set(models)
    assert [parameter.name for parameter in parameters][: len(models)] == models


@pytest.mark.parametrize(
    ("owner", "name", "known"), each({owner: table for owner, (_, table) in RECORDS.items()})
)
def test_records_hold_good_values_and_refuse_others_by_name(owner: str, name: str, known: Known) -> None:
    record, table = RECORDS[owner]
    made = record(**{**needed(table), name: known.good})
    assert getattr(made, name) == known.kept
    for other, others in table.items():
        if other != name:
            assert getattr(made, other) == (others.good if others.default is ... else others.default)
    assert record.from_dict(made.to_dict()) == made
    assert record.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    for value in known.bad:
        with pytest.raises(SettingError, match=rf"^{name}\b") as raised:
            record(**{**needed(table), name: value})
        assert "\n" not in str(raised.value)
        with pytest.raises(PlanError, match=rf"^the settings: {name}\b"):
            record.from_dict({**needed(table), name: value})


@pytest.mark.parametrize("owner", RECORDS)
def test_records_name_what_is_unknown_or_missing(owner: str) -> None:
    record, table = RECORDS[owner]
    for name in needed(table):
        less = {other: value for other, value in needed(table).items() if other != name}
        with pytest.raises(PlanError, match=f"{owner} needs the setting {name}$"):
            record.from_dict(less)
    with pytest.raises(PlanError, match=f"{owner} has no setting 'tau'; it has "):
        record.from_dict({**needed(table), "tau": 0.3})


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    made = recipes()["fold"].settings(model=tmp_path / "m", adapter="a", output=tmp_path / "o")
    assert (made.model, made.adapter, made.output) == (str(tmp_path / "m"), "a", str(tmp_path / "o"))


# What other settings do not go with.
ALONE = ("adapter_rank", "resume", "allow_missing", "modules", "per_type")


@pytest.mark.parametrize("owner", RECIPES)
def test_what_decides_the_weights_is_told_from_what_does_not(owner: str) -> None:
    """Whatever is about this run or machine only must not keep a job from being resumed."""
    table = RECIPES[owner]
    made = recipes()[owner].settings(
        **{
            **{name: known.good for name, known in table.items() if name not in ALONE},
            **({"method": "linear"} if "method" in table else {}),
        }
    )
    left_out = {*RUN, "scores", "device", "force"} - {"allow_nonfinite", "expert_lora_layout"}
    assert set(made.deciding()) == set(table) - left_out - {"adapter_rank", "modules"}
    forced = {"force": True} if "force" in table else {}
    assert made.file_fields() == {"recipe": owner, **made.deciding(), **forced}


def test_settings_that_exclude_each_other() -> None:
    for owner, table in RECIPES.items():
        with pytest.raises(SettingError, match="give one of them"):
            recipes()[owner].settings(**needed(table), resume=True, overwrite=True)
    with pytest.raises(SettingError, match="give one of them"):
        recipes()["safemerge"].settings(**needed(SAFEMERGE), adapter_rank=3, compat="peft-linear")
    for rule in ({"threshold": 0.5}, {"select": "z:0"}, {"per_type": True}, {"granularity": "layer"}):
        with pytest.raises(SettingError, match=f"{next(iter(rule))} is a rule; give one of them"):
            recipes()["safemerge"].settings(**needed(SAFEMERGE), modules="list.txt", **rule)
    with pytest.raises(SettingError, match="a layer has modules of many types"):
        recipes()["safemerge"].settings(
            **needed(SAFEMERGE), select="lowest:1", per_type=True, granularity="layer"
        )
    with pytest.raises(SettingError, match="and so does alpha_file; give one of them"):
        recipes()["safemerge"].settings(**needed(SAFEMERGE), alpha="0.8,v_proj=0.5", alpha_file="a.yml")
    with pytest.raises(SettingError, match="an adapter holds sums of products"):
        recipes()["safemerge"].settings(**needed(SAFEMERGE), method="ties", output_format="adapter")


# --- files ----------------------------------------------------------------------------------------


def write(path: Path, **fields: Any) -> Path:
    """Writes a file; JSON is YAML, with NaN and Infinity as YAML has them."""
    text = json.dumps(fields).replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")
    path.write_text(text)
    return path


@pytest.mark.parametrize(("owner", "name", "known"), each(RECIPES))
def test_files_hold_the_settings_of_their_recipe(
    owner: str, name: str, known: Known, tmp_path: Path, seen: list[Settings]
) -> None:
    fields = {key: value for key, value in needed(RECIPES[owner]).items() if key != "output"}
    file = write(tmp_path / "r.yml", recipe=owner, **{**fields, name: known.good})
    if not known.in_files:
        with pytest.raises(PlanError, match=rf"r\.yml sets {name}, which is given on the command line"):
            read_recipe(file, {"output": "out"})
        return
    with pytest.raises(SeenError):
        safemerge_fast.run(file, output="out")
    result = run("run", file, "-o", "out")
    assert (result.exit_code, result.stderr) == (3, "error: seen\n")
    expected = recipes()[owner].settings(**{**needed(RECIPES[owner]), name: known.good})
    assert seen == [expected, expected]
    for value in known.bad:
        write(file, recipe=owner, **{**fields, name: value})
        with pytest.raises(PlanError, match=rf"r\.yml: {name}\b") as raised:
            read_recipe(file, {"output": "out"})
        assert raised.value.exit_code == 3, "what is wrong in a file is no misuse of the command line"


@pytest.mark.parametrize("name", [name for name, known in RUN.items() if known.in_files])
def test_what_is_given_beside_a_file_wins(name: str, tmp_path: Path, seen: list[Settings]) -> None:
    given = RUN[name].good
    other = {
        "threads": 5,
        "memory_budget": "2GB",
        "read_backend": "mmap",
        "expert_lora_layout": "peft",
        "allow_nonfinite": False,
    }[name]
    file = write(tmp_path / "r.yml", recipe="fold", model="m", adapter="a", **{name: other})
    with pytest.raises(SeenError):
        safemerge_fast.run(file, output="out", **{name: given})
    if name != "allow_nonfinite":
        assert run("run", file, "-o", "out", f"--{name.replace('_', '-')}", str(given)).exit_code == 3
    with pytest.raises(SeenError):
        safemerge_fast.run(file, output="out")
    held = [getattr(settings, name) for settings in seen]
    assert held[:-1] == [RUN[name].kept] * (len(held) - 1)
    assert held[-1] == {"memory_budget": 2 * 10**9}.get(name, other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threads", "0"), "threads should be a whole number from 1 to 4096, not 0"),
        (("--memory-budget", "big"), "should be like 5GB"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--overwrite=yes",), "overwrite should be true, false or in-place"),
    ],
)
def test_the_command_line_s_own_faults_are_usage_errors_beside_a_file(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    file = write(tmp_path / "r.yml", recipe="fold", model="m", adapter="a")
    result = run("run", file, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert_one_sentence(result, message)
    assert str(file) not in result.stderr


# --- options --------------------------------------------------------------------------------------


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("owner", COMMANDS)
def test_commands_have_an_option_for_each_setting_with_its_default(owner: str) -> None:
    command = import_module(f"safemerge_fast.cli.{owner}").command
    options = {parameter.name: parameter for parameter in command.params}
    for name, known in COMMANDS[owner].items():
        if (owner, name) in {("run", "allow_nonfinite")}:
            assert name not in options
            continue
        parameter = options[name]
        if (owner, name) in ARGUMENTS:
            assert parameter.param_type_name == "argument"
            continue
        assert option(name) in parameter.opts
        assert parameter.required == (known.default is ...)
        if known.default is not ...:
            assert parameter.default == known.default, name
    # What there is besides is no setting.
    besides = {"as_json", "quiet", "verbose", "no_progress", "dry_run", "config", "help"}
    if owner == "merge":
        besides |= {"recipe"}
    if owner == "analyze":
        besides |= {"threshold", "select", "per_type", "granularity", "on_undefined"}
        besides |= {"output", "csv_file", "html_file", "plot_file"}
    assert set(options) <= {*COMMANDS[owner], *besides}


@pytest.mark.parametrize(("owner", "name", "known"), each({"merge": SAFEMERGE}))
def test_options_of_merge_reach_the_recipe(owner: str, name: str, known: Known, seen: list[Settings]) -> None:
    values = {**needed(SAFEMERGE), name: known.good}
    words = [
        word
        for key, value in values.items()
        for word in ([option(key)] if value is True else [f"{option(key)}={value}"])
    ]
    result = run(owner, *words)
    assert (result.exit_code, result.stderr) == (3, "error: seen\n")
    assert seen == [recipes()["safemerge"].settings(**values)]


@pytest.mark.parametrize(("owner", "name", "known"), each(RECIPES))
def test_options_of_a_named_recipe_reach_it(
    owner: str, name: str, known: Known, seen: list[Settings]
) -> None:
    values = {**needed(RECIPES[owner]), name: known.good}
    words = [
        word
        for key, value in values.items()
        for word in ([option(key)] if value is True else [f"{option(key)}={value}"])
    ]
    expected = recipes()[owner].settings(**values)
    for named in (["--recipe", owner], [f"--recipe={owner}"]):
        result = run("merge", *words, *named)
        assert (result.exit_code, result.stderr) == (3, "error: seen\n")
    assert seen == [expected, expected]


def test_recipes_are_named_on_the_command_line() -> None:
    result = run("merge", "--recipe", "soup", "-o", "out")
    assert result.exit_code == 2
    assert_one_sentence(result, "--recipe should be one of safemerge, fold, resta", "not 'soup'")
    assert run("merge", "--recipe", "mergekit", "-o", "out").exit_code == 2
    result = run("merge", "--recipe", "lox", "--help")
    assert result.exit_code == 0
    assert "--kappa" in result.stdout
    assert "--alpha" not in result.stdout
    result = run("merge", "--recipe", "lox", "--alpha", "0.5", "-o", "out")
    assert result.exit_code == 2
    assert_one_sentence(result, "--alpha")
    assert "--recipe NAME" in run("merge", "--help").stdout


def test_short_and_other_names_of_options(seen: list[Settings]) -> None:
    words = ["--base", "b", "--aligned", "a", "--finetuned", "f"]
    assert run("merge", *words, "-o", "short", "--tau", "0.5", "--overwrite").exit_code == 3
    assert run("merge", *words, "--output", "short", "--threshold", "0.5", "--overwrite").exit_code == 3
    assert seen[0] == seen[1]
    assert (seen[0].output, seen[0].threshold, seen[0].overwrite) == ("short", 0.5, True)


@pytest.mark.parametrize(
    ("owner", "name", "word"),
    [
        pytest.param(owner, name, word, id=f"{owner}-{name}-{word}")
        for owner, table in COMMANDS.items()
        for name, known in table.items()
        if not isinstance(known.default, bool) and (owner, name) not in ARGUMENTS
        for word in known.bad_words()
    ],
)
def test_bad_words_are_usage_errors_that_name_the_option(
    owner: str, name: str, word: str, tmp_path: Path
) -> None:
    table = {key: value for key, value in COMMANDS[owner].items() if key not in (name, "output")}
    words = [
        f"{option(key)}={known.good}"
        for key, known in table.items()
        if known.default is ... and (owner, key) not in ARGUMENTS
    ]
    if owner == "run":
        words.append(str(write(tmp_path / "r.yml", recipe="fold", model="m", adapter="a")))
    given = {"verify": [str(tmp_path / "out")], "check": ["a", "m"]}
    words += given.get(owner, [f"--output={tmp_path / 'out'}"])
    result = run(owner, *words, f"{option(name)}={word}")
    assert result.exit_code == 2, result.stderr
    assert_one_sentence(result, option(name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["threads", "read_backend", "memory_budget"])
def test_every_recipe_is_told_how_to_run(name: str) -> None:
    for owner in RECIPES:
        record = recipes()[owner].settings
        assert issubclass(record, RunSettings)
        assert getattr(record(**{**needed(RECIPES[owner]), name: RUN[name].good}), name) == RUN[name].kept
