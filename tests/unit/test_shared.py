"""Tensors in shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from parallel.wire.shared import ALIGNMENT, Segment, TensorRef, dtype_name, lay_out
from parallel.wire.typed import from_plain, to_plain

ROOT = Path(__file__).parents[2]

Create = Callable[[int], Segment]

# Adds 1 to the tensor at ref, in the segment behind a descriptor: what a worker does.
_OTHER_PROCESS = """
import json, sys
from parallel.wire.shared import Segment, TensorRef
from parallel.wire.typed import from_plain
fd, size, ref = json.loads(sys.argv[1])
Segment("s", fd, size).tensor(from_plain(TensorRef, ref)).add_(1)
"""


@pytest.fixture
def create() -> Iterator[Create]:
    """Makes segments that are closed after the test."""
    segments: list[Segment] = []

    def new(size: int) -> Segment:
        segments.append(Segment.create("s", size))
        return segments[-1]

    yield new
    for segment in segments:
        segment.close()


def test_two_processes_see_the_same_tensor(create: Create):
    refs, size = lay_out("s", [((3, 5), torch.float32), ((2, 2), torch.int64)])
    segment = create(size)
    x, y = (segment.tensor(ref) for ref in refs)
    x.copy_(torch.arange(15.0).view(3, 5))
    y.fill_(7)
    argument = json.dumps([segment.fileno(), segment.size, to_plain(refs[0])])
    subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, argument],
        cwd=ROOT,
        pass_fds=(segment.fileno(),),
        check=True,
        timeout=60,
    )
    assert torch.equal(x, 1 + torch.arange(15.0).view(3, 5))
    assert torch.equal(y, torch.full((2, 2), 7))


def test_tensors_of_one_segment_alias_it(create: Create):
    (ref,), size = lay_out("s", [((4,), torch.float32)])
    segment = create(size)
    segment.tensor(ref)[2] = 5
    assert segment.tensor(ref).tolist() == [0, 0, 5, 0]


def test_a_tensor_outlives_the_closed_segment(create: Create):
    (ref,), size = lay_out("s", [((4,), torch.float32)])
    segment = create(size)
    tensor = segment.tensor(ref)
    fd = segment.fileno()
    segment.close()
    segment.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    tensor.fill_(3)
    assert tensor.sum() == 12


def test_tensors_are_laid_out_aligned_and_apart(create: Create):
    dtypes = [torch.bool, torch.bfloat16, torch.float64, torch.uint8, torch.float16, torch.int64]
    shapes = [(3,), (5, 7), (), (0, 4), (65,), (2, 2)]
    refs, size = lay_out("s", list(zip(shapes, dtypes, strict=True)))
    segment = create(size)
    tensors = [segment.tensor(ref) for ref in refs]
    for number, (tensor, shape, dtype) in enumerate(zip(tensors, shapes, dtypes, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert refs[number].offset % ALIGNMENT == 0
        tensor.fill_(number % 2)
    for number, tensor in enumerate(tensors):
        assert (tensor == number % 2).all()


def test_a_ref_survives_its_message():
    (ref,), _ = lay_out("s", [((2, 3), torch.bfloat16)])
    assert from_plain(TensorRef, json.loads(json.dumps(to_plain(ref)))) == ref
    assert ref.nbytes == 12


@pytest.mark.parametrize(
    "ref",
    [
        TensorRef("s", 0, (65,), "uint8"),
        TensorRef("s", 0, (17,), "float32"),
        TensorRef("s", 64, (1,), "uint8"),
        TensorRef("s", 63, (2,), "uint8"),
        TensorRef("s", 0, (1 << 40, 1 << 19), "float64"),
        TensorRef("s", (1 << 63) - 2, (1,), "uint8"),
    ],
)
def test_a_ref_outside_the_segment_is_refused(create: Create, ref: TensorRef):
    with pytest.raises(ValueError, match="outside segment 's' of 64 bytes"):
        create(64).tensor(ref)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint32])
def test_a_dtype_that_cannot_travel_is_named(dtype: torch.dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"{name} tensor cannot travel"):
        dtype_name(dtype)
    with pytest.raises(ValueError, match=f"{name} tensor cannot travel"):
        lay_out("s", [((2,), dtype)])
    with pytest.raises(ValueError, match=f"'{name}' cannot travel"):
        from_plain(TensorRef, {"segment": "s", "offset": 0, "shape": [2], "dtype": name})


def test_nothing_appears_in_dev_shm(create: Create):
    before = {path.name for path in Path("/dev/shm").iterdir()}
    segment = create(1 << 20)
    segment.tensor(TensorRef("s", 0, (1 << 20,), "uint8")).fill_(1)
    appeared = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not {name for name in appeared if "sequence-parallel" in name}
    assert os.fstat(segment.fileno()).st_nlink == 0  # it has no name anywhere, so nothing can be left behind


@pytest.mark.parametrize("size", [0, -1, 129, 1 << 40, 1 << 80])
def test_memory_behind_the_end_of_a_file_is_not_mapped(size: int):
    """Whoever touched it would be killed by SIGBUS."""
    fd = os.memfd_create("short")
    os.ftruncate(fd, 128)
    with pytest.raises(ValueError, match="segment 's': it has 128 bytes"):
        Segment("s", fd, size)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_what_is_no_memory_is_not_mapped():
    read, write = os.pipe()
    with pytest.raises(ValueError, match="no 8 bytes of shared memory"):
        Segment("s", read, 8)
    os.close(write)
