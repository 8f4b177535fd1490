"""Runs a sampler's own code with a latent without data, and records its operations as a program.

The latent is a `RecordedLatent`: a tensor with shape, dtype and device but no data. Arithmetic on it returns further
ones, each a sum of products of the latents that the program has so far. The mathematics is therefore the sampler's own,
for any sampler, and noise is drawn when and how the sampler draws it; every operation that depends on data (a norm, a
maximum, a part of the latent) ends the recording with `NotRecordable`, never with a different result.

All control flow of a sampling must depend on sigmas alone; the few samplers that choose their steps by the latent
(dpm_adaptive) cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, count
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError
from ..wire.messages import Evaluate, Report, Terms
from .program import Network, Pass, Program
from .step_request import StepRequest

_MOST_TERMS = 12
"""Most terms of a sum; a longer one becomes a latent of its own, otherwise sums would grow with the steps."""
_SAMPLE = 997
"""Approximate number of elements that are compared first to find a tensor among the known ones."""


_Factors = dict[tuple[int, ...], float]
"""Sum of products: maps the numbers of latents to the factor of their product."""


class NotRecordable(EngineError):
    """Raised if the sampling does something that cannot be recorded; the message says what."""


class _Sum:
    """Latent as a sum of products; once the program computes it as a latent, `terms` is that latent alone."""

    __slots__ = ("terms",)

    def __init__(self, terms: _Factors):
        self.terms = terms


class RecordedLatent(Tensor):
    """Tensor whose data will exist only in the workers: one or more latents, concatenated along the batch."""

    recorder: Recorder
    _sums: list[_Sum]
    _concat: Tensor | None
    """Channels that follow the latents' channels."""
    _is_part: bool
    """True if it is a part of another one, which would have to change with it."""
    _is_zeros: bool = False
    """True if it was created as zeros."""

    @staticmethod
    def __new__(
        cls,
        recorder: Recorder,
        sums: list[_Sum],
        dtype: torch.dtype = torch.float32,
        concat: Tensor | None = None,
        is_part: bool = False,
    ) -> RecordedLatent:
        batch, channels, *rest = recorder.program.shape
        channels += concat.shape[1] if concat is not None else 0
        size = (batch * len(sums), channels, *rest)
        made = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=recorder.program.device)
        made.recorder, made._sums, made._concat, made._is_part = recorder, sums, concat, is_part
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RecordedLatent(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.stack and not (kwargs or {}).get("out"):
            return _Stack(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(function.overloadpacket)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        result = function.decompose(*args, **(kwargs or {}))  # PyTorch's own decomposition of other operators
        if result is NotImplemented:
            raise NotRecordable(f"the sampler applies {function.overloadpacket} to the latent")
        return result


class RecordedPart(Tensor):
    """Part of a packed latent, as a network takes and returns it: a range of each sample's elements, in a shape of its
    own. It supports no arithmetic.
    """

    whole: RecordedLatent
    start: int
    stop: int

    @staticmethod
    def __new__(cls, whole: RecordedLatent, start: int, stop: int, shape: Sequence[int]) -> RecordedPart:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=whole.dtype, device=whole.device)
        made.whole, made.start, made.stop = whole, start, stop
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RecordedPart({self.start}:{self.stop}, shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        packet, first = function.overloadpacket, args[0]
        if packet is _aten.cat:
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            if dim in (2, -1) and all(isinstance(part, cls) and part.ndim == 3 for part in first):
                return _whole_of(first)
        elif packet is _aten.slice and first.ndim == 3 and args[1] == 2:
            start, stop, step = (*args[2:], None, None, None)[:3]
            if step not in (None, 1):
                raise NotRecordable("the sampler takes a part of the latent apart")
            start, stop, _ = slice(start, stop).indices(first.shape[2])
            return cls(first.whole, first.start + start, first.start + stop, (*first.shape[:2], stop - start))
        elif packet in (_aten.view, _aten._unsafe_view, _aten.reshape, _aten.alias, _aten.detach):
            shape = torch.empty(first.shape, device="meta").reshape(args[1]).shape if len(args) > 1 else first.shape
            if shape[0] == first.shape[0]:
                return cls(first.whole, first.start, first.stop, shape)
        raise NotRecordable(f"the sampler applies {packet} to a part of the latent")


def _whole_of(parts: Sequence[RecordedPart]) -> RecordedLatent:
    """Returns the packed latent that these parts form, one after the other.

    Raises:
        NotRecordable: the parts do not form one latent, or not all of it.
    """
    whole, end = parts[0].whole, 0
    for part in parts:
        if part.start != end or part.whole is not whole:
            raise NotRecordable("the sampler joins parts of latents in another way than they were cut")
        end = part.stop
    if end != whole.shape[-1]:
        raise NotRecordable("the sampler leaves a part of the latent out")
    return whole


def packed(parts: Sequence[Tensor]) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """Packs the parts [B, C, …] of a latent, recorded or not, into one [B, 1, N]; also returns their shapes without
    the batch.

    A single part is returned as it is, without shapes.
    """
    if len(parts) == 1:
        return parts[0], ()
    shapes = tuple(tuple(part.shape[1:]) for part in parts)
    if isinstance(parts[0], RecordedPart):
        return _whole_of(parts), shapes  # type: ignore[arg-type]
    return torch.cat([part.reshape(len(part), 1, -1) for part in parts], dim=2), shapes


def in_parts(latent: RecordedLatent, shapes: Sequence[Sequence[int]]) -> list[RecordedPart]:
    """Splits a packed latent into its parts, the reverse of `packed`."""
    ends = list(accumulate(map(prod, shapes)))
    return [
        RecordedPart(latent, end - prod(shape), end, (latent.shape[0], *shape))
        for shape, end in zip(shapes, ends, strict=True)
    ]


def recorder_of(x: Any) -> Recorder | None:
    """Returns the recorder of a network's latent argument (a tensor or its parts), or None if the latent has data."""
    first = x[0] if isinstance(x, list | tuple) else x
    if isinstance(first, RecordedPart):
        return first.whole.recorder
    return first.recorder if isinstance(first, RecordedLatent) else None


class _Stack:
    """Latents stacked along `dim`, to be summed with factors by `torch.tensordot`."""

    def __init__(self, latents: Sequence[RecordedLatent], dim: int = 0):
        self._latents, self._dim = [latent.clone() for latent in latents], dim

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function is torch.tensordot and isinstance(args[0], _Stack):
            stack, factors = args[0], args[1]
            dims = given.get("dims", args[2] if len(args) > 2 else None)
            if dims == ([stack._dim], [0]) and factors.shape == (len(stack._latents),):
                return sum(latent * factor for latent, factor in zip(stack._latents, factors, strict=True))
        raise NotRecordable(f"the sampler applies {getattr(function, '__name__', function)} to stacked latents")


class Recorder:
    """Recorder of one sampling's program.

    Args:
        shape: shape of the latent.
        device: device on which the sampling expects the latent.
        most_bytes: bytes of constants above which the recording ends.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, *, most_bytes: int):
        self.program = Program(tuple(shape), device)
        self._numbers = count(1)
        self._most_bytes = self._room = most_bytes
        self._known: dict[tuple[Any, ...], list[Tensor]] = {}
        self._numbered: dict[int, int] = {}
        self._predictions: set[int] = set()

    # --- called by the sampling ---------------------------------------------------------------------------------

    def given(self, tensor: Tensor) -> RecordedLatent:
        """Returns the recorded latent to pass to the sampling in place of a tensor whose data is known."""
        return RecordedLatent(self, [_Sum(self._of_tensor(tensor))])

    def network(
        self, request: StepRequest, output_shape: Sequence[int], *, conditions: frozenset[int], sigma: float
    ) -> RecordedLatent:
        """Records a call of the network whose x is recorded, and returns its prediction.

        Args:
            request: request of the call.
            output_shape: shape of the prediction.
            conditions: see `Pass.conditions`.
            sigma: see `Network.sigma`.
        """
        x = request.x
        assert isinstance(x, RecordedLatent)
        batch, *rest = self.program.shape
        if tuple(output_shape) != (batch * len(x._sums), *rest):
            raise NotRecordable(f"the network turns a latent of {list(self.program.shape)} into {list(output_shape)}")
        latents = tuple(self._settled(each) for each in x._sums)
        results = tuple(next(self._numbers) for _ in latents)
        self._predictions |= set(results)
        made = Pass(
            replace(
                request,
                x=torch.empty(x.shape, dtype=x.dtype, device="meta"),
                timestep=self.known(request.timestep),
                conditioning={name: self.known(tensor) for name, tensor in request.conditioning.items()},
            ),
            latents,
            None if x._concat is None else self.known(x._concat),
            results,
            tuple(output_shape),
            conditions,
        )
        last = self.program.instructions[-1] if self.program.instructions else None
        # No instruction follows that one, so these latents were computed before it or are constants.
        if isinstance(last, Network) and last.sigma == sigma and last.results.isdisjoint(latents):
            last.passes.append(made)
        else:
            self.program.instructions.append(Network([made], sigma))
        return RecordedLatent(self, [_Sum({(number,): 1.0}) for number in results], x.dtype)

    def report(self, step: int, denoised: Any, x: Any, steps: int) -> None:
        """Records a call of the sampler's callback."""
        if not isinstance(denoised, RecordedLatent) or not isinstance(x, RecordedLatent):
            raise NotRecordable("the sampler shows something else than the latent")
        self._settled(x._sums[0])
        self.program.instructions.append(Report(step=step, steps=steps, denoised=_terms(denoised), x=_terms(x)))

    def finish(self, result: Any) -> Program:
        """Returns the program, with this latent as its result."""
        if not isinstance(result, RecordedLatent) or tuple(result.shape) != self.program.shape:
            raise NotRecordable("the sampler returns something else than the latent")
        self.program.result = _terms(result)
        return self.program

    def known(self, tensor: Tensor) -> Tensor:
        """Returns the first tensor with this content, on the CPU: samplings create new ones with the same values at
        every step."""
        tensor = tensor.detach()
        flat = tensor.reshape(-1)
        looked_at = flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu()
        key = (tuple(tensor.shape), tensor.dtype, float(looked_at.sum()), float(looked_at.abs().sum()))
        for known in self._known.get(key, []):
            if torch.equal(known, tensor.to(known.device)):
                return known
        kept = tensor.to("cpu", copy=True).contiguous()
        self._known.setdefault(key, []).append(kept)
        return kept

    def predicted(self, sums: Sequence[_Sum]) -> bool:
        """Returns True if all sums are unchanged predictions of the network, which are rounded already."""
        return all(list(each.terms.values()) == [1.0] and self._predictions.issuperset(*each.terms) for each in sums)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _settled(self, each: _Sum) -> int:
        """Returns the number of the latent with the value of the sum; if there is none, the program computes it."""
        if len(each.terms) == 1:
            ((latents, factor),) = each.terms.items()
            if factor == 1.0 and len(latents) == 1:
                return latents[0]
        number = next(self._numbers)
        self.program.instructions.append(Evaluate(evaluate=number, terms=_listed(each.terms)))
        each.terms = {(number,): 1.0}
        return number

    def _of_tensor(self, tensor: Tensor) -> _Factors:
        """Returns a tensor that can be expanded to the latent's shape, as a sum of products."""
        if (value := _uniform(tensor)) is not None:
            return {(): value} if value else {}
        if tensor.is_complex():
            raise NotRecordable("the sampler calculates with complex numbers")
        whole = self.known(tensor.float().expand(self.program.shape))
        if id(whole) not in self._numbered:
            self._room -= whole.nbytes
            if self._room < 0:
                raise NotRecordable(
                    f"the noise of all steps would take more than {self._most_bytes / 2**30:g} GiB of memory"
                )
            self._numbered[id(whole)] = number = next(self._numbers)
            self.program.constants[number] = whole
        return {(self._numbered[id(whole)],): 1.0}

    def sums_of(self, value: Any, parts: int) -> list[_Factors]:
        """Returns a number, a tensor or a recorded latent as `parts` sums of products."""
        if isinstance(value, RecordedLatent):
            _require_fp32(value)
            sums = [each.terms for each in value._sums]
            if len(sums) not in (1, parts) or (len(sums) == 1 and parts > 1 and len(value) != 1):
                raise NotRecordable("the sampler combines latents of different batch sizes")
            return sums * (parts // len(sums))
        if not isinstance(value, Tensor):
            return [{(): float(value)} if value else {}] * parts
        whole = (self.program.shape[0] * parts, *self.program.shape[1:])
        try:
            value.expand(whole)
        except RuntimeError as error:
            raise NotRecordable(
                f"the sampler combines the latent with a tensor of shape {list(value.shape)}"
            ) from error
        if value.ndim < len(whole) or value.shape[0] == 1 or parts == 1:
            return [self._of_tensor(value)] * parts
        return [self._of_tensor(part) for part in value.chunk(parts)]

    def combined(self, latents: list[_Factors]) -> RecordedLatent:
        sums = []
        for terms in latents:
            if not all(isfinite(factor) for factor in terms.values()):
                raise NotRecordable("the sampler multiplies the latent by something that is not finite")
            each = _Sum({key: factor for key, factor in terms.items() if factor})
            if len(each.terms) > _MOST_TERMS:
                self._settled(each)
            sums.append(each)
        return RecordedLatent(self, sums)


def _terms(latent: RecordedLatent) -> Terms:
    _require_fp32(latent)
    return _listed(latent._sums[0].terms)


def _listed(terms: _Factors) -> Terms:
    return [(factor, latents) for latents, factor in terms.items()]


def _require_fp32(latent: RecordedLatent) -> None:
    if latent.dtype != torch.float32 or latent._concat is not None:
        raise NotRecordable("the sampler calculates with a rounded latent, or one with further channels")


def _uniform(tensor: Tensor) -> float | None:
    """Returns the value that all elements of a tensor have, or None if they differ."""
    if tensor.numel() == 1:
        return float(tensor)
    low, high = torch.aminmax(tensor)
    value = float(low)
    return value if value == float(high) else None


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _operands(a: Any, b: Any) -> tuple[Recorder, list[tuple[_Factors, _Factors]]]:
    """Returns the recorder, and both operands as sums: a pair for each latent along the batch of the result."""
    latents = [value for value in (a, b) if isinstance(value, RecordedLatent)]
    recorder, parts = latents[0].recorder, max(len(latent._sums) for latent in latents)
    whole = recorder.program.shape[0] * parts
    for value in (a, b):  # as PyTorch broadcasts: a larger batch would make the latent larger
        if isinstance(value, Tensor) and value.ndim == len(latents[0].shape) and value.shape[0] not in (1, whole):
            raise NotRecordable(f"the sampler combines the latent with a tensor of shape {list(value.shape)}")
    return recorder, list(zip(recorder.sums_of(a, parts), recorder.sums_of(b, parts), strict=True))


def _sum(a: _Factors, b: _Factors, factor: float) -> _Factors:
    terms = dict(a)
    for key, value in b.items():
        terms[key] = terms.get(key, 0.0) + factor * value
    return terms


def _product(a: _Factors, b: _Factors) -> _Factors:
    terms: _Factors = {}
    for latents, factor in a.items():
        for others, other in b.items():
            key = tuple(sorted(latents + others))
            terms[key] = terms.get(key, 0.0) + factor * other
    return terms


def _add(a: Any, b: Any, *, alpha: float = 1) -> RecordedLatent:
    recorder, pairs = _operands(a, b)
    return recorder.combined([_sum(p, q, float(alpha)) for p, q in pairs])


def _sub(a: Any, b: Any, *, alpha: float = 1) -> RecordedLatent:
    return _add(a, b, alpha=-alpha)


def _mul(a: Any, b: Any) -> RecordedLatent:
    recorder, pairs = _operands(a, b)
    if isinstance(a, RecordedLatent) and isinstance(b, RecordedLatent):
        raise NotRecordable("the sampler multiplies latents with each other")
    return recorder.combined([_product(p, q) for p, q in pairs])


def _div(a: Any, b: Any) -> RecordedLatent:
    if isinstance(b, RecordedLatent):
        raise NotRecordable("the sampler divides by the latent")
    value = _uniform(b) if isinstance(b, Tensor) else float(b)
    if value is None:
        return _mul(a, b.reciprocal())
    if not value:
        raise NotRecordable("the sampler multiplies the latent by something that is not finite")
    return _mul(a, 1.0 / value)


def _in_place(operation: Callable[..., RecordedLatent]) -> Callable[..., RecordedLatent]:
    def changed(a: Any, *args: Any, **kwargs: Any) -> RecordedLatent:
        if not isinstance(a, RecordedLatent):
            raise NotRecordable("the sampler writes the latent into another tensor")
        result = operation(a, *args, **kwargs)
        if a._is_part or len(result._sums) != len(a._sums):
            raise NotRecordable("the sampler writes to a part of the latent")
        a._sums[:] = result._sums
        return a

    return changed


# --- tensors of the same, or nearly the same, data --------------------------------------------------------------------


def _same(a: RecordedLatent, *_: Any, **__: Any) -> RecordedLatent:
    """Returns another tensor that shares the latent's data."""
    return RecordedLatent(a.recorder, a._sums, a.dtype, a._concat, a._is_part)


def _clone(a: RecordedLatent, **_: Any) -> RecordedLatent:
    return RecordedLatent(a.recorder, list(a._sums), a.dtype, a._concat)


def _detach(a: RecordedLatent) -> Tensor:
    if a._is_zeros and not any(each.terms for each in a._sums):  # noise samplers start from them
        return torch.zeros(a.shape, dtype=a.dtype, device=a.device)
    return _same(a)


def _view(a: RecordedLatent, size: Sequence[int], **_: Any) -> RecordedLatent:
    wanted = [int(length) for length in size]
    if -1 in wanted:
        wanted[wanted.index(-1)] = a.numel() // max(1, -prod(wanted))
    if tuple(wanted) != tuple(a.shape):
        raise NotRecordable(f"the sampler views the latent as {wanted}")
    return _same(a)


def _to(a: RecordedLatent, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> RecordedLatent:
    if device is not None and torch.device(device).type != a.device.type:
        raise NotRecordable(f"the sampler moves the latent to {device}")
    dtype = dtype or a.dtype
    if not dtype.is_floating_point or dtype.itemsize > 4:
        raise NotRecordable(f"the sampler turns the latent into {dtype}")
    if a.dtype != torch.float32 and dtype != a.dtype and not a.recorder.predicted(a._sums):
        raise NotRecordable("the sampler calculates with a rounded latent")
    return RecordedLatent(a.recorder, list(a._sums), dtype, a._concat)


def _zeros_like(a: RecordedLatent, *, dtype: torch.dtype | None = None, **_: Any) -> RecordedLatent:
    if dtype not in (None, torch.float32) or a._concat is not None:
        raise NotRecordable("the sampler wants zeros like a rounded latent")
    zeros = RecordedLatent(a.recorder, [_Sum({}) for _ in a._sums])
    zeros._is_zeros = True
    return zeros


def _made_by(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a handler that makes tensors with data, by default with a latent's shape and dtype."""

    def like(
        a: RecordedLatent,
        size: Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
        **_: Any,
    ) -> Tensor:
        return make(a.shape if size is None else size, dtype=dtype or a.dtype, device=device or a.device)

    return like


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> RecordedLatent:
    first = tensors[0]
    if dim == 0 and all(isinstance(each, RecordedLatent) for each in tensors):
        latents: list[Any] = list(tensors)
        if any(each.dtype != first.dtype or each._concat is not None for each in latents):
            raise NotRecordable("the sampler joins latents of different kinds")
        return RecordedLatent(latents[0].recorder, [s for each in latents for s in each._sums], first.dtype)
    if dim in (1, 1 - first.ndim) and isinstance(first, RecordedLatent) and first._concat is None:
        rest = list(tensors[1:])
        if rest and not any(isinstance(each, RecordedLatent) for each in rest):
            channels = torch.cat(rest, dim=1)
            if len(channels) == len(first) and channels.shape[2:] == first.shape[2:]:
                return RecordedLatent(first.recorder, list(first._sums), first.dtype, channels)
    raise NotRecordable("the sampler joins the latent with other tensors")


def _slice(a: RecordedLatent, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    """Cuts a part from a packed latent, which has one channel with all parts one after the other."""
    if (a.ndim, dim, step, a.shape[1]) != (3, 2, 1, 1) or a._concat is not None:
        raise NotRecordable("the sampler takes the latent apart")
    first, last, _ = slice(start, stop).indices(a.shape[2])
    return RecordedPart(a, first, last, (a.shape[0], 1, last - first))


def _split(a: RecordedLatent, size: int, dim: int = 0) -> list[RecordedLatent]:
    batch = a.recorder.program.shape[0]
    if dim != 0 or size % batch or a._concat is not None:
        raise NotRecordable("the sampler takes the latent apart")
    count = size // batch
    return [
        RecordedLatent(a.recorder, a._sums[i : i + count], a.dtype, is_part=len(a._sums) > count)
        for i in range(0, len(a._sums), count)
    ]


_aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.add: _add,
    _aten.sub: _sub,
    _aten.rsub: lambda a, b, alpha=1: _add(b, a, alpha=-alpha),
    _aten.mul: _mul,
    _aten.div: _div,
    _aten.neg: lambda a: _mul(a, -1.0),
    _aten.lerp: lambda start, end, weight: _add(start, _mul(_sub(end, start), weight)),
    _aten.addcmul: lambda a, b, c, *, value=1: _add(a, _mul(b, c), alpha=value),
    _aten.add_: _in_place(_add),
    _aten.sub_: _in_place(_sub),
    _aten.mul_: _in_place(_mul),
    _aten.div_: _in_place(_div),
    _aten.alias: _same,
    _aten.clone: _clone,
    _aten.detach: _detach,
    _aten.view: _view,
    _aten._unsafe_view: _view,
    _aten.expand: _view,
    _aten._to_copy: _to,
    _aten.zeros_like: _zeros_like,
    _aten.ones_like: _made_by(torch.ones),
    _aten.randn_like: _made_by(torch.randn),
    _aten.rand_like: _made_by(torch.rand),
    _aten.new_ones: _made_by(torch.ones),
    _aten.new_zeros: _made_by(torch.zeros),
    _aten.new_empty: _made_by(torch.empty),
    _aten.cat: _cat,
    _aten.split: _split,
    _aten.slice: _slice,
}
