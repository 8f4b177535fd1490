"""A model file (or diffusers folder) as a mapping of names to tensors that are read only when asked for.

Files are memory-mapped: the pages belong to the kernel's cache, so several workers that read one file share one copy.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError
from . import quantised

SAFETENSORS = (".safetensors", ".sft")
_PICKLED = (".pt", ".pt2", ".pth", ".ckpt", ".bin", ".pkl")
_LIBC = ctypes.CDLL(None)
_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says of a tensor before the tensor is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Stored(NamedTuple):
    """A tensor as it is kept: its true values are `tensor` × `scale`."""

    tensor: Tensor
    scale: float | None = None
    """Of scaled fp8; None where the tensor itself holds the true values."""


@dataclass(frozen=True, slots=True)
class Source:
    """Header of a checkpoint: names, shapes and dtypes, with the network's prefix taken off."""

    path: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    """`config.json` of a diffusers folder; None for a single file."""
    files: dict[str, tuple[str, str]]
    """Name → (file, name in the file)."""
    scales: dict[str, str] = field(default_factory=dict)
    """Weight in fp8 → name of its scale: the true weight is their product. Scales are not among `tensors`."""

    @property
    def is_diffusers(self) -> bool:
        return self.config is not None

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Opens the files for reading tensors."""
        opened = Reader(self)
        try:
            yield opened
        finally:
            opened.close()


class Reader:
    """Reads tensors of a source one at a time, each from a memory map."""

    def __init__(self, source: Source):
        self._source = source
        self._open: dict[str, Any] = {}

    def __call__(self, name: str) -> Tensor:
        """The tensor on the CPU, backed by the file or, of scaled fp8, true values in fp32; copy it before changing it.

        Raises:
            CheckpointError: the file changed or is damaged.
        """
        tensor, scale = self.stored(name)
        return tensor if scale is None else tensor.float().mul_(scale)

    def stored(self, name: str) -> Stored:
        """The tensor as the file has it, backed by the file.

        Raises:
            CheckpointError: the file changed or is damaged.
        """
        scale = self._source.scales.get(name)
        return Stored(self._read(name), None if scale is None else self._read(scale).float().item())

    def _read(self, name: str) -> Tensor:
        file, key = self._source.files[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            return self._open[file].get_tensor(key)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: cannot read {key!r} ({error}); the file may be damaged") from error

    @staticmethod
    def release(tensor: Tensor) -> None:
        """Lets the kernel take the pages of a tensor that has been copied; read again, they come back from the file."""
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        if size >= mmap.PAGESIZE:  # whole pages only: others may share the first and the last one
            whole = size // mmap.PAGESIZE * mmap.PAGESIZE
            _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._open.clear()


def open_source(path: str) -> Source:
    """Reads a checkpoint's header.

    Args:
        path: a safetensors file, or a diffusers folder of them.

    Raises:
        CheckpointError: the path does not exist, is damaged, truncated, or of an unknown format.
        UnsupportedError: a pickle, GGUF, or quantised in a way that is not supported.
    """
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"checkpoint {path!r} does not exist")
    return _open_folder(place) if place.is_dir() else _open_file(place)


def _open_file(path: Path) -> Source:
    tensors, metadata = _header(path)
    prefix = _prefix(tensors)
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    source = Source(
        path=str(path),
        tensors={short: tensors[name] for short, name in names.items()},
        metadata=metadata,
        config=None,
        files={short: (str(path), name) for short, name in names.items()},
    )
    with source.reader() as read:
        network, scales = quantised.separate(source.path, source.tensors, metadata, read)
    return replace(source, tensors=network, scales=scales)


def _open_folder(path: Path) -> Source:
    config_file = path / "config.json"
    if not config_file.exists():
        raise CheckpointError(f"{path} is a folder without config.json; a diffusers transformer folder has one")
    config = _read_json(config_file)
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise UnsupportedError(f"{path} is quantised with {method}, which is not supported yet; use the bf16 folder")
    shards = sorted(file for file in path.iterdir() if file.suffix in SAFETENSORS)
    if not shards:
        raise CheckpointError(f"{path} holds no safetensors file")
    for index in path.glob("*.safetensors.index.json"):
        wanted = set(_read_json(index).get("weight_map", {}).values())
        if missing := sorted(wanted - {file.name for file in shards}):
            raise CheckpointError(f"{path} is incomplete: {', '.join(missing)} named in {index.name} is missing")
        shards = [file for file in shards if file.name in wanted]
    tensors: dict[str, TensorInfo] = {}
    files: dict[str, tuple[str, str]] = {}
    for shard in shards:
        for name, info in _header(shard)[0].items():
            tensors[name] = info
            files[name] = (str(shard), name)
    return Source(path=str(path), tensors=tensors, metadata={}, config=config, files=files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} where an object is needed")
    return content


def _header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if path.suffix in SAFETENSORS:
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                tensors = {
                    name: TensorInfo(tuple(part.get_shape()), _safetensors_dtype(part.get_dtype(), name, path))
                    for name, part in slices.items()
                }
                return tensors, dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}); it may be truncated: download it again"
            ) from error
    if path.suffix in _PICKLED:
        raise UnsupportedError(
            f"{path}: {path.suffix} files are pickles, which can run code when they are read, and are not supported;"
            " use the safetensors file of the model, or convert it: safetensors.torch.save_file(state_dict, path)"
        )
    if path.suffix == ".gguf":
        raise UnsupportedError(f"{path}: GGUF files are not supported yet; use the safetensors file of the model")
    raise CheckpointError(f"{path}: format {path.suffix!r} is not supported; allowed are {', '.join(SAFETENSORS)}")


def _prefix(names: dict[str, TensorInfo]) -> str:
    """The prefix of the diffusion network in a file that may also hold a VAE and text encoders."""
    counts = {prefix: sum(name.startswith(prefix) for name in names) for prefix in _PREFIXES}
    best = max(counts, key=lambda prefix: counts[prefix])
    if counts[best] > 5:
        return best
    return "model." if names and all(name.startswith("model.") for name in names) else ""


def _safetensors_dtype(code: str, name: str, path: Path) -> torch.dtype:
    known = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.uint8,  # of scales only, and not in older PyTorch
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }  # fmt: skip
    if code not in known:
        raise CheckpointError(f"{path}: tensor {name!r} has the dtype {code}, which is not supported")
    return known[code]
