"""Headers of damaged and hostile checkpoints: refused at once, without memory, by a text that names the file."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parallel.comfyui import gguf_header
from parallel.diffusers.folder import CONFIG, read_config
from parallel.diffusers.tensors import mapped
from parallel.errors import CheckpointError
from parallel.headers import LONGEST
from tests.fuzz.headers import gguf_file
from tests.fuzz.runs import Costs

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"


def safetensors(header: bytes, data: int = 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def described(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def many(entry: bytes, count: int) -> bytes:
    return b"{" + b",".join(b'"%x":%b' % (number, entry) for number in range(count)) + b"}"


EMPTY = b'{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
TWICE = b'{"a":%b,"a":%b}' % (json.dumps(tensor()).encode(), json.dumps(tensor(shape=(1, 2))).encode())

BY_THE_LIBRARY = {
    "overlap": safetensors(described(a=tensor(), b=tensor())),
    "a hole": safetensors(described(a=tensor(), b=tensor(offsets=(16, 24))), 24),
    "reversed": safetensors(described(a=tensor(offsets=(8, 0)))),
    "beyond the file": safetensors(described(a=tensor(shape=(200,), offsets=(0, 800)))),
    "bytes behind": safetensors(described(a=tensor()), 80),
    "overflow": safetensors(described(a=tensor(shape=(1 << 40, 1 << 40)))),
    "overflow to 0": safetensors(described(a=tensor(shape=(1 << 62, 4), offsets=(0, 0))), 0),
    "negative": safetensors(described(a=tensor(shape=(-2,)))),
    "unknown dtype": safetensors(described(a=tensor("Q9"))),
    "a list": safetensors(b"[]"),
    "null": safetensors(b"null"),
    "metadata of numbers": safetensors(b'{"__metadata__":{"x":1}}', 0),
}
"""What the safetensors library refuses by itself."""
BY_US = {
    "empty": b"",
    "short": b"\0\0\0",
    "a header of 2^63 bytes": safetensors(b"{}", length=1 << 63),
    "a header of 2^64 - 1 bytes": safetensors(b"{}", length=(1 << 64) - 1),
    "a long header": safetensors(b'{"__metadata__":{"x":"' + b"x" * LONGEST + b'"}}', 0),
    "not UTF-8": safetensors(b'{"\xff":1}'),
    "deep": safetensors(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "a name twice": safetensors(TWICE),
    "metadata twice": safetensors(b'{"__metadata__":{"x":"1","x":"2"},"a":%b}' % json.dumps(tensor()).encode()),
    "overflow of nothing": safetensors(described(a=tensor(shape=(0, 1 << 63), offsets=(0, 0))), 0),
    "many dims": safetensors(described(a=tensor(shape=[1] * 100_000 + [2]))),
    "many tensors": safetensors(many(EMPTY, 100_000), 0),
    "10 million keys": safetensors(many(b"0", 10_000_000)),
    "much metadata": safetensors(b'{"__metadata__":%b}' % many(b'""', 500_000), 0),
}
"""What is checked before; the library would accept some of it, some in seconds and with 1 GB of memory."""


def refused(call: Callable[[], Any], path: Path) -> str:
    """What it says; in little time and memory."""
    with Costs() as costs, pytest.raises(CheckpointError) as error:
        call()
    assert costs.seconds < 1
    assert costs.memory < 100 << 20
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 500
    return str(error.value)


@pytest.mark.parametrize("case", [*BY_THE_LIBRARY, *BY_US])
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / FILE
    path.write_bytes((BY_THE_LIBRARY | BY_US)[case])
    if case in BY_THE_LIBRARY:
        with pytest.raises(SafetensorError):
            safe_open(path, framework="pt")
    assert FILE in refused(lambda: mapped(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_without_one_of_pytorch_is_refused(tmp_path: Path, dtype: str) -> None:
    (tmp_path / FILE).write_bytes(safetensors(described(a=tensor(dtype, (4,), (0, 3))), 3))
    assert dtype in refused(lambda: mapped(str(tmp_path)), tmp_path)


def test_a_large_header_is_accepted(tmp_path: Path) -> None:
    """More tensors than any network has, and a picture in its metadata."""
    tensors = {f"model.diffusion_model.blocks.{number}.weight": torch.ones(1, 1) for number in range(10_000)}
    save_file(tensors, tmp_path / FILE, metadata={"modelspec.thumbnail": "x" * 2_000_000})
    assert len(mapped(str(tmp_path))) == 10_000


@pytest.mark.parametrize("name", [FILE, CONFIG, INDEX])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    if name != FILE:
        save_file({"a": torch.ones(1)}, tmp_path / FILE)
    os.mkfifo(tmp_path / name)
    read = read_config if name == CONFIG else mapped
    assert "not a regular file" in refused(lambda: read(str(tmp_path)), tmp_path)


JSON = {
    "endless": None,
    "empty": b"",
    "not UTF-8": b'{"_class_name": "\xff"}',
    "deep": b'{"x":' * 100_000,
    "a name twice": b'{"_class_name": "A", "_class_name": "B"}',
    "long": b'{"x": "' + b"x" * LONGEST + b'"}',
    "10 million keys": many(b"0", 10_000_000),
    "many lists": b'{"x": [' + b"[]," * 1_000_000 + b"[]]}",
}


@pytest.mark.parametrize("name", [CONFIG, INDEX])
@pytest.mark.parametrize("case", JSON)
def test_a_damaged_json_file_is_refused(tmp_path: Path, name: str, case: str) -> None:
    path = tmp_path / name
    if (content := JSON[case]) is None:
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(content)
    assert name in refused(lambda: (read_config if name == CONFIG else mapped)(str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "b/x.safetensors", "..", ".", "", "a\0b", "\ud800", "a" * 256]
)
def test_an_index_names_only_files_of_its_folder(tmp_path: Path, name: str) -> None:
    for place in ("x.safetensors", "b/x.safetensors", "folder/b/x.safetensors"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.ones(1)}, tmp_path / place)
    folder = tmp_path / "folder"
    for each in (name, str(tmp_path / "x.safetensors")):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": each}}))
        assert re.search("no file|not a regular file", refused(lambda: mapped(str(folder)), folder))


def test_a_shard_may_be_a_link(tmp_path: Path) -> None:
    """The cache of Hugging Face's hub has nothing else."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "folder").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "blobs" / "0")
    (tmp_path / "folder" / "x.safetensors").symlink_to("../blobs/0")
    (tmp_path / "folder" / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert mapped(str(tmp_path / "folder"))["a"].item() == 1


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return gguf(keys=1, rest=text(b"key") + struct.pack("<IIQ", 9, kind, count) + rest)


def of_shape(*shape: int, offset: int = 0) -> bytes:
    return gguf(1, rest=text(b"a") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset) + bytes(100))


GGUF = {
    "empty": b"",
    "another file": b"GGML" + bytes(100),
    "only the start": b"GGUF",
    "another version": gguf(version=1),
    "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^63 keys": gguf(keys=1 << 63),
    "2^64 - 1 tensors": gguf((1 << 64) - 1),
    "a key of 2^63 bytes": gguf(keys=1, rest=text(b"key", 1 << 63)),
    "a key of a GB": gguf(keys=1, rest=text(b"x" * (LONGEST + 1))),
    "an array of 2^60 bytes": array(0, 1 << 60),
    "an array of 2^60 texts": array(8, 1 << 60),
    "arrays in arrays": array(9, 1, struct.pack("<IQ", 9, 1) * 10_000),
    "a long vocabulary": array(8, 1_000_000, text(b"a") * 1_000_000),
    "a type that does not exist": gguf(keys=1, rest=text(b"key") + struct.pack("<IQ", 77, 0)),
    "a key twice": gguf(keys=2, rest=(text(b"key") + struct.pack("<IB", 0, 1)) * 2),
    "a tensor twice": gguf(2, rest=(text(b"a") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2),
    "a key that is no text": gguf(keys=1, rest=text(b"\xff") + struct.pack("<IB", 0, 1)),
    "5 dims": of_shape(1, 1, 1, 1, 1),
    "overflow": of_shape(1 << 32, 1 << 32),
    "an offset outside": of_shape(1, offset=1 << 40),
    "2^32 - 1 dims": gguf(1, rest=text(b"a") + struct.pack("<I", (1 << 32) - 1)),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_damaged_gguf_file_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF[case])
    refused(lambda: gguf_header.check(str(path)), path)


def test_every_part_of_a_gguf_header_is_needed(tmp_path: Path) -> None:
    path, whole = tmp_path / "model.gguf", gguf_file()
    path.write_bytes(whole)
    gguf_header.check(str(path))
    header = whole.index(b"b.weight") + 8 + struct.calcsize("<IQIQ")
    for length in range(header):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            gguf_header.check(str(path))
