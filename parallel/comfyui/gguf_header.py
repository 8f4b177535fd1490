"""Checks the headers of GGUF files before a library reads them.

The library gguf trusts the counts in a file: an array of 2^60 bytes in a short file keeps it busy, and takes memory,
for ever. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path

from ..errors import CheckpointError
from ..headers import LONGEST, opened

MOST_ITEMS = 50_000
"""Maximum of keys, items of arrays and tensors together; the library makes arrays for each of them. A network has a few
thousand; longer lists are vocabularies of text encoders."""
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Maps types of values to bytes."""
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
_ELEMENTS_PER_BYTE = 8
"""Upper bound; no format has as many."""


def check(path: str) -> None:
    """Checks that a GGUF file contains everything that its header declares.

    Raises:
        CheckpointError: the file is damaged, incomplete or too large.
    """
    try:
        with opened(Path(path)) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Reader(content).check()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error


class _Reader:
    """Reader that walks through a header.

    Raises:
        ValueError: the header is damaged, or too large.
    """

    def __init__(self, content: mmap.mmap):
        self._content, self._at, self._items = content, 0, 0

    def check(self) -> None:
        if self._content[:4] != _MAGIC:
            raise ValueError("it does not begin as GGUF files do")
        self._at = 4
        if (version := self._number("I")) not in _VERSIONS:
            raise ValueError(f"it has version {version}; read are {', '.join(map(str, _VERSIONS))}")
        tensors, keys = self._number("Q"), self._number("Q")
        self._count(tensors + keys)
        self._once(self._pair() for _ in range(keys))
        self._once(self._tensor() for _ in range(tensors))

    def _once(self, names: Iterable[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ValueError(f"{name[:100]!r} is given twice")
            seen.add(name)

    def _pair(self) -> str:
        name = self._text()
        self._value(self._number("I"))
        return name

    def _value(self, kind: int) -> None:
        if kind in _SCALARS:
            self._take(_SCALARS[kind])
        elif kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            each, count = self._number("I"), self._number("Q")
            if count > MOST_ITEMS:
                raise ValueError(f"it has a list of {count} items, as language models have; diffusion models have none")
            self._count(count)
            if each == _ARRAY:
                raise ValueError("it has an array of arrays")
            for _ in range(count):
                self._value(each)
        else:
            raise ValueError(f"it has a value of the type {kind}, which does not exist")

    def _tensor(self) -> str:
        name = self._text()
        if (dims := self._number("I")) > _MOST_DIMS:
            raise ValueError(f"tensor {name[:100]!r} has {dims} dims; {_MOST_DIMS} are the most")
        elements = prod(self._number("Q") for _ in range(dims))
        self._number("I")  # its format
        offset, size = self._number("Q"), len(self._content)
        if elements > _ELEMENTS_PER_BYTE * size or offset > size:
            raise ValueError(f"tensor {name[:100]!r} reaches outside the file of {size} bytes")
        return name

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > MOST_ITEMS:
            raise ValueError(f"it announces {self._items} items; {MOST_ITEMS} are the most")

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()  # UnicodeDecodeError is a ValueError

    def _number(self, kind: str) -> int:
        found: int
        (found,) = struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))
        return found

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self._at:
            raise ValueError(f"its header reaches outside the file of {len(self._content)} bytes")
        if self._at + size > LONGEST:
            raise ValueError(f"its header has more than {LONGEST} bytes")
        self._at += size
        return self._content[self._at - size : self._at]
