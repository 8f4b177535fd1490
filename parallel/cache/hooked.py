"""Skips blocks of a network that runs them itself.

During one call the forwards of its blocks are replaced: the first one decides. After a hit the others hand on what
comes in, so that the network's own code between the blocks (ControlNet's residuals, concatenations) finds tensors of
the right shapes; where the hidden states leave the blocks, they are replaced by the sum of the first block's result and
what the others have added at an earlier step. Hooks run for skipped blocks, too: those that cut arguments and join
results are needed, others ask `split.streams.Streams.skipping`.
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
    """While this lasts, `network` may be called once, and skips blocks as `passes` decides. Leaves no trace.

    Args:
        plan, chain: of its class.
        split: by which `plan` is in the network.
        passes: of this call; all ranks that share the sequence have alike ones.

    Raises:
        PlanError: the network has not the modules and arguments that the chain names, or did not go through them.
    """
    call = _Call(network, plan, chain, split, passes)
    with ExitStack() as during:
        for module, forward in call.forwards():
            during.enter_context(replaced(module, forward))
        yield
        call.check()


class _Call:
    """What happens during one call of the network."""

    def __init__(self, network: nn.Module, plan: Plan, chain: Chain, split: Split, passes: StepPasses):
        self._network, self._plan, self._chain, self._split, self._passes = network, plan, chain, split, passes
        blocks = ((path, list(self._at(path).children())) for path in [*chain.blocks, *chain.beside])
        self._lists: dict[str, list[nn.Module]] = {path: modules for path, modules in blocks if modules}
        rule = plan[next(iter(chain.blocks))].cut[chain.hidden]
        self._rules: tuple[Tokens | Grid, ...] = rule if isinstance(rule, tuple) else (rule,)
        self._dims = [rule.dim if isinstance(rule, Tokens) else 1 for rule in self._rules]
        """Of the hidden states' tokens."""
        self._pass: Pass | None = None
        self._start: Tensors = ()
        """Where the blocks that may be skipped start from; after a hit, where they end."""
        self._entered = self._left = False

    def forwards(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Each module of the chain, and what replaces its forward."""
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
        """After the call: what did not go through the chain is not cached, or wrong.

        Raises:
            PlanError: naming where it went astray.
        """
        if not self._entered:
            raise self._astray(f"did not run {next(iter(self._lists), 'its blocks')}")
        if self._pass is not None and not self._left:
            raise self._astray(f"left its blocks without passing {self._chain.leave or 'the last one'}")

    # --- what replaces the forwards -------------------------------------------------------------------------------

    def _first(self, module: nn.Module, inner: Forward, names: list[str], returned: list[str]) -> Forward:
        """Decides, after the block or before it. What is kept is cloned, since blocks work in place."""

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
        """The hidden states leave in its result."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            return _with_item(result, returned, self._chain.hidden, self._leave)

        return forward

    def _exit(self, original: Forward, names: list[str], leaving: str) -> Forward:
        """The hidden states leave by one of its arguments."""

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
        """The hidden states at the end, to be remembered or to be replaced; `value` may have other tokens before
        them."""
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
        """What TeaCache compares, of this rank's own tokens where it has a value for each."""
        name = self._chain.modulated
        value = given[name] if name in given else _input_of(module, name, args, kwargs)
        assert isinstance(value, Tensor)
        (dim,), (hidden,) = self._dims, _tensors(given[self._chain.hidden])
        per_token = value.ndim > dim and value.shape[dim] == hidden.shape[dim]
        return self._owned([value])[0] if per_token else value

    def _owned(self, values: Sequence[Tensor]) -> Tensors:
        """[B, S_r, …] → [B, …] of the tokens that this rank owns; [S_r, …] of a network without batches → [1, …]."""
        streams = self._split.streams
        owned = []
        for rule, dim, value in zip(self._rules, self._dims, values, strict=True):
            if streams.ranks.size > 1:
                names = rule.streams if isinstance(rule, Tokens) else (rule.stream,)
                value = streams.without_phantoms(value, names, dim)
            owned.append(value if dim else value[None])
        return tuple(owned)

    def _sizes(self, hidden: Tensors) -> Hashable:
        """Alike on all ranks: their tokens differ in number."""
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
        """Names of its forward's arguments, or those that its plan gives them.

        Raises:
            PlanError: one that is needed is not among them.
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
    """A submodule has been reached."""


def _input_of(module: nn.Module, path: str, args: Any, kwargs: Any) -> Tensor:
    """What goes into a submodule, for which as much of the module runs as stands before it."""
    found: list[Tensor] = []

    def stop(submodule: nn.Module, inputs: Any) -> NoReturn:
        found.append(inputs[0])
        raise _Reached

    # First of all hooks: another one may expect that the submodule runs. Not what compiles the module, which may
    # leave hooks out.
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
    """The result that goes by this name; the only one goes by any."""
    return result if len(returned) == 1 else result[returned.index(name)]


def _with_item(result: Any, returned: list[str], name: str, make: Callable[[Any], Any]) -> Any:
    """The results, with that of this name replaced."""
    if len(returned) == 1:
        return make(result)
    place = returned.index(name)
    return (*result[:place], make(result[place]), *result[place + 1 :])
