"""Models in object stores: moto's S3 server gives the bytes, and a merge of files says what they should become."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROLES, write_quartet
from invoke import assert_one_sentence, merge_words, run
from lora import write_lora
from stores import SECRET, Bucket, Handler, environment, http_server, s3_server

import safemerge_fast as sf

pytest.importorskip(
    "moto", reason="moto, the S3 server of these tests, is not installed (pip install '.[dev]')"
)
pytest.importorskip("flask", reason="moto's server needs flask (pip install '.[dev]')")

SHAPES = {"model.layers.0.self_attn.q_proj": (72, 72), "model.layers.1.mlp.down_proj": (72, 200)}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def world(
    s3: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], dict[str, str], Bucket]:
    """A quartet on disk and its copy in a bucket, with a tokenizer and code beside the fine-tuned model."""
    directory = tmp_path_factory.mktemp("remote")
    quartet = write_quartet(directory / "models")
    for name, text in (
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "{}"),
        ("LICENSE", "free"),
        ("notes.log", "not for anybody"),
    ):
        (quartet["finetuned"] / name).write_text(text)
    templates = quartet["finetuned"] / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}")
    bucket = Bucket(s3, "models")
    return quartet, {role: bucket.add(f"quartet/{role}", path) for role, path in quartet.items()}, bucket


@pytest.fixture(autouse=True)
def _environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def expected(
    world: tuple[dict[str, Path], dict[str, str], Bucket], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The merge of the files."""
    output = tmp_path_factory.mktemp("expected") / "merged"
    assert run(*merge_words(world[0], output)).exit_code == 0
    return output


def contents(directory: Path) -> dict[str, bytes]:
    """The files of an output but for those that say where and when."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith("safemerge_") and path.name != "README.md"
    }


def words(roles: dict[str, str | Path], output: Path, *more: str) -> list[str | Path]:
    return merge_words(roles, output, *more)  # type: ignore[arg-type]


def test_a_merge_from_a_store_equals_the_merge_from_files(
    world: tuple[dict[str, Path], dict[str, str], Bucket], expected: Path, tmp_path: Path
) -> None:
    _, urls, _ = world
    output = tmp_path / "merged"
    result = run(*words(dict(urls), output))
    assert result.exit_code == 0, result.stderr
    found = contents(output)
    assert found == contents(expected)
    assert {
        "tokenizer.json",
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "config.json",
    } <= found.keys()
    assert "notes.log" not in found
    # What is written down says where the models lie, and no secret.
    for path in output.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert SECRET.encode() not in text, path
            assert b"AKIATESTONLY" not in text, path
            assert tempfile.gettempdir().encode() + b"/safemerge-" not in text, path
    plan = json.loads((output / "safemerge_plan.json").read_bytes())
    for role, source in plan["sources"].items():
        assert source["path"] == urls[role]
        for facts in source["files"].values():
            assert facts["etag"].startswith('"')
            assert "inode" not in facts
    report = json.loads((output / "safemerge_report.json").read_bytes())
    assert report["inputs"]["base"]["path"] == urls["base"]
    assert run("verify", output).exit_code == 0


@pytest.mark.parametrize("role", ROLES)
def test_any_role_may_be_remote(
    world: tuple[dict[str, Path], dict[str, str], Bucket], expected: Path, tmp_path: Path, role: str
) -> None:
    quartet, urls, _ = world
    output = tmp_path / "merged"
    result = run(*words({**quartet, role: f"{urls[role]}/"}, output))
    assert result.exit_code == 0, result.stderr
    assert contents(output) == contents(expected)


def test_several_passes_and_a_budget(
    world: tuple[dict[str, Path], dict[str, str], Bucket], tmp_path: Path
) -> None:
    quartet, urls, _ = world
    more = ("--method", "ties", "--memory-budget", "64MB", "--threads", "2")
    for name, roles in (("files", dict(quartet)), ("store", dict(urls))):
        result = run(*words(dict(roles), tmp_path / name, *more))
        assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "files") == contents(tmp_path / "store")


def test_adapters_and_single_files(
    world: tuple[dict[str, Path], dict[str, str], Bucket], tmp_path: Path
) -> None:
    quartet, urls, bucket = world
    adapter = write_lora(tmp_path / "adapter", SHAPES, rank=4, seed=1)
    url = bucket.add("adapter", adapter)
    for name, base, given in (
        ("files", str(quartet["aligned"]), str(adapter)),
        ("store", urls["aligned"], url),
        ("weights", urls["aligned"], f"{url}/adapter_model.safetensors"),
    ):
        config = tmp_path / f"{name}.yml"
        config.write_text(f"recipe: fold\nmodel: {base}\nadapter: {given}\n")
        result = run("run", config, "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "files") == contents(tmp_path / "store") == contents(tmp_path / "weights")
    result = run("check", url, urls["aligned"])
    assert result.exit_code == 0, result.stderr
    shown = run("inspect", url, "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["path"] == url

    single = write_quartet(tmp_path / "single", shards=1, roles=("base",))["base"]
    place = bucket.add("single", single)
    for address in (place, f"{place}/model.safetensors"):
        result = run("inspect", address, "--json")
        assert result.exit_code == 0, result.stderr
        here = json.loads(run("inspect", single, "--json").stdout)
        assert json.loads(result.stdout) == {**here, "path": address}


def test_analyze_dry_run_and_scores(
    world: tuple[dict[str, Path], dict[str, str], Bucket], expected: Path, tmp_path: Path
) -> None:
    quartet, urls, _ = world
    three = ("base", "aligned", "finetuned")
    scored = {}
    for name, roles in (("files", quartet), ("store", urls)):
        given = [word for role in three for word in (f"--{role}", str(roles[role]))]
        file = tmp_path / f"{name}.json"
        result = run("analyze", *given, "-o", file)
        assert result.exit_code == 0, result.stderr
        scored[name] = json.loads(file.read_text())
    assert scored["files"]["modules"] == scored["store"]["modules"]
    assert scored["store"]["sources"]["base"]["path"] == urls["base"]
    result = run(*words(dict(urls), tmp_path / "merged", "--scores", str(tmp_path / "files.json")))
    assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "merged") == contents(expected)
    dry = run(*words(dict(urls), tmp_path / "dry", "--dry-run"))
    assert dry.exit_code == 0
    assert not (tmp_path / "dry").exists()


def test_recipes_in_files(
    world: tuple[dict[str, Path], dict[str, str], Bucket], expected: Path, tmp_path: Path
) -> None:
    _, urls, _ = world
    config = tmp_path / "merge.yml"
    config.write_text("recipe: safemerge\n" + "".join(f"{role}: {url}\n" for role, url in urls.items()))
    result = run("run", config, "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "merged") == contents(expected)
    config.write_text(
        "merge_method: linear\ndtype: bfloat16\nmodels:\n"
        + "".join(
            f"  - model: {urls[role]}\n    parameters: {{weight: 0.5}}\n" for role in ("aligned", "safe")
        )
    )
    result = run("run", config, "-o", tmp_path / "linear")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("s3://models/quartet/nobody", "nothing is listed below it"),
        ("s3://nobucket/quartet/base", "no bucket nobucket"),
        ("s3://models/quartet/base/nothing.safetensors", "no such object"),
        ("s3://someone:secret@models/quartet/base", "may hold no user or password"),
        ("s3://models/quartet/base?X-Amz-Signature=secret", "may hold no query"),
        ("https://host/x/model.safetensors?sig=secret#top", "may hold no query"),
        ("ftp://host/secretless", "s3://, gs://, az://, http:// and https://"),
        ("s3://models/../quartet", "`..`"),
        ("s3:///quartet", "names no bucket"),
    ],
)
def test_what_is_not_there_or_no_address_is_refused_in_a_line(
    world: tuple[dict[str, Path], dict[str, str], Bucket], address: str, part: str
) -> None:
    result = run("inspect", address)
    assert result.exit_code == 3
    assert_one_sentence(result, part)
    assert "=secret" not in result.stderr
    assert ":secret" not in result.stderr
    assert SECRET not in result.stderr


@pytest.mark.parametrize("option", ["-o", "--scores"])
def test_outputs_and_documents_are_paths_of_this_machine(
    world: tuple[dict[str, Path], dict[str, str], Bucket], option: str
) -> None:
    given = [word for role, path in world[0].items() for word in (f"--{role}", path)]
    output = [] if option == "-o" else ["-o", "somewhere"]
    result = run("merge", *given, *output, option, "s3://user:secret@models/merged?sig=secret")
    assert result.exit_code == 2
    assert "s3://models/merged" in result.stderr
    assert "secret" not in result.stderr
    result = run(
        "analyze", "-o", "s3://models/scores.json", "--base", "b", "--aligned", "a", "--finetuned", "f"
    )
    assert result.exit_code == 2
    assert "nothing is written elsewhere" in result.stderr
    result = run("verify", "s3://models/merged")
    assert result.exit_code == 2, result.stderr


def test_a_changed_object_is_noticed(
    world: tuple[dict[str, Path], dict[str, str], Bucket], tmp_path: Path
) -> None:
    quartet, _, bucket = world
    url = bucket.add("changing", quartet["safe"])
    roles: dict[str, str | Path] = {**quartet, "safe": url}
    assert run(*words(roles, tmp_path / "merged")).exit_code == 0
    # Another content of the same size under the same name: only the ETag says so.
    file = sorted(quartet["safe"].glob("*.safetensors"))[-1]
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    bucket.client.put_object(Bucket=bucket.name, Key=f"changing/{file.name}", Body=bytes(changed))
    result = run("verify", tmp_path / "merged")
    assert result.exit_code == 3, result.stderr
    assert_one_sentence(result, f"{url}/{file.name}", "its ETag differs")


def test_nothing_is_left_behind(
    world: tuple[dict[str, Path], dict[str, str], Bucket], tmp_path: Path
) -> None:
    _, urls, _ = world
    code = "import sys; from safemerge_fast.__main__ import main; sys.exit(main())"
    given = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", urls[role])]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, "analyze", *given, "-o", str(tmp_path / "scores.json"), "-vv"],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(
    world: tuple[dict[str, Path], dict[str, str], Bucket], tmp_path: Path, number: signal.Signals
) -> None:
    quartet, _, _ = world
    waiting = threading.Event()
    with http_server() as server:

        def wait(handler: Handler, path: str, body: bytes) -> bool:
            if path.endswith(".safetensors"):
                waiting.set()
                time.sleep(2)
            return False

        url = server.add("base", quartet["base"])
        server.odd = wait
        process = subprocess.Popen(
            [sys.executable, "-m", "safemerge_fast", "inspect", url],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        assert waiting.wait(60)
        assert any(tmp_path.iterdir())
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == b"error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_python_takes_addresses(
    world: tuple[dict[str, Path], dict[str, str], Bucket], expected: Path, tmp_path: Path
) -> None:
    _, urls, _ = world
    report = sf.merge(output=tmp_path / "merged", **urls)
    assert contents(tmp_path / "merged") == contents(expected)
    assert report is not None
