"""A corpus of files and arguments that nobody should trust: a row each, with the exit code and what must be said.

Run as a program it is a server that starts the command line in children which it forks: a row costs a hundredth of a
second instead of an interpreter's start.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Q = "model.layers.0.self_attn.q_proj"
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 400
# What a child may take, in seconds: only a hang reaches it.
PATIENCE = 10

Words = list[str | bytes | Path]


@dataclass(frozen=True)
class Row:
    """One hostile thing.

    Attributes:
        name: What it is.
        arrange: Makes it in an empty directory and returns the command line.
        code: The exit code.
        part: What stderr must hold; nothing is to be said if the code is 0.
    """

    name: str
    arrange: Callable[[Path], Words]
    code: int
    part: str = ""


# --- things that are right, to be spoilt ----------------------------------------------------------


def safetensors(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """A file of float32 tensors full of ones."""
    header: dict[str, Any] = {}
    data = b""
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        data += struct.pack("<f", 1.0) * (size // 4)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def model(path: Path, name: str = "model") -> Path:
    """A checkpoint of one matrix, with a configuration."""
    directory = path / name
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(
        safetensors({f"{Q}.weight": (8, 8), "model.norm.weight": (8,)})
    )
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def adapter(path: Path, **settings: Any) -> Path:
    """An adapter of that checkpoint; settings go over the usual ones."""
    directory = path / "adapter"
    directory.mkdir()
    factors = {f"base_model.model.{Q}.lora_A.weight": (2, 8), f"base_model.model.{Q}.lora_B.weight": (8, 2)}
    (directory / "adapter_model.safetensors").write_bytes(safetensors(factors))
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (directory / "adapter_config.json").write_text(json.dumps(document))
    return directory


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def endless(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def text(content: str | bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def large(size: int) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.touch()
        os.truncate(file, size)

    return write


# --- rows -----------------------------------------------------------------------------------------


def in_model(file: str, spoil: Callable[[Path], None]) -> Callable[[Path], Words]:
    def arrange(path: Path) -> Words:
        spoil(model(path) / file)
        return ["inspect", path / "model"]

    return arrange


def in_adapter(file: str, spoil: Callable[[Path], None]) -> Callable[[Path], Words]:
    def arrange(path: Path) -> Words:
        spoil(adapter(path) / file)
        return ["inspect", path / "adapter"]

    return arrange


def configured(**fields: Any) -> Callable[[Path], Words]:
    return in_model("config.json", text(json.dumps(fields)))


def adapted(**settings: Any) -> Callable[[Path], Words]:
    return lambda path: ["inspect", adapter(path, **settings)]


def folded(spoil: Callable[[Path], None], *more: str) -> Callable[[Path], Words]:
    """`run` of a recipe that folds the adapter; the file is recipe.yml."""

    def arrange(path: Path) -> Words:
        base, addition, recipe = model(path), adapter(path), path / "recipe.yml"
        recipe.write_text(f"recipe: fold\nmodel: {base}\nadapter: {addition}\n")
        spoil(recipe)
        return ["run", recipe, "-o", path / "out", *more]

    return arrange


def named(name: str) -> Callable[[Path], Words]:
    """A tensor of that name in a single file."""

    def arrange(path: Path) -> Words:
        (path / "x.safetensors").write_bytes(safetensors({name: (2, 2)}))
        return ["inspect", path / "x.safetensors"]

    return arrange


def layered(number: str) -> Callable[[Path], Words]:
    """A layer of that number in a model whose configuration counts its layers."""

    def arrange(path: Path) -> Words:
        directory = model(path)
        (directory / "model.safetensors").write_bytes(
            safetensors({f"model.layers.{number}.x.weight": (2, 2)})
        )
        (directory / "config.json").write_text('{"num_hidden_layers": 2}')
        return ["inspect", directory]

    return arrange


def in_output(file: str, spoil: Callable[[Path], None]) -> Callable[[Path], Words]:
    """`verify` of a directory that looks like an output."""

    def arrange(path: Path) -> Words:
        directory = model(path)
        for name in ("safemerge_report.json", "safemerge_plan.json"):
            (directory / name).write_text("{}")
        spoil(directory / file)
        return ["verify", directory]

    return arrange


def scored(spoil: Callable[[Path], None]) -> Callable[[Path], Words]:
    """`merge` with scores from a file."""

    def arrange(path: Path) -> Words:
        roles: Words = []
        for role in ("base", "aligned", "finetuned"):
            roles += [f"--{role}", model(path, role)]
        spoil(path / "scores.json")
        return ["merge", *roles, "-o", path / "out", "--scores", path / "scores.json"]

    return arrange


def searched(option: str, expression: str) -> Callable[[Path], Words]:
    return lambda path: [
        *(
            "merge",
            "--base",
            "b",
            "--aligned",
            "a",
            "--finetuned",
            "f",
            "-o",
            path / "out",
            option,
            expression,
        )
    ]


def words(*arguments: str | bytes) -> Callable[[Path], Words]:
    return lambda path: list(arguments)


def index(content: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        (file.parent / "model.safetensors").rename(file.parent / "model-00001-of-00001.safetensors")
        file.write_text(content)

    return write


def instead_of_weights(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        (file.parent / "model.safetensors").rename(file.parent / "model-00001-of-00001.safetensors")
        spoil(file)

    return write


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_INDEX = "model.safetensors.index.json"

ROWS = [
    # config.json
    Row("config: pipe", in_model("config.json", pipe), 3, "config.json is a named pipe"),
    Row("config: /dev/zero", in_model("config.json", endless), 3, "config.json is a device"),
    Row("config: directory", in_model("config.json", folder), 3, "config.json is a directory"),
    Row("config: empty", in_model("config.json", text("")), 3, "cannot be read as JSON"),
    Row("config: not UTF-8", in_model("config.json", text(b'{"a": "\xff"}')), 3, "utf-8"),
    Row("config: half a pair", in_model("config.json", text('{"a": "\\ud800"}')), 3, "surrogates"),
    Row("config: a list", in_model("config.json", text("[]")), 3, "should hold a JSON object, not a list"),
    Row("config: deep", in_model("config.json", text(DEEP)), 3, "nested deeper than 64 levels"),
    Row(
        "config: deep fields",
        in_model("config.json", text('{"a":' * 999 + "1" + "}" * 999)),
        3,
        "nested deeper",
    ),
    Row(
        "config: endless number",
        in_model("config.json", text(f'{{"a": {DIGITS}}}')),
        3,
        "more than 40 digits",
    ),
    Row(
        "config: a long number",
        in_model("config.json", text(f'{{"a": {"9" * 5000}}}')),
        3,
        "more than 40 digits",
    ),
    Row("config: too large", in_model("config.json", large((16 << 20) + 1)), 3, "16777217 bytes"),
    Row("config: too many", in_model("config.json", text("[" + "[]," * 5_000_000 + "[]]")), 3, "values"),
    Row("config: escapes", in_model("config.json", text('{"model_type": ["\\u001b[31m\\n"]}')), 3, "\\x1b"),
    Row("model_type: a list", configured(model_type=["llama"]), 3, "model_type should be a text"),
    Row("tied: text", configured(tie_word_embeddings="no"), 3, "tie_word_embeddings should be true or false"),
    Row(
        "inner: text",
        configured(text_config={"tie_word_embeddings": 1}),
        3,
        "text_config.tie_word_embeddings",
    ),
    Row("layers: text", configured(num_hidden_layers="12"), 0),
    Row("layers: negative", configured(num_hidden_layers=-1), 0),
    Row("text_config: text", configured(text_config="x"), 0),
    Row("quantization_config: a list", configured(quantization_config=[1]), 0),
    Row("auto_map: a number", configured(auto_map=7), 0),
    Row("infinite", in_model("config.json", text('{"a": [Infinity, NaN, 1e999]}')), 0),
    # Weights and indices
    Row("weights: pipe", in_model("model.safetensors", pipe), 3, "model.safetensors"),
    Row("weights: /dev/zero", in_model("model.safetensors", endless), 3, "model.safetensors"),
    Row("weights: directory", in_model("model.safetensors", folder), 3, "model.safetensors"),
    Row("weights: empty", in_model("model.safetensors", text("")), 3, "model.safetensors"),
    Row("weights: long header", in_model("model.safetensors", text(b"\xff" * 64)), 3, "model.safetensors"),
    Row("index: pipe", in_model(_INDEX, instead_of_weights(pipe)), 3, _INDEX),
    Row("index: /dev/zero", in_model(_INDEX, instead_of_weights(endless)), 3, _INDEX),
    Row("index: directory", in_model(_INDEX, instead_of_weights(folder)), 3, _INDEX),
    Row("index: deep", in_model(_INDEX, index(DEEP)), 3, _INDEX),
    Row("index: outside", in_model(_INDEX, index('{"weight_map": {"a": "../x.safetensors"}}')), 3, "outside"),
    Row(
        "index: escape",
        in_model(_INDEX, index('{"weight_map": {"a": "\\u001b[2J\\n.safetensors"}}')),
        3,
        "\\x1b",
    ),
    # Adapters
    Row("adapter: pipe", in_adapter("adapter_config.json", pipe), 3),
    Row("adapter: /dev/zero", in_adapter("adapter_config.json", endless), 3),
    Row("adapter: deep", in_adapter("adapter_config.json", text(DEEP)), 3, "nested deeper"),
    Row("adapter: a list", in_adapter("adapter_config.json", text("[]")), 3, "should hold a JSON object"),
    Row(
        "adapter weights: pipe", in_adapter("adapter_model.safetensors", pipe), 3, "adapter_model.safetensors"
    ),
    Row("peft_type: a list", adapted(peft_type=["LORA"]), 3, "peft_type"),
    Row("peft_type: escapes", adapted(peft_type="\x1b[31m\n"), 3, "\\x1b[31m"),
    Row("r: endless", adapted(r=10**400), 3, "more than 40 digits"),
    Row("r: large", adapted(r=10**39), 3, "rank"),
    Row("r: text", adapted(r="2"), 3, "r should be a whole number"),
    Row("r: true", adapted(r=True), 3, "r should be a whole number"),
    Row("r: zero", adapted(r=0), 3, "r should be a whole number"),
    Row(
        "alpha: infinite",
        in_adapter("adapter_config.json", text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}')),
        3,
        "lora_alpha",
    ),
    Row("alpha: null", adapted(lora_alpha=None), 3, "lora_alpha should be a finite number"),
    Row("patterns: a list", adapted(rank_pattern=["q_proj"]), 3, "rank_pattern should be an object"),
    Row("patterns: values", adapted(alpha_pattern={"q_proj": [1]}), 3, "alpha_pattern 'q_proj'"),
    Row("patterns: backtracking", adapted(rank_pattern={"(\\w+\\.?)+\\d$" + str(n): 2 for n in range(9)}), 0),
    Row("patterns: look-ahead", adapted(rank_pattern={"(?=q)q_proj": 2}), 3, "look-around"),
    Row("patterns: backreference", adapted(rank_pattern={"(q)\\1": 2}), 3, "backreferences"),
    Row("patterns: unbalanced", adapted(rank_pattern={"((((": 2}), 3, "not a regular expression"),
    Row("patterns: vast", adapted(rank_pattern={"((a{99}){99}){99}": 2}), 3, "too large"),
    Row("patterns: deep", adapted(rank_pattern={"(" * 5000 + ")" * 5000: 2}), 3, "nested"),
    Row("patterns: flags", adapted(rank_pattern={"(?i)Q_PROJ": 2}), 0),
    Row(
        "patterns: too many",
        adapted(rank_pattern={f"m{n}": 2 for n in range(10_001)}),
        3,
        "10001 expressions",
    ),
    Row("rslora: text", adapted(use_rslora="yes"), 3, "use_rslora should be true or false"),
    Row("fan_in_fan_out: a list", adapted(fan_in_fan_out=[]), 3, "fan_in_fan_out should be true or false"),
    Row("init: an object", adapted(init_lora_weights={"a": 1}), 3, "init_lora_weights"),
    Row("tokens: text", adapted(trainable_token_indices="x"), 3, "trainable_token_indices"),
    Row("tokens: huge", adapted(trainable_token_indices={"embed_tokens": [10**39]}), 0),
    Row("unknown: long", adapted(surprise="x" * 1_000_000), 3, "surprise"),
    Row("base name: a list", adapted(base_model_name_or_path=["\x1b[31m"]), 0),
    Row("neutral: wrong types", adapted(target_modules=7, bias=[1], task_type={}, lora_dropout="x"), 0),
    # Names
    Row("name: escape", named("a\x1b[2Jb.weight"), 0),
    Row("name: lines", named("a\nerror: b\r.weight"), 0),
    Row("name: direction", named("a\u202eb.weight"), 0),
    Row("name: a long number", layered("9" * 5000), 0),
    # Recipes
    Row("recipe: pipe", folded(pipe), 3, "recipe.yml"),
    Row("recipe: /dev/zero", folded(endless), 3, "recipe.yml"),
    Row("recipe: directory", folded(folder), 3, "recipe.yml"),
    Row("recipe: too large", folded(large((4 << 20) + 1)), 3, "recipe.yml"),
    Row("recipe: bomb", folded(text(_BOMB)), 3, "10000 values"),
    Row(
        "recipe: fields",
        folded(text("".join(f"f{n}: {n}\n" for n in range(60_000)))),
        3,
        "10000 values",
    ),
    Row("recipe: deep", folded(text("a: " + "[" * 500 + "]" * 500)), 3, "nested deeper than 64 levels"),
    # The parser looks ahead; that of PyYAML 6.0.4 refuses more than 1,000 levels itself, in its own words.
    Row("recipe: deeper", folded(text("a: " + "[" * 9999 + "]" * 9999)), 3, "nest"),
    Row("recipe: no int", folded(text("recipe: !!int abc")), 3, "'abc' is no int"),
    Row("recipe: no date", folded(text("recipe: 2001-99-99")), 3, "2001-99-99"),
    Row("recipe: no timestamp", folded(text("recipe: !!timestamp x")), 3, "timestamp"),
    Row("recipe: object", folded(text("!!python/object/apply:os.system [ls]")), 3, "recipe.yml"),
    Row("recipe: itself", folded(text("a: &a [*a]")), 3, "recipe.yml"),
    Row("recipe: base 60", folded(text("recipe: 1" + ":59" * 9999)), 3, "digits"),
    Row("recipe: twice", folded(text("recipe: fold\nrecipe: fold\n")), 3, "twice"),
    Row("recipe: named by a list", folded(text("? [1]\n: 2\n")), 3, "recipe.yml"),
    Row("recipe: not UTF-8", folded(text(b"recipe: \xff")), 3, "recipe.yml"),
    # Scores, reports and plans
    Row("scores: pipe", scored(pipe), 3, "scores.json"),
    Row("scores: /dev/zero", scored(endless), 3, "scores.json"),
    Row("scores: deep", scored(text(DEEP)), 3, "nested deeper"),
    Row("scores: a list", scored(text("[]")), 3, "scores.json"),
    Row("scores: endless number", scored(text(f'{{"version": {DIGITS}}}')), 3, "scores.json"),
    Row("scores: nothing in it", scored(text('{"version": 1}')), 3, "scores.json"),
    Row("report: pipe", in_output("safemerge_report.json", pipe), 3, "safemerge_report.json"),
    Row("report: /dev/zero", in_output("safemerge_report.json", endless), 3, "safemerge_report.json"),
    Row("report: deep", in_output("safemerge_report.json", text(DEEP)), 3, "safemerge_report.json"),
    Row("report: a list", in_output("safemerge_report.json", text("[]")), 3, "safemerge_report.json"),
    Row("report: no fields", in_output("safemerge_report.json", text("{}")), 3, "safemerge_report.json"),
    Row("plan: pipe", in_output("safemerge_plan.json", pipe), 3),
    Row("plan: deep", in_output("safemerge_plan.json", text(DEEP)), 3),
    # Arguments
    Row("include: look-ahead", searched("--include", "(?=x)"), 2, "look-around"),
    Row("exclude: unbalanced", searched("--exclude", "(((("), 2, "regular expression"),
    Row("exclude: escape", searched("--exclude", "\x1b["), 2, "\\x1b["),
    Row("no such user", words("inspect", "~nosuchuser/model"), 3, "user"),
    Row("not UTF-8", words("inspect", b"/tmp/\xff\xfe"), 2, "not UTF-8"),
    Row("output: not UTF-8", lambda path: ["run", "x.yml", "-o", b"out\xff"], 2, "not UTF-8"),
    Row("escapes", words("inspect", "/nowhere/\x1b[31m\n\u202e"), 3, "\\x1b[31m\\n\\u202e"),
    Row("a long path", words("inspect", "/" + "a" * 5000), 3),
    Row("nothing", words("inspect", ""), 3),
    Row("a device", words("inspect", "/dev/zero"), 3, "neither a directory nor a regular file"),
    Row("no such option", words("inspect", "--\x1b[31m"), 2, "\\x1b[31m"),
    Row("threads", folded(lambda recipe: None, "--threads", str(10**12)), 2, "threads"),
    Row("budget", folded(lambda recipe: None, "--memory-budget", str(10**30)), 2, "size"),
]


# --- the server -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        code: Exit code; negative for a signal, None if it did not end in time.
        stdout: What it wrote.
        stderr: What it said.
        memory: Its largest resident memory above that of the bare command line, in bytes.
    """

    code: int | None
    stdout: str
    stderr: str
    memory: int


def serve() -> None:
    """Reads command lines as JSON from stdin, a line each, and answers with outcomes."""
    import safemerge_fast.__main__
    import safemerge_fast.cli.inspect
    import safemerge_fast.cli.run  # noqa: F401

    bare = _run(["--version"])["memory"]
    for line in sys.stdin:
        outcome = _run([os.fsencode(word) for word in json.loads(line)])
        outcome["memory"] -= bare
        print(json.dumps(outcome), flush=True)


def _run(arguments: Sequence[str | bytes]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.argv = ["safemerge-fast", *map(os.fsdecode, arguments)]
            from safemerge_fast.__main__ import main

            try:
                main()
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        deadline = time.monotonic() + PATIENCE
        done = 0
        while not done and time.monotonic() < deadline:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if not done:
                time.sleep(0.002)
        if not done:
            os.kill(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
        stdout.seek(0)
        stderr.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status) if done else None,
            "stdout": stdout.read().decode(errors="backslashreplace"),
            "stderr": stderr.read().decode(errors="backslashreplace"),
            "memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }


if __name__ == "__main__":
    serve()
