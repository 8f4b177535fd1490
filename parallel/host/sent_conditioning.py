"""Conditioning tensors that the workers of a group hold already."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..wire.messages import Conditioning
from .group import WorkerGroup

_KEPT = 16
"""Number of tensors kept per model in each worker: a few prompts and negative prompts."""


class SentConditioning:
    """Tensors that the workers hold, found by content: ComfyUI makes new tensors of the same values at every step."""

    def __init__(self, model: str):
        self._model = model
        self._sent: OrderedDict[str, Tensor] = OrderedDict()
        self._numbers = itertools.count(1)
        self._stale: list[str] = []

    def clear(self) -> None:
        self._stale += self._sent
        self._sent.clear()

    def update(
        self, wanted: Sequence[Mapping[str, Tensor]], group: WorkerGroup
    ) -> tuple[list[dict[str, str]], Conditioning]:
        """Finds the tensors that the workers lack and writes them to shared memory.

        Returns:
            For each request, the keys of its tensors by name; and the tensors that the workers must add and drop.
        """
        keys: list[dict[str, str]] = []
        new: dict[str, Tensor] = {}
        for conditioning in wanted:
            keys.append({})
            for name, tensor in conditioning.items():
                key = next((key for key, sent in self._sent.items() if _same(sent, tensor)), None)
                if key is None:
                    key = f"{self._model}/{next(self._numbers)}"
                    new[key] = self._sent[key] = tensor.detach().clone()
                self._sent.move_to_end(key)
                keys[-1][name] = key
        drop, self._stale = self._stale, []
        while len(self._sent) > max(_KEPT, sum(map(len, keys))):
            drop.append(self._sent.popitem(last=False)[0])
        refs = group.memory.write("conditioning", list(new.values())) if new else []
        return keys, Conditioning(put=dict(zip(new, refs, strict=True)), drop=drop)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
