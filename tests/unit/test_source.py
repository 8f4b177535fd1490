"""Model files: what their headers tell, and what damaged ones are told."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.errors import CheckpointError, UnsupportedError


def network(count: int = 6) -> dict[str, Tensor]:
    """Enough tensors for a prefix to be told from a coincidence."""
    return {f"blocks.{i}.weight": torch.full((i + 1, 2), float(i)) for i in range(count)}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def read_all(source: Source) -> dict[str, Tensor]:
    with source.reader() as read:
        return {name: read(name).clone() for name in source.tensors}


def assert_holds(source: Source, expected: dict[str, Tensor]) -> None:
    """Header and content are these tensors."""
    assert source.tensors == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in expected.items()}
    for name, tensor in read_all(source).items():
        assert torch.equal(tensor, expected[name]), name


# --- safetensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".sft"])
def test_a_safetensors_file(tmp_path: Path, suffix: str):
    tensors = network() | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / f"model{suffix}", metadata={"format": "pt"})
    source = open_source(str(tmp_path / f"model{suffix}"))
    assert_holds(source, tensors)
    assert source.metadata == {"format": "pt"}
    assert not source.is_diffusers


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
)
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype):
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    save_file({"weight": tensor}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path / "model.safetensors"))
    assert source.tensors["weight"] == TensorInfo((2, 2), dtype)
    assert torch.equal(read_all(source)["weight"].float(), tensor.float())


def test_a_dtype_without_use_here_is_named(tmp_path: Path):
    save_file({"odd": torch.zeros(2, dtype=torch.uint16)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'odd' has the dtype U16, which is not supported"):
        open_source(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model.", "net.", "model."])
def test_the_networks_prefix_is_taken_off(tmp_path: Path, prefix: str):
    save_file(prefixed(prefix, network()), tmp_path / "model.safetensors")
    assert_holds(open_source(str(tmp_path / "model.safetensors")), network())


def test_only_the_network_of_a_full_checkpoint_is_taken(tmp_path: Path):
    full = prefixed("model.diffusion_model.", network()) | prefixed("first_stage_model.", network(9))
    save_file(full, tmp_path / "full.safetensors")
    assert_holds(open_source(str(tmp_path / "full.safetensors")), network())


def test_a_few_tensors_that_look_prefixed_are_no_prefix(tmp_path: Path):
    tensors = network() | prefixed("net.", network(2))
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(open_source(str(tmp_path / "model.safetensors")), tensors)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float):
    path = tmp_path / "model.safetensors"
    save_file(network(20), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file .* download it"):
        open_source(str(path))


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 64) + b"{this is no JSON".ljust(64) + bytes(64),
        struct.pack("<Q", 2**62) + bytes(100),
        b"<!DOCTYPE html><html><body>404: not found</body></html>",
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        open_source(str(tmp_path / "model.safetensors"))


def test_a_header_whose_offsets_leave_the_file_is_refused(tmp_path: Path):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_source(str(tmp_path / "model.safetensors"))


def test_a_missing_file_is_named(tmp_path: Path):
    path = str(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"nothing.safetensors' does not exist"):
        open_source(path)


def test_a_file_that_vanished_before_it_is_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file(network(), path)
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors.*cannot read 'blocks.0.weight'"):
        read_all(source)


def test_gguf_is_refused_with_advice(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedError, match="GGUF files are not supported yet; use the safetensors file"):
        open_source(str(tmp_path / "model.gguf"))


class _RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_a_pickle_is_refused_with_advice_and_its_code_never_runs(tmp_path: Path, suffix: str):
    path = tmp_path / f"model{suffix}"
    torch.save({"weight": torch.zeros(2), "extra": _RunsCode(tmp_path / "proof")}, path)
    with pytest.raises(
        UnsupportedError, match=rf"model\{suffix}: \{suffix} files are pickles.*use the safetensors file"
    ):
        open_source(str(path))
    assert not (tmp_path / "proof").exists()
    torch.load(path, weights_only=False)  # the trap itself works
    assert (tmp_path / "proof").exists()


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match=r"format '\.onnx' is not supported; allowed are \.safetensors"):
        open_source(str(tmp_path / "model.onnx"))


# --- diffusers folders --------------------------------------------------------------------------------------------

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index, as `save_pretrained` writes them."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "SomeModel", "num_layers": 2}))
    names = list(network())
    weight_map = {}
    for i, part in enumerate((names[:4], names[4:])):
        shard = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        save_file({name: network()[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_sharded_folder(folder: Path):
    source = open_source(str(folder))
    assert source.is_diffusers
    assert source.config == {"_class_name": "SomeModel", "num_layers": 2}
    assert_holds(source, network())


def test_a_folder_with_one_file(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save_file(network(), tmp_path / "diffusion_pytorch_model.safetensors")
    assert_holds(open_source(str(tmp_path)), network())


def test_a_file_that_the_index_does_not_name_is_ignored(folder: Path):
    save_file({"blocks.0.weight": torch.zeros(9, 9)}, folder / "zz_backup.safetensors")
    assert_holds(open_source(str(folder)), network())


def test_a_missing_shard_is_named(folder: Path):
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: diffusion_pytorch_model-00002-of-00002.safetensors named"):
        open_source(str(folder))


def test_a_truncated_shard_is_named(folder: Path):
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors is not a whole safetensors file"):
        open_source(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", "null"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_damaged_json_file_is_named(folder: Path, name: str, content: str):
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        open_source(str(folder))


def test_folders_that_are_no_models_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"folder without config.json"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        open_source(str(tmp_path))
