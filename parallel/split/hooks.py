"""Installs a plan in a model, and removes it without a trace."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .blocks import blocks_of_any, reached_into
from .ranks import SequenceRanks
from .routes import Route, ThroughOptions
from .sites import Pairs, Plan, PlanError, Rule, Site, by_size_alone, by_value_alone, prepared
from .streams import Streams


class Routes(Protocol):
    """Installer of routes in modules."""

    def install(
        self, module: nn.Module, streams: Pairs | None, kind: str, where: str, site: int, by_name: bool = False
    ) -> tuple[Route | None, list[RemovableHandle]]: ...


MakeRoutes = Callable[[Callable[[], Streams]], Routes]
"""Factory of `Routes`, from a function that returns the streams of the running forward pass."""


@dataclass(frozen=True, slots=True)
class Block:
    """One module of a list that the plan names."""

    module: nn.Module
    routes: tuple[Route | None, ...]
    """Routes of its attention: first that of the block itself, then those of its submodules, in the plan's order; None
    where nothing is exchanged."""


class Split:
    """A model that runs over the ranks of a sequence, until `remove` is called.

    Args:
        model: whole on every rank.
        plan: plan of the model's class; an empty one splits nothing, and every rank computes everything.
        ranks: the ranks that share the sequence; each splits the same model by the same plan.
        routes: makes the routes of the model's attention.

    Raises:
        PlanError: the model lacks modules or arguments that the plan names.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        ranks: SequenceRanks,
        routes: MakeRoutes = ThroughOptions,
    ):
        self.ranks = ranks
        self._name = type(model).__name__
        self._streams = Streams(ranks)
        self._routes = routes(lambda: self._streams)
        self._handles: list[RemovableHandle] = []
        self.blocks: list[Block] = []
        """Blocks that can be compiled, in the order of the plan and of its lists."""
        self._reached_into = reached_into(plan)
        try:
            self._handles.append(model.register_forward_pre_hook(self._begin))
            for path, site in plan.items():
                self._install(model, path, site)
            for block in [] if plan else blocks_of_any(model):
                self._handles.append(block.register_forward_pre_hook(self._enter))
            self._handles.append(model.register_forward_hook(self._end))
        except BaseException:
            self.remove()
            raise

    @property
    def streams(self) -> Streams:
        """Streams of the running forward pass."""
        return self._streams

    def remove(self) -> None:
        """Restores the model to its original state."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.blocks.clear()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._streams.forget_parts()  # of a pass that has failed
        self._streams = Streams(self.ranks)

    def _end(self, module: nn.Module, args: Any, out: Any) -> None:
        """Checks that all expected attention was routed: attention without its route has seen this rank's tokens
        only."""
        self._streams.forget_parts()
        if around := [kind for kind, done in self._streams.routed.items() if not done]:
            raise PlanError(
                f"the attention of {', '.join(around)} was not split as its plan says: this version of the model"
                " computes it in another way, or another attention backend is set"
            )

    def _install(self, model: nn.Module, path: str, site: Site) -> None:
        path_of_list, within_each, below = path.partition(".*.")
        module = self._submodule(model, path_of_list, f"{self._name}")
        is_list = isinstance(module, nn.ModuleList)
        modules = list(module) if isinstance(module, nn.ModuleList) else [module]
        for number, each in enumerate(modules):
            where = f"{self._name}.{path_of_list}.{number}" if is_list else f"{self._name}.{path}".rstrip(".")
            if within_each:
                each, where = self._submodule(each, below, where), f"{where}.{below}"
            enter = self._enter if is_list and not within_each else None
            if site.cut or site.whole is not None:
                cut = _Cut(each, site, lambda: self._streams, f"{where} ({type(each).__name__})", enter)
                self._handles.append(each.register_forward_pre_hook(cut, with_kwargs=True))
            elif enter is not None:
                self._handles.append(each.register_forward_pre_hook(enter))
            routes: list[Route | None] = [None]
            for name, streams in site.attention.items():
                attention = self._submodule(each, name, where)
                kind = ".".join(filter(None, (self._name, path, name)))
                number = len(routes) if name else 0
                place = f"{where}.{name}".rstrip(".")
                route, handles = self._routes.install(attention, streams, kind, place, number, site.by_name)
                self._handles += handles
                routes = [*routes, route] if name else [route, *routes[1:]]
            if is_list and not within_each and not site.by_name and path not in self._reached_into:
                self.blocks.append(Block(each, tuple(routes)))
            if site.join_each is not None:
                self._handles.append(each.register_forward_hook(_Joined(site.join_each, lambda: self._streams, where)))
        if site.join is not None and modules:
            self._handles.append(modules[-1].register_forward_hook(_Joined(site.join, lambda: self._streams, path)))

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._streams.skipping:
            self.ranks.enter_block()

    def _submodule(self, module: nn.Module, path: str, where: str) -> nn.Module:
        try:
            return module.get_submodule(path)
        except AttributeError:
            has = ", ".join(name for name, _ in module.named_children()) or "none"
            raise PlanError(
                f"the plan of {self._name} names the module {path!r}, which {where} has not; it has: {has}"
            ) from None


class _Cut:
    """Pre-hook that cuts a module's arguments, and refuses arguments that its plan does not know.

    Args:
        enter: for a block, called before anything is cut (`Split._enter`). Part of this hook, since a second one would
            cost every block time.
    """

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        current: Callable[[], Streams],
        where: str,
        enter: Callable[[nn.Module, Any], None] | None,
    ):
        self._current, self._where, self._enter = current, where, enter
        self._known: tuple[int, tuple[str, ...]] = 0, ()
        """Number of positional arguments, and names of the others, of the last checked call in which every argument was
        known. A call with the same ones is not checked again."""
        parameters = inspect.signature(type(module).forward).parameters
        self._surplus = next((name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL), "")
        self._names = list(itertools.takewhile(lambda name: name != self._surplus, list(parameters)[1:]))
        self._names += site.positional.split()
        self._site = site
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._cuts: list[tuple[str, int, Callable[[Any, Streams], Any]]] = []
        """Argument, index in `args`, rule. The index is `sys.maxsize` for arguments that can only be passed by name."""
        self._dims: dict[str, int] = {}
        """Argument → dimension whose size alone decides, see `by_size_alone`."""
        self._repeatable: set[str] = set()
        self._whole: set[str] | None = None if site.whole is None else {"transformer_options"}
        for entry in [*site.cut, *(site.whole or "").split()]:
            name = entry.removesuffix("?")
            if name not in parameters and not takes_any:
                if entry.endswith("?"):
                    continue
                raise PlanError(
                    f"{where} has no argument {name!r}, which its plan names; it has: {', '.join(self._names)}"
                )
            if entry in site.cut:
                place = self._names.index(name) if name in self._names else sys.maxsize
                self._cuts.append((name, place, prepared("cut", site.cut[entry])))
                if by_value_alone(site.cut[entry]):
                    self._repeatable.add(name)
                if (dim := by_size_alone(site.cut[entry])) is not None:
                    self._dims[name] = dim
            if self._whole is not None:
                self._whole.add(name)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._enter is not None:
            self._enter(module, args)
        count = len(args)
        if self._whole is not None and (count, tuple(kwargs)) != self._known:
            self._refuse_unknown(args, kwargs)
        streams = self._current()
        if streams.ranks.size == 1:
            return None
        seen, dims = streams.seen_before(self._site), self._dims
        parts, own = seen.parts, seen.own
        new_args: list[Any] | None = None
        new_kwargs: dict[str, Any] | None = None
        for name, place, cut in self._cuts:
            value = args[place] if place < count else kwargs.get(name)
            if value is None or (name in own and _size(value, dims[name]) == own[name]):
                continue
            if name in parts and parts[name][0]() is value:
                part = parts[name][1]
            else:
                streams.given = self._given(args, kwargs)
                try:
                    part = cut(value, streams)
                except PlanError as error:
                    raise _named(error, self._where, name, value) from None
                finally:
                    streams.given = {}
                if part is value:
                    if name in dims and (size := _size(value, dims[name])) > 0:
                        own[name] = size
                    continue
                if name in self._repeatable:
                    seen.keep(name, value, part)
            if place < count:
                new_args = new_args or list(args)
                new_args[place] = part
            else:
                new_kwargs = new_kwargs or dict(kwargs)
                new_kwargs[name] = part
        if new_args is None and new_kwargs is None:
            return None
        return args if new_args is None else tuple(new_args), new_kwargs or kwargs

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._names, args, strict=False)) | kwargs

    def _refuse_unknown(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._whole is not None
        given = [*self._given(args, kwargs).items(), *((self._surplus, value) for value in args[len(self._names) :])]
        for name, value in given:
            if value is not None and name not in self._whole:
                raise PlanError(f"{self._where} is given {_shown(name, value)}, which its plan does not know")
        if all(name in self._whole for name, _ in given):  # one that is None may have a value the next time
            self._known = len(args), tuple(kwargs)


def _size(value: Any, dim: int) -> int:
    """Returns the size along `dim`; −1, which is never remembered, if there is no such dimension."""
    return value.size(dim) if isinstance(value, Tensor) and value.ndim > dim else -1


class _Joined:
    def __init__(self, rule: Rule, current: Callable[[], Streams], where: str):
        self._join, self._current, self._where = prepared("join", rule), current, where

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        if self._current().ranks.size == 1:
            return None
        try:
            return None if out is None else self._join(out, self._current())
        except PlanError as error:
            raise _named(error, f"{self._where} ({type(module).__name__})", "its result", out) from None


def _named(error: PlanError, where: str, name: str, value: Any) -> PlanError:
    """Returns the error with the module and the value that it concerns."""
    return PlanError(f"{where}: {_shown(name, value)}: {error}")


def _shown(name: str, value: Any) -> str:
    """Describes an argument by its name and the shapes of its tensors."""
    if isinstance(value, Tensor):
        return f"{name} of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{name} ({', '.join(str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in value)})"
    if isinstance(value, Mapping):
        return f"{name} (with {', '.join(map(str, value))})"
    return f"{name} ({type(value).__name__})"
