"""Which of `transformer_options` go to the workers, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..parallel.wire.trees import NotPlain, flatten

HERE = (
    "callbacks",
    "context_window",
    "easycache",
    "optimized_attention_override",
    "patches",
    "patches_replace",
    "prefetch_dynamic_vbars",
    "uuids",
    "wrappers",
)
"""Those that stay: code that runs around the network in this process, or that has been refused; names of ComfyUI's own
for what it holds; and the memory manager's."""


def travelling(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the network itself reads: numbers, text, tensors, and nests of them. The pack's own options stay.

    Raises:
        NotPlain: an option that the table does not know, and that cannot travel: code of a node, for example.
    """
    found = {
        name: value
        for name, value in options.items()
        if name not in HERE and not name.startswith("sequence_parallel") and value is not None
    }
    for name, value in found.items():
        try:
            flatten(value, name, {})
        except NotPlain as error:
            raise NotPlain(f"transformer_options.{error.path}", error.value) from None
    return found
