"""Damage to bytes and to JSON."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_NUMBERS = (-1, 0, 1, 2, 63, 255, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308)
_TEXTS = (
    "",
    "s",
    "float32",
    "none",
    "__class__",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "σ" * 300,
    "op",
    ".",
    "..",
)
_PIECES = (
    b"NaN", b"-Infinity", b"1e999", b"null", b'{"a":1,"a":2}', b"[" * 3000, b'{"a":' * 3000, b"[]," * 3000, b"\xff\xfe",
    b"\0" * 9, b"9" * 5000, b'"', b"{", b"}", b"]", b",", b"\\u", b"\xed\xa0\x80",
)  # fmt: skip


def damaged_json(random_: random.Random, document: Any) -> Any:
    """A copy in which one value is another one, has gone, or has another name."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places:
        return _value(random_, document)
    holder, key = random_.choice(places)
    action = random_.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[random_.choice(_TEXTS)] = holder.pop(key)
    elif action == 2:
        other, name = random_.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif action == 3 and isinstance(holder, list):
        holder += [_value(random_, holder[key])] * random_.choice((1, 70))
    else:
        holder[key] = _value(random_, holder[key])
    return document


def damaged_bytes(random_: random.Random, content: bytes) -> bytes:
    """A copy in which a few bytes are others, have gone, or are new; or the end of it has gone."""
    changed = bytearray(content)
    at = random_.randrange(len(changed) + 1)
    action = random_.randrange(6)
    if action == 0:
        for _ in range(random_.choice((1, 1, 2, 8))):
            if changed:
                changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    elif action == 1:
        changed[at:at] = random_.randbytes(random_.choice((1, 2, 8)))
    elif action == 2:
        del changed[at : at + random_.choice((1, 2, 8, 100))]
    elif action == 3:
        del changed[at:]
    elif action == 4:
        changed[at : at + random_.choice((0, 1, 8))] = random_.choice(_PIECES)
    else:
        size = random_.choice((1, 4, 8))  # a length, a count or an offset
        changed[at : at + size] = random_.choice((b"\xff" * size, bytes(size), bytes(size - 1) + b"\x80"))
    return bytes(changed)


def text_of(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _value(random_: random.Random, before: Any) -> Any:
    return random_.choice(
        [None, True, [], {}, [[]], {"a": {}}, random_.choice(_NUMBERS), random_.choice(_TEXTS), [before], {"a": before}]
    )


def _places(document: Any) -> Any:
    """Each value's list or dictionary, and its index or key."""
    if isinstance(document, dict | list):
        for key, value in list(document.items() if isinstance(document, dict) else enumerate(document)):
            yield document, key
            yield from _places(value)
