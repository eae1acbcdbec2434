"""Servers that misbehave: what changes under a merge, is cut short, refused, or cannot be read by ranges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_quartet
from invoke import assert_one_sentence, merge_words, run
from stores import SECRET, Handler, Server, environment, http_server, tag


@pytest.fixture
def server() -> Iterator[Server]:
    with http_server() as server:
        yield server


@pytest.fixture(scope="module")
def quartet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_quartet(tmp_path_factory.mktemp("servers"))


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def addresses(server: Server, quartet: dict[str, Path]) -> dict[str, str]:
    return {role: server.add(role, path) for role, path in quartet.items()}


def words(roles: dict[str, str], output: Path, *more: str) -> list[str | Path]:
    return merge_words(dict(roles), output, *more)  # type: ignore[arg-type]


def test_a_plain_server_with_ranges_serves_models(
    server: Server, quartet: dict[str, Path], tmp_path: Path
) -> None:
    urls = addresses(server, quartet)
    assert run(*merge_words(quartet, tmp_path / "files")).exit_code == 0
    result = run(*words(urls, tmp_path / "merged"))
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "merged") == weights(tmp_path / "files")
    assert (tmp_path / "merged" / "config.json").read_bytes() == (
        quartet["finetuned"] / "config.json"
    ).read_bytes()


def test_headers_are_all_that_inspect_reads(server: Server, quartet: dict[str, Path]) -> None:
    url = server.add("base", quartet["base"])
    result = run("inspect", url, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["path"] == url
    for file in document["files"]:
        # One request: these headers are short.
        assert server.gets(f"/{file['file']}") == 1


def test_data_is_read_about_once(server: Server, quartet: dict[str, Path], tmp_path: Path) -> None:
    urls = addresses(server, quartet)
    size = sum(
        path.stat().st_size
        for role in ("base", "aligned", "finetuned")
        for path in quartet[role].glob("*.safetensors")
    )
    three = [word for role in ("base", "aligned", "finetuned") for word in (f"--{role}", urls[role])]
    result = run("analyze", *three, "-o", tmp_path / "scores.json")
    assert result.exit_code == 0, result.stderr
    # Headers, a sample, and every block once while its file is open; these models are a block each.
    assert server.sent < 6 * size


def test_a_change_in_the_midst_of_a_merge_is_an_error(
    server: Server, quartet: dict[str, Path], tmp_path: Path
) -> None:
    urls = addresses(server, quartet)
    name = sorted(path.name for path in quartet["safe"].glob("*.safetensors"))[0]
    asked = 0

    def change(handler: Handler, path: str, body: bytes) -> bool:
        nonlocal asked
        if path == f"/safe/{name}" and handler.command == "GET":
            asked += 1
            if asked == 2:
                # The header was read; from here on it is another object of the same size.
                server.objects[path] = body[:-1] + bytes([body[-1] ^ 1])
                server.odd = None
                handler.do_GET()
                return True
        return False

    server.odd = change
    result = run(*words(urls, tmp_path / "merged"))
    assert result.exit_code == 3, result.stderr
    assert_one_sentence(result, f"{urls['safe']}/{name}", "its ETag differs")
    assert not (tmp_path / "merged").exists()


def test_an_etag_is_compared_though_the_server_ignores_conditions(
    server: Server, quartet: dict[str, Path], tmp_path: Path
) -> None:
    urls = addresses(server, quartet)
    seen = 0

    def ignore(handler: Handler, path: str, body: bytes) -> bool:
        nonlocal seen
        del handler.headers["If-Match"]
        if path.startswith("/base/") and path.endswith(".safetensors") and handler.command == "GET":
            seen += 1
            if seen == len(list(quartet["base"].glob("*.safetensors"))) + 1:
                server.objects[path] = body[:-1] + bytes([body[-1] ^ 1])
        return False

    server.odd = ignore
    result = run(*words(urls, tmp_path / "merged"))
    assert result.exit_code == 3
    assert_one_sentence(result, "its ETag differs", urls["base"])


@pytest.mark.parametrize("honest", [True, False])
def test_a_body_that_is_cut_is_asked_for_again(
    server: Server, quartet: dict[str, Path], tmp_path: Path, honest: bool
) -> None:
    urls = addresses(server, quartet)
    assert run(*merge_words(quartet, tmp_path / "files")).exit_code == 0
    cut: set[str] = set()

    def cut_once(handler: Handler, path: str, body: bytes) -> bool:
        asked = handler.headers.get("Range")
        if handler.command != "GET" or asked is None or asked.startswith("bytes=0-65535") or path in cut:
            return False
        cut.add(path)
        start, end = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        end = min(end + 1, len(body))
        part = body[start : start + (end - start) // 2]
        headers = {"ETag": tag(body), "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        # Dishonest: what it says that it sends is less than what it was asked for.
        handler.answer(206, part, headers, end - start if honest else None)
        handler.close_connection = True
        return True

    server.odd = cut_once
    result = run(*words(urls, tmp_path / "merged"))
    assert result.exit_code == 0, result.stderr
    assert cut
    assert weights(tmp_path / "merged") == weights(tmp_path / "files")


def test_a_body_that_stays_short_is_an_error(server: Server, quartet: dict[str, Path]) -> None:
    url = server.add("base", quartet["base"])

    def cut(handler: Handler, path: str, body: bytes) -> bool:
        if not path.endswith("00001-of-00003.safetensors") or handler.command == "HEAD":
            return False
        end = min(1 << 16, len(body))
        headers = {"ETag": tag(body), "Content-Range": f"bytes 0-{end - 1}/{len(body)}"}
        handler.answer(206, body[: end // 2], headers)
        return True

    server.odd = cut
    result = run("inspect", url)
    assert result.exit_code == 3
    assert_one_sentence(result, "00001-of-00003.safetensors", "bytes that were asked for")


def test_a_server_without_ranges_is_refused(server: Server, quartet: dict[str, Path]) -> None:
    url = server.add("base", quartet["base"])

    def whole(handler: Handler, path: str, body: bytes) -> bool:
        del handler.headers["Range"]
        return False

    server.odd = whole
    result = run("inspect", url)
    assert result.exit_code == 3
    assert_one_sentence(result, url, "does not serve ranges")


def test_a_server_without_etags_is_refused(server: Server, quartet: dict[str, Path]) -> None:
    url = server.add("base", quartet["base"])
    server.etags = False
    result = run("inspect", url)
    assert result.exit_code == 3
    assert_one_sentence(result, url, "no ETag")


def test_code_on_a_plain_server_is_refused(server: Server, quartet: dict[str, Path]) -> None:
    url = server.add("base", quartet["base"])
    server.objects["/base/config.json"] = b'{"auto_map": {"AutoModel": "modeling.Model"}}'
    result = run("inspect", url)
    assert result.exit_code == 3
    assert_one_sentence(result, f"{url}/config.json", "auto_map")


def test_a_web_page_is_no_model(server: Server, quartet: dict[str, Path]) -> None:
    server.objects["/x/model.safetensors"] = b"<!DOCTYPE html><html>please log in</html>"
    result = run("inspect", f"{server.url}/x/model.safetensors")
    assert result.exit_code == 3
    assert_one_sentence(result, f"{server.url}/x/model.safetensors", "web page")
    server.objects["/y/model.safetensors"] = b""
    result = run("inspect", f"{server.url}/y/model.safetensors")
    assert result.exit_code == 3
    assert_one_sentence(result, "it has only 0 bytes")


@pytest.mark.parametrize(
    ("status", "code", "parts"),
    [
        (403, "AccessDenied", ("403 AccessDenied", "s3:GetObject", "s3:ListBucket")),
        (403, "SignatureDoesNotMatch", ("403 SignatureDoesNotMatch",)),
        (401, "InvalidToken", ("does not accept the credentials", "AWS_ACCESS_KEY_ID")),
        (301, "PermanentRedirect", ("AWS_REGION",)),
        (400, "AuthorizationHeaderMalformed", ("AWS_REGION",)),
    ],
)
def test_what_a_store_refuses_is_said_in_a_line_without_secrets(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int, code: str, parts: tuple[str, ...]
) -> None:
    for name, value in environment(server.url).items():
        monkeypatch.setenv(name, value)

    def refuse(handler: Handler, path: str, body: bytes) -> bool:
        # Stores quote keys and what was signed in their answers.
        text = (
            f"<Error><Code>{code}</Code><AWSAccessKeyId>AKIATESTONLY</AWSAccessKeyId><X>{SECRET}</X></Error>"
        )
        handler.answer(status, text.encode())
        return True

    server.odd = refuse
    result = run("inspect", "s3://bucket/model")
    assert result.exit_code == 3
    assert_one_sentence(result, "s3://bucket/model", *parts)
    assert SECRET not in result.stderr
    assert "AKIATESTONLY" not in result.stderr


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment(""):
        monkeypatch.delenv(name, raising=False)
    # Where a machine's own role is asked for: nobody listens there.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    result = run("inspect", "s3://bucket/model")
    assert result.exit_code == 3
    assert_one_sentence(result, "s3://bucket/model", "no usable credentials", "AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    assert_one_sentence(run("inspect", "az://container/model"), "AZURE_STORAGE_ACCOUNT_NAME")


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("inspect", "http://nobody.invalid/model.safetensors")
    assert result.exit_code == 3
    assert_one_sentence(result, "http://nobody.invalid/", "lookup")


def test_large_tensors_are_read_by_blocks_and_about_once(server: Server, tmp_path: Path) -> None:
    import torch
    from conftest import llama_config, write_checkpoint
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(1)
    urls, models = {}, {}
    for name in ("one", "two"):
        tensors = {
            "model.embed_tokens.weight": torch.randn(6000, 1024, generator=generator),
            "model.layers.0.input_layernorm.weight": torch.randn(1024, generator=generator),
            "model.layers.0.mlp.up_proj.weight": torch.randn(3000, 1024, generator=generator),
            "model.norm.weight": torch.randn(1024, generator=generator),
        }
        config = llama_config(
            hidden=1024, vocabulary=6000, layers=1, intermediate=3000, dtype="float32", tied=True
        )
        models[name] = write_checkpoint(tmp_path / name, tensors, config)
        urls[name] = server.add(name, models[name])
    size = (models["one"] / "model.safetensors").stat().st_size
    for method, more in (("linear", ""), ("ties", f"base_model: {urls['one']}\n")):
        density = ", density: 0.6" if more else ""
        config_file = tmp_path / f"{method}.yml"
        config_file.write_text(
            f"merge_method: {method}\ndtype: float32\n{more}models:\n"
            + "".join(
                f"  - model: {url}\n    parameters: {{weight: 0.5{density}}}\n"
                for url in list(urls.values())[bool(more) :]
            )
        )
        server.asked.clear()
        server.sent = 0
        result = run("run", config_file, "-o", tmp_path / method, "--threads", "2")
        assert result.exit_code == 0, result.stderr
        if method == "linear":
            merged = load_file(tmp_path / method / "model.safetensors")
            one, two = (load_file(models[name] / "model.safetensors") for name in ("one", "two"))
            for name, tensor in merged.items():
                expected = ((one[name].double() + two[name].double()) / 2).float()
                torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
        # Blocks of 8 MiB, the header, and small tensors that are read by themselves; no byte twice, but for these.
        for name in urls:
            assert server.gets(f"/{name}/model.safetensors") <= size // (8 << 20) + 1 + 6
        assert server.sent < 2.2 * size
