"""Weights of any dtype, quantised or not, packed into one contiguous byte buffer.

The buffer can be cut at any byte, gathered and copied as a whole, whatever it contains. A quantised tensor wraps plain
tensors, its values and scales (`torch.utils._python_dispatch.is_traceable_wrapper_subclass`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import CheckpointError
from ..wire.plain import plain_tensors
from ..wire.shared import ALIGNMENT

Form = list[tuple[torch.Size, torch.dtype]]
"""Shapes and dtypes of the plain tensors that a weight is stored as."""


class Weight:
    """A parameter in its module, initially with the file's values.

    Args:
        name: name of the parameter in the network.
        module, leaf: the module that owns it, and its name there.
        dtype: dtype in which it is kept; by default its own.
    """

    def __init__(self, name: str, module: nn.Module, leaf: str, dtype: torch.dtype | None = None):
        self.name = name
        self.module = module
        self.leaf = leaf
        value = module._parameters[leaf]
        assert value is not None, name
        self.dtype, self.shape = dtype or value.dtype, value.shape
        self.form: Form = [(self.shape, self.dtype)]
        self._value: Tensor | None = value

    @property
    def value(self) -> Tensor:
        """The file's value; available until another value is installed."""
        assert self._value is not None, self.name
        return self._value

    @property
    def nbytes(self) -> int:
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.form)

    def stored(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Converts a value to its stored tensors, one for each of `form`; pieces that need no change are not copied.

        Args:
            pieces: the value's plain tensors (`wire.plain.plain_tensors`).

        Raises:
            CheckpointError: the value does not fit this weight.
        """
        if [piece.shape for piece in pieces] != [self.shape]:
            raise CheckpointError(
                f"the weight {self.name} has the shape {list(self.shape)}, received"
                f" {' and '.join(str(list(piece.shape)) for piece in pieces)}"
            )
        return [pieces[0].to(self.dtype)]

    def install(self, pieces: Sequence[Tensor]) -> None:
        """Builds the parameter from stored tensors, whose memory it shares."""
        self._value = None
        self._install(pieces)

    def _install(self, pieces: Sequence[Tensor]) -> None:
        self.module._parameters[self.leaf] = nn.Parameter(pieces[0], requires_grad=False)

    def clear(self) -> None:
        """Replaces the values by meta tensors, so that computing with them is an error and not a wrong result."""
        self.install([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in self.form])


class QuantisedWeight(Weight):
    """A quantised parameter. Accepts only values with the same quantisation.

    Args:
        name, module, leaf: see `Weight`.
        like: a tensor with the required quantisation; by default the parameter.

    Attributes:
        patches: patches that its layer adds whenever it restores the values, in the layer's own form; for GGUF files
            only.
    """

    def __init__(self, name: str, module: nn.Module, leaf: str, like: Tensor | None = None):
        super().__init__(name, module, leaf)
        value: Any = self.value if like is None else like
        self._class, self._stride = type(value), value.stride()
        self._inner, self._rest = value.__tensor_flatten__()
        self.form = [(piece.shape, piece.dtype) for piece in plain_tensors(value)]
        self.patches: list[Any] = []

    def stored(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        if (given := [(piece.shape, piece.dtype) for piece in pieces]) != self.form:
            raise CheckpointError(f"the weight {self.name} is quantised as {self.form}, and is given {given}")
        return list(pieces)

    def _install(self, pieces: Sequence[Tensor]) -> None:
        inner = dict(zip(self._inner, pieces, strict=True))
        tensor = self._class.__tensor_unflatten__(inner, self._rest, self.shape, self._stride)
        if self.patches:
            tensor.patches = self.patches
        tensor._is_param = True  # as nn.Parameter does with a tensor of another class, after copying its scales
        self.module._parameters[self.leaf] = tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """Location of a plain tensor in the byte buffer."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def of(self, data: Tensor) -> Tensor:
        return data[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


class Packed:
    """Weights that are packed into one byte buffer and moved together."""

    def __init__(self, weights: Sequence[Weight]):
        self.weights = tuple(weights)
        self.size = 0
        """Size of the buffer in bytes."""
        self._places: dict[str, list[_Place]] = {}
        for weight in weights:
            self._places[weight.name] = places = []
            for shape, dtype in weight.form:
                places.append(_Place(self.size, shape, dtype))
                self.size += -(-places[-1].nbytes // ALIGNMENT) * ALIGNMENT

    def write(self, weight: Weight, pieces: Sequence[Tensor], data: Tensor, first: int = 0) -> None:
        """Writes the part of a weight that lies in `data`, [n] uint8: the buffer's bytes from `first` on."""
        for piece, place in zip(weight.stored(pieces), self._places[weight.name], strict=True):
            start, stop = max(place.offset, first), min(place.offset + place.nbytes, first + len(data))
            if start < stop:
                flat = piece.contiguous().reshape(-1).view(torch.uint8)
                data[start - first : stop - first].copy_(flat[start - place.offset : stop - place.offset])

    def land(self, data: Tensor) -> None:
        """Makes the parameters views of `data`, [≥ size] uint8."""
        for weight in self.weights:
            weight.install([place.of(data) for place in self._places[weight.name]])

    def leave(self) -> None:
        """Removes the parameters' data until the next `land`."""
        for weight in self.weights:
            weight.clear()


def weights_of(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> list[Weight]:
    """Returns all parameters of a network.

    Args:
        dtypes: maps the names of parameters that are to be cast to the dtype in which they are kept.
    """
    found: list[Weight] = []
    for path, module in network.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{leaf}".lstrip(".")
            if is_traceable_wrapper_subclass(parameter):
                found.append(QuantisedWeight(name, module, leaf))
            else:
                found.append(Weight(name, module, leaf, dtypes.get(name)))
    return found
