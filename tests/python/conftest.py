"""Makes small quartets of Llama checkpoints on disk: odd sizes, mixed dtypes, real task vectors.

The files are written by hand (a header of JSON, then the bytes): tests decide on tensor order, padding and
sharding, and nothing of the package under test takes part in making its own inputs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from protocol import World
    from torch import Tensor

ROLES = ("base", "aligned", "finetuned", "safe")

DTYPE_NAMES = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.int16": "I16",
    "torch.uint32": "U32",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, padded: bool = True) -> None:
    """Writes tensors in the mapping's order; padded=False misaligns the data by one byte."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks = []
    offset = 0
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if not padded:
        text += b" "  # one byte past a multiple of eight: no dtype wider than a byte is aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for data in chunks:
            file.write(data)


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
    padded: bool = True,
) -> Path:
    """Writes a checkpoint directory: one model.safetensors, or that many shards of like size and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, padded=padded)
        return directory
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    groups: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    done = 0
    for name, tensor in tensors.items():
        groups[min(shards - 1, done * shards // max(total, 1))][name] = tensor
        done += tensor.numel() * tensor.element_size()
    groups = [group for group in groups if group]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(directory / file, group, padded=padded)
        weight_map.update(dict.fromkeys(group, file))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return directory


def llama_config(
    *, hidden: int, vocabulary: int, layers: int, intermediate: int, dtype: str, tied: bool
) -> dict[str, Any]:
    """A configuration that LlamaForCausalLM loads: six heads, half as many for keys and values."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": dtype,
        "eos_token_id": 2,
        "head_dim": hidden // 6,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_hidden_layers": layers,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
    }


def write_quartet(
    path: Path,
    *,
    hidden: int = 72,
    vocabulary: int = 321,
    layers: int = 3,
    intermediate: int = 200,
    dtype: str = "bfloat16",
    shards: int = 3,
    tied: bool = True,
    stores_head: Collection[str] = (),
    roles: Collection[str] = ROLES,
    f32_norm: bool = True,
    i64_buffer: bool = True,
    padded: bool = True,
    seed: int = 0,
    task_scale: float = 0.2,
    edit: Callable[[str, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
    edit_config: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Path]:
    """Writes base, aligned, finetuned and safe Llama checkpoints under path/<role>.

    aligned = base + V, where V has rank 4 and a tenth of noise. The update of finetuned lies in V's column
    space in modules of even layers (high cosine) and is random in odd layers (low). safe = aligned + noise.

    Args:
        path: Parent directory; made when absent.
        hidden: Hidden size, a multiple of 6.
        vocabulary: Rows of the embedding.
        layers: Number of decoder layers.
        intermediate: Width of the MLP.
        dtype: "bfloat16", "float16" or "float32": the dtype of all but the norm and the buffer.
        shards: Number of files per checkpoint; with 1 there is no index.
        tied: Whether the configuration ties the head to the embedding (then no lm_head.weight is stored).
        stores_head: Roles that store lm_head.weight, a copy of the embedding, although it is tied.
        roles: Roles to write.
        f32_norm: Whether model.norm.weight is F32.
        i64_buffer: Whether there is an I64 buffer model.position_ids.
        padded: False misaligns all data by one byte.
        seed: Seed of all random numbers.
        task_scale: ‖V‖/‖W‖, about.
        edit: Called with role and tensors before they are written; may change them in place or return others.
        edit_config: Called with role and configuration before it is written.

    Returns:
        The directory of each role.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def gauss(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key_value = hidden // 2
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)

    quartet: dict[str, dict[str, Tensor]] = {role: {} for role in ROLES}
    stored = getattr(torch, dtype)
    for name, shape in shapes.items():
        base = 0.1 * gauss(*shape) + (1.0 if len(shape) == 1 else 0.0)
        scale = 0.1 * task_scale
        if len(shape) == 1:
            task, update = scale * gauss(*shape), 0.5 * scale * gauss(*shape)
        else:
            left = gauss(shape[0], 4) / 2
            task = scale * (left @ gauss(4, shape[1]) + 0.1 * gauss(*shape))
            inside = ".layers." in name and int(name.split(".")[2]) % 2 == 0
            update = 0.5 * scale * (left @ gauss(4, shape[1]) if inside else gauss(*shape))
        values = {
            "base": base,
            "aligned": base + task,
            "finetuned": base + task + update,
            "safe": base + task + 0.2 * scale * gauss(*shape),
        }
        kept = torch.float32 if f32_norm and name == "model.norm.weight" else stored
        for role in ROLES:
            quartet[role][name] = values[role].to(kept)
    paths = {}
    for role in roles:
        tensors = quartet[role]
        if i64_buffer:
            tensors["model.position_ids"] = torch.arange(128).reshape(1, 128)
        if role in stores_head:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config = llama_config(
            hidden=hidden,
            vocabulary=vocabulary,
            layers=layers,
            intermediate=intermediate,
            dtype=dtype,
            tied=tied,
        )
        if edit is not None:
            tensors = edit(role, tensors) or tensors
        if edit_config is not None:
            edit_config(role, config)
        directory = write_checkpoint(path / role, tensors, config, shards=shards, padded=padded)
        (directory / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}\n')
        (directory / "tokenizer_config.json").write_text(f'{{"made_for": "{role}"}}\n')
        paths[role] = directory
    return paths


@pytest.fixture(scope="session")
def make_quartet() -> Callable[..., dict[str, Path]]:
    """The function write_quartet: `make_quartet(path, **options) -> {role: directory}`."""
    return write_quartet


@pytest.fixture(scope="session")
def quartet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quartet with the default options, made once a session: read it, never change it."""
    return write_quartet(tmp_path_factory.mktemp("quartet"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Inputs and undisturbed outputs for tests that disturb the making of one; two servers fork the runs."""
    from forking import Server
    from protocol import World, quick_directory

    with quick_directory(tmp_path_factory) as path, Server() as one, Server() as two:
        yield World(path, [one, two])
