"""Files beside the weights that lead elsewhere, or are no files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import model

from safemerge_fast import CheckpointError
from safemerge_fast.checkpoint.model import open_model
from safemerge_fast.execution.companions import companion_files


def names(directory: Path) -> list[str]:
    return [name for _, name in companion_files(open_model("finetuned", directory))]


def test_what_lies_in_the_checkpoint_is_taken(tmp_path: Path) -> None:
    directory = model(tmp_path)
    (directory / "real.json").write_text("{}")
    (directory / "tokenizer.json").symlink_to("real.json")
    (directory / "vocab.txt").symlink_to(directory / "real.json")
    (directory / "LICENSE").write_text("free")
    (directory / "vocab.d").mkdir()
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "a.jinja").write_text("")
    expected = ["LICENSE", "additional_chat_templates/a.jinja", "tokenizer.json", "vocab.txt"]
    assert names(directory) == expected
    # The checkpoint itself may be reached by a link.
    (tmp_path / "link").symlink_to(directory)
    assert names(tmp_path / "link") == expected


def test_the_hub_s_cache_is_a_checkpoint(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    snapshot = model(repository / "snapshots", "0123abc")
    (repository / "blobs" / "cafe").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/cafe")
    assert names(snapshot) == ["tokenizer.json"]
    # Another repository's blobs are not this one's.
    other = tmp_path / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "beef").write_text("{}")
    (snapshot / "vocab.json").symlink_to(other / "beef")
    with pytest.raises(CheckpointError, match=r"vocab\.json is a link to .*private/blobs/beef, outside"):
        names(snapshot)


def leads_out(file: Path) -> None:
    (file.parent.parent / "secret").write_text("{}")
    file.symlink_to(file.parent.parent / "secret")


def leads_nowhere(file: Path) -> None:
    file.symlink_to(file.parent.parent / "nothing")


def is_a_pipe(file: Path) -> None:
    os.mkfifo(file)


def is_a_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def is_deep(file: Path) -> None:
    file.write_text("[" * 100_000)


def turns_round(file: Path) -> None:
    file.symlink_to(file)


@pytest.mark.parametrize("spoil", [leads_out, leads_nowhere, is_a_pipe, is_a_device, turns_round])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "merges.txt", "LICENSE", "vocab.txt"]
)
def test_what_leads_out_of_the_checkpoint_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], name: str
) -> None:
    directory = model(tmp_path)
    spoil(directory / name)
    with pytest.raises(CheckpointError) as caught:
        names(directory)
    assert str(directory / name) in str(caught.value)


def test_code_and_configuration_must_lie_there_too(tmp_path: Path) -> None:
    directory = model(tmp_path)
    (directory / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    (directory / "modeling.py").write_text("from .helper import x\n")
    leads_out(directory / "helper.py")
    with pytest.raises(CheckpointError, match=r"helper\.py is a link to .*secret, outside of the checkpoint"):
        names(directory)
    (directory / "helper.py").unlink()
    (directory / "helper.py").write_text("")
    assert names(directory) == ["helper.py", "modeling.py"]
    (directory / "config.json").rename(tmp_path / "config")
    (directory / "config.json").symlink_to(tmp_path / "config")
    with pytest.raises(CheckpointError, match=r"config\.json is a link"):
        names(directory)


def test_a_folder_that_leads_out(tmp_path: Path) -> None:
    directory = model(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key.pem").write_text("secret")
    (directory / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        names(directory)


def test_a_malformed_tokenizer_is_found_before_anything_is_written(tmp_path: Path) -> None:
    directory = model(tmp_path)
    is_deep(directory / "tokenizer_config.json")
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json cannot be read as JSON: it is nested deeper"
    ):
        names(directory)


@pytest.mark.parametrize("name", ["vocab.\udcff", "vocab.\n", "LICENSE\x1b[31m"])
def test_names_that_no_file_of_a_model_has(tmp_path: Path, name: str) -> None:
    directory = model(tmp_path)
    (directory / name).write_text("")
    with pytest.raises(CheckpointError) as caught:
        names(directory)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "line",
    ["\n" * 1_000_000, " " * 1_000_000, "from ." + "a" * 1_000_000, ("from " + " " * 999 + "\n") * 999],
)
def test_code_that_is_made_to_be_searched_for_long(tmp_path: Path, line: str) -> None:
    directory = model(tmp_path)
    (directory / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    (directory / "modeling.py").write_text(line + "\nfrom .helper import x\n  from . import other\nimport .x")
    for name in ("helper.py", "other.py", "x.py"):
        (directory / name).write_text("")
    assert names(directory) == ["helper.py", "modeling.py", "other.py", "x.py"]
