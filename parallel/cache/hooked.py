"""Skips blocks of a network whose own forward calls them.

During one call the forwards of its blocks are replaced: the first one decides. After a hit the others return their
inputs, so that the network's own code between the blocks (ControlNet's residuals, concatenations) finds tensors of the
right shapes; where the hidden states leave the blocks, they are replaced by the hidden states at which the skipped
blocks start plus the residual that these added at an earlier step. Hooks run for skipped blocks too: those that cut
arguments and join results are needed, others check `split.streams.Streams.skipping`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..split.chain import Chain
from ..split.handing_on import Forward, argument_names, handing_on, replaced
from ..split.hooks import Split
from ..split.rules import Grid, Tokens
from ..split.sites import Plan, PlanError
from .blocks import Pass, StepPasses, Tensors


@contextmanager
def cached_blocks(network: nn.Module, plan: Plan, chain: Chain, split: Split, passes: StepPasses) -> Iterator[None]:
    """Lets one call of `network` within the context skip blocks as `passes` decides; restores the network on exit.

    Args:
        plan, chain: plan and chain of the network's class.
        split: split that has applied `plan` to the network.
        passes: passes of this call, the same on all ranks that share the sequence.

    Raises:
        PlanError: the network lacks modules or arguments that the chain names, or the call did not run through them.
    """
    call = _Call(network, plan, chain, split, passes)
    with ExitStack() as during:
        for module, forward in call.forwards():
            during.enter_context(replaced(module, forward))
        yield
        call.check()


class _Call:
    """Replacement forwards and state of one call of the network."""

    def __init__(self, network: nn.Module, plan: Plan, chain: Chain, split: Split, passes: StepPasses):
        self._network, self._plan, self._chain, self._split, self._passes = network, plan, chain, split, passes
        blocks = ((path, list(self._at(path).children())) for path in [*chain.blocks, *chain.beside])
        self._lists: dict[str, list[nn.Module]] = {path: modules for path, modules in blocks if modules}
        rule = plan[next(iter(chain.blocks))].cut[chain.hidden]
        self._rules: tuple[Tokens | Grid, ...] = rule if isinstance(rule, tuple) else (rule,)
        self._dims = [rule.dim if isinstance(rule, Tokens) else 1 for rule in self._rules]
        """Token dimension of the hidden states, for each stream."""
        self._pass: Pass | None = None
        self._start: Tensors = ()
        """Hidden states before the blocks that may be skipped; after a hit, those after them."""
        self._entered = self._left = False

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Yields each module of the chain with the forward that replaces its own."""
        chained = [(path, number) for path in self._chain.blocks for number in range(len(self._lists.get(path, ())))]
        for path, modules in self._lists.items():
            returned = {**self._chain.blocks, **self._chain.beside}[path].split()
            for number, module in enumerate(modules):
                needed = [*returned, self._chain.hidden] if (path, number) == chained[0] else returned
                names = self._arguments(module, f"{path}.{number}", needed, self._plan[path].positional)
                forward = handing_on(self._split, module.forward, names, returned)
                if (path, number) == chained[0]:
                    forward = self._first(module, forward, names, returned)
                if (path, number) == chained[-1] and not self._chain.leave:
                    forward = self._last(forward, returned)
                yield module, forward
        if self._chain.leave:
            path, _, name = self._chain.leave.rpartition(".")
            module = self._at(path)
            yield module, self._exit(module.forward, self._arguments(module, path, [name]), name)

    def check(self) -> None:
        """Checks, after the call, that it ran through the chain: otherwise it was not cached, or its result is wrong.

        Raises:
            PlanError: the call left the chain; the message says where.
        """
        if not self._entered:
            raise self._astray(f"did not run {next(iter(self._lists), 'its blocks')}")
        if self._pass is not None and not self._left:
            raise self._astray(f"left its blocks without passing {self._chain.leave or 'the last one'}")

    # --- replacement forwards -------------------------------------------------------------------------------------

    def _first(self, module: nn.Module, inner: Forward, names: list[str], returned: list[str]) -> Forward:
        """Returns the first block's forward, which decides before or after the block. It clones the tensors that it
        keeps, since blocks work in place."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            hidden = _tensors(given[self._chain.hidden])
            self._entered, self._left, self._start = True, False, ()
            self._pass = entered = self._passes.enter(self._sizes(hidden))
            if entered is None:
                return inner(*args, **kwargs)
            if not entered.after_first:
                compared = self._modulated(module, given, args, kwargs)
                self._decide(entered, (compared,), hidden)
                if self._split.streams.skipping:
                    self._split.streams.expect_nothing()
                return inner(*args, **kwargs)
            before = [x.clone() for x in hidden]
            result = inner(*args, **kwargs)
            after = _tensors(_item(result, returned, self._chain.hidden))
            added = [torch.sub(new, old, out=old) for new, old in zip(after, before, strict=True)]
            self._decide(entered, self._owned(added), after)
            return result

        return forward

    def _last(self, inner: Forward, returned: list[str]) -> Forward:
        """Returns the forward of the last block, if the hidden states leave in its result."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            return _with_item(result, returned, self._chain.hidden, self._leave)

        return forward

    def _exit(self, original: Forward, names: list[str], leaving: str) -> Forward:
        """Returns the forward of the module through whose argument `leaving` the hidden states leave."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if leaving in kwargs:
                return original(*args, **kwargs | {leaving: self._leave(kwargs[leaving])})
            place = names.index(leaving)
            return original(*args[:place], self._leave(args[place]), *args[place + 1 :], **kwargs)

        return forward

    # --- parts ----------------------------------------------------------------------------------------------------

    def _decide(self, entered: Pass, compared: Tensors, start: Tensors) -> None:
        if (change := entered.change(compared)) is None:
            self._start = tuple(x.clone() for x in start)
        else:
            self._start = tuple(a + b for a, b in zip(start, change, strict=True))
            self._split.streams.skipping = True

    def _leave(self, value: Any) -> Any:
        """Remembers the residual of the hidden states that leave the blocks or, after a hit, replaces these states.

        `value` may have other tokens before them.
        """
        if self._pass is None:
            return value
        found, start, self._start, self._left = _tensors(value), self._start, (), True
        others = [x.shape[dim] - y.shape[dim] for dim, x, y in zip(self._dims, found, start, strict=True)]
        if not self._split.streams.skipping:
            ends = [x.narrow(dim, n, x.shape[dim] - n) for dim, n, x in zip(self._dims, others, found, strict=True)]
            self._pass.computed(tuple(torch.sub(new, old, out=old) for new, old in zip(ends, start, strict=True)))
            return value
        self._split.streams.skipping = False
        new = tuple(
            torch.cat([x.narrow(dim, 0, n), y], dim) if n else y
            for dim, n, x, y in zip(self._dims, others, found, start, strict=True)
        )
        return new[0] if isinstance(value, Tensor) else type(value)(new)

    def _modulated(self, module: nn.Module, given: Mapping[str, Any], args: Any, kwargs: Any) -> Tensor:
        """Returns the tensor that TeaCache compares, reduced to this rank's own tokens if it has a token dimension."""
        name = self._chain.modulated
        value = given[name] if name in given else _input_of(module, name, args, kwargs)
        assert isinstance(value, Tensor)
        (dim,), (hidden,) = self._dims, _tensors(given[self._chain.hidden])
        per_token = value.ndim > dim and value.shape[dim] == hidden.shape[dim]
        return self._owned([value])[0] if per_token else value

    def _owned(self, values: Sequence[Tensor]) -> Tensors:
        """Selects the tokens that this rank owns: [B, S_r, …] → [B, …]; without a batch, [S_r, …] → [1, …]."""
        streams = self._split.streams
        owned = []
        for rule, dim, value in zip(self._rules, self._dims, values, strict=True):
            if streams.ranks.size > 1:
                names = rule.streams if isinstance(rule, Tokens) else (rule.stream,)
                value = streams.without_phantoms(value, names, dim)
            owned.append(value if dim else value[None])
        return tuple(owned)

    def _sizes(self, hidden: Tensors) -> Hashable:
        """Returns sizes and split, the same on all ranks although these differ in their number of tokens."""
        streams = self._split.streams
        if streams.ranks.size == 1:
            return tuple(x.shape for x in hidden)
        others = tuple((*x.shape[:dim], *x.shape[dim + 1 :]) for dim, x in zip(self._dims, hidden, strict=True))
        return streams.described(), others

    def _at(self, path: str) -> nn.Module:
        try:
            return self._network.get_submodule(path)
        except AttributeError:
            raise self._astray(f"has no module {path!r}") from None

    def _arguments(self, module: nn.Module, path: str, needed: Sequence[str], positional: str = "") -> list[str]:
        """Returns the names of the arguments of the module's forward, or those that its plan assigns to them.

        Raises:
            PlanError: an argument in `needed` is not among them.
        """
        parameters = inspect.signature(type(module).forward).parameters
        names = argument_names(module, positional)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if missing := [] if takes_any else sorted({*needed} - {*names}):
            raise self._astray(
                f"has no argument {missing[0]!r} of {path} ({type(module).__name__}: {', '.join(names)})"
            )
        return names

    def _astray(self, what: str) -> PlanError:
        return PlanError(
            f"{type(self._network).__name__} {what}, where its plan lets a cache skip blocks; remove the cache's node"
        )


class _Reached(Exception):
    """Raised to stop a forward at the submodule whose input is read."""


def _input_of(module: nn.Module, path: str, args: Any, kwargs: Any) -> Tensor:
    """Returns the input of the submodule at `path`, for which the module's forward runs up to that submodule."""
    found: list[Tensor] = []

    def stop(submodule: nn.Module, inputs: Any) -> NoReturn:
        found.append(inputs[0])
        raise _Reached

    # This hook is the first: another one may expect that the submodule runs. The class's forward is called, not a
    # compiled one, which may omit hooks.
    handle = module.get_submodule(path).register_forward_pre_hook(stop, prepend=True)
    try:
        type(module).forward(module, *args, **kwargs)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise PlanError(f"{type(module).__name__} does not call {path}, whose input TeaCache compares")


def _tensors(value: Any) -> Tensors:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _item(result: Any, returned: list[str], name: str) -> Any:
    """Returns the result called `name`; a single result has any name."""
    return result if len(returned) == 1 else result[returned.index(name)]


def _with_item(result: Any, returned: list[str], name: str, make: Callable[[Any], Any]) -> Any:
    """Returns the results, with the one called `name` passed through `make`."""
    if len(returned) == 1:
        return make(result)
    place = returned.index(name)
    return (*result[:place], make(result[place]), *result[place + 1 :])
