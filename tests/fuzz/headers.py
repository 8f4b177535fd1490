"""Damaged checkpoints of every kind: python -m tests.fuzz.headers --cases 100000 [--seed N]

With the library gguf, files that the check of GGUF headers accepts are read by it, too.
"""

from __future__ import annotations

import contextlib
import random
import struct
import tempfile
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from parallel.comfyui import gguf_header
from parallel.diffusers.folder import CONFIG, read_config
from parallel.diffusers.tensors import mapped
from parallel.errors import CheckpointError, UnsupportedError
from tests.fuzz.mutations import damaged_bytes, damaged_json, text_of
from tests.fuzz.runs import main

_FILE = "diffusion_pytorch_model.safetensors"
_SHARDS = ("a.safetensors", "b.safetensors")
_KINDS = ("safetensors", "safetensors", "index", "config", "gguf", "gguf")


def read_damaged(random_: random.Random) -> bool:
    """One file, in a folder of its own; whether it was accepted."""
    kind, folder = random_.choice(_KINDS), _folder()
    try:
        if kind == "gguf":
            return _read_gguf(random_, folder / "model.gguf")
        if kind == "config":
            (folder / CONFIG).write_bytes(_damaged(random_, _config()))
            read_config(str(folder))
            return True
        index = folder / f"{_FILE}.index.json"
        index.unlink(missing_ok=True)
        if kind == "index":
            index.write_bytes(_damaged(random_, _index()))
        else:
            _write(folder / _FILE, _damaged_safetensors(random_))
        for tensor in mapped(str(folder)).values():
            tensor.clone()  # touches every byte: those outside the file would end this process
    except (CheckpointError, UnsupportedError) as error:
        assert str(folder) in str(error), f"no file is named: {error}"
        assert len(str(error)) < 2000
        return False
    return True


def gguf_file() -> bytes:
    """A small one, with a value of each kind."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("flux"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("list") + struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3),
        text("texts") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("real") + struct.pack("<Id", 12, 0.5),
    ]
    tensors = [
        text("a.weight") + struct.pack("<I2QIQ", 2, 32, 2, 8, 0),  # Q8_0
        text("b.weight") + struct.pack("<IQIQ", 1, 4, 0, 96),  # F32
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join([*pairs, *tensors])
    return header + bytes(-len(header) % 32) + bytes(96 + 16)


def _read_gguf(random_: random.Random, path: Path) -> bool:
    _write(path, damaged_bytes(random_, gguf_file()))
    gguf_header.check(str(path))
    if util.find_spec("gguf"):
        with contextlib.suppress(Exception):  # `gguf.read` refuses what it raises
            import_module("gguf").GGUFReader(path)
    return True


def _damaged_safetensors(random_: random.Random) -> bytes:
    content = _safetensors()
    if random_.random() < 0.5:
        return damaged_bytes(random_, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = _damaged(random_, _header())
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _damaged(random_: random.Random, document: Any) -> bytes:
    for _ in range(random_.choice((1, 1, 2))):
        document = damaged_json(random_, document)
    text = text_of(document)
    return damaged_bytes(random_, text) if random_.random() < 0.4 else text


def _write(path: Path, content: bytes) -> None:
    """As a new file: the one before may be mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@cache
def _safetensors() -> bytes:
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)}
    return save(tensors, metadata={"format": "pt"})


@cache
def _header() -> Any:
    import json

    content = _safetensors()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def _index() -> Any:
    return {"metadata": {"total_size": 32}, "weight_map": {"a.weight": _SHARDS[0], "b": _SHARDS[1], "c": _SHARDS[0]}}


def _config() -> Any:
    return {"_class_name": "WanTransformer3DModel", "num_layers": 1, "patch_size": [1, 2, 2], "eps": 1e-6, "x": None}


@cache
def _folder() -> Path:
    """Removed when Python ends."""
    folder = Path(_temporary.name)
    for name in _SHARDS:
        (folder / name).write_bytes(save({name: torch.ones(2)}))
    return folder


_temporary = tempfile.TemporaryDirectory()


if __name__ == "__main__":
    main(read_damaged)
