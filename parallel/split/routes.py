"""Routes the attention of modules through the exchange over the ranks.

ComfyUI's models call one attention function, which looks for an override in `transformer_options`; diffusers' models
call `torch.nn.functional.scaled_dot_product_attention`. Neither route needs a change of the model, and neither leaves
anything global behind.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from threading import get_ident
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention.between import Compute
from ..attention.kernels import Kernel
from .sites import Pairs, PlanError
from .streams import Names, Streams, Way

OPTIONS = "transformer_options"
OVERRIDE = "optimized_attention_override"
"""ComfyUI's key, since September 2025, for a function that is called instead of its attention."""
_USERS = "sequence_parallel_users_override"
"""Key under which the user's own override is kept; it computes the attention of the gathered tensors."""
REPLACED = "patches_replace"
"""ComfyUI's key for functions that are called instead of blocks."""
ATTENTION = "optimized_attention"
"""ComfyUI's name for its attention function, which models import."""


class Route:
    """Attention of this rank's tokens in one module.

    Args:
        current: returns the streams of the running forward pass.
        pairs: streams of the queries and of the keys, or several such pairs.
        kind: name that the corresponding attentions of all blocks share.
        where: name of the module, for messages.
    """

    def __init__(self, current: Callable[[], Streams], pairs: Pairs, kind: str, where: str):
        self._current, self._pairs = current, pairs if isinstance(pairs, list) else [pairs]
        self._kind, self._where = kind, where

    @property
    def alone(self) -> bool:
        """True if there is nothing to do: this rank has the whole sequence, and the user has chosen no kernel."""
        ranks = self._current().ranks
        return ranks.size == 1 and ranks.chosen is None

    def expect(self) -> None:
        """Records that the module has begun, so an attention of its kind has to run in this pass; see
        `Streams.routed`."""
        if not self._current().skipping:
            self._current().routed.setdefault(self._kind, False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, compute: Compute) -> Tensor:
        """Attends: q [B, H, Q_r, D], k and v [B, G, K_r, D] of this rank's tokens → [B, H, Q_r, D]. Collective.

        Raises:
            PlanError: the numbers of tokens differ from the plan, or the mask fits neither them nor the whole streams.
        """
        streams = self._current()
        ranks = streams.ranks
        streams.routed[self._kind] = True
        if ranks.chosen is not None:
            compute = _by_kernel(ranks.chosen, compute)
        if ranks.size == 1:
            return compute(q, k, v, mask)
        key = self._kind, q.shape, k.shape
        if key not in streams.ways:
            streams.ways[key] = self._way(*q.shape[1:3], *k.shape[1:3])
        if (way := streams.ways[key]) is None:
            return compute(q, k, v, mask)
        if way.as_it_is and mask is None:
            return way.exchange(q, k, v, compute, None)
        queries, keys = way.queries, way.keys
        if None in self._pairs:
            k, v = (streams.take_before(x, keys, 2) for x in (k, v))
        q = streams.without_phantoms(q, queries, 2)
        k, v = (streams.without_phantoms(x, keys, 2) for x in (k, v))
        if mask is not None:
            mask = self._exchanged(self._exchanged(mask, -1, keys), -2, queries)
        return streams.with_phantoms(way.exchange(q, k, v, compute, mask), queries, 2)

    def _way(self, heads: int, queries: int, groups: int, keys: int) -> Way | None:
        """Returns the exchange for these numbers of heads and tokens; None: nothing is exchanged."""
        streams = self._current()
        if (pair := self._pair(queries, keys)) is None:
            return None
        if heads % groups:
            raise PlanError(f"{self._where}: {heads} heads of queries, which {groups} heads of keys do not divide")
        as_it_is = None not in self._pairs and not any(map(streams.phantoms, pair))
        return Way(*pair, streams.exchange(*pair, heads, groups), as_it_is)

    def _pair(self, queries: int, keys: int) -> tuple[Names, Names] | None:
        """Returns the streams that have these numbers of tokens on this rank; None: nothing is exchanged. All ranks
        find the same pair: a stream together with a preceding one has more tokens than the stream alone on every rank,
        phantoms included."""
        streams = self._current()
        for pair in self._pairs:
            if pair is None:
                return None
            if (queries, keys) == (streams.local(pair[0]), self._keys(pair[1])):
                return pair
        here = " or ".join(
            " and ".join(f"{streams.local(names)} of {'+'.join(names)}" for names in pair)
            for pair in self._pairs
            if pair
        )
        raise PlanError(f"{self._where}: attention of {queries} queries with {keys} keys, where this rank has {here}")

    def _keys(self, names: Names) -> int:
        """Returns the number of keys of these streams on this rank. If LOCAL, which sees whole streams, is among the
        pairs, all streams but the last are whole: so there are more keys than LOCAL's on every rank."""
        streams = self._current()
        if None in self._pairs:
            return streams.total(names[:-1]) + streams.local(names[-1:])
        return streams.local(names)

    def _exchanged(self, mask: Tensor, dim: int, names: Names) -> Tensor:
        """Returns a mask over all tokens, in the order of the ranks, from one over the whole streams or this rank's
        tokens."""
        streams, size = self._current(), mask.shape[dim]
        if size == 1:
            return mask
        if size == streams.total(names):
            return mask.index_select(dim, streams.index(names, mask.device))
        if size == streams.local(names):
            mine = streams.without_phantoms(mask, names, mask.ndim + dim)
            return streams.ranks.gather(mine, mask.ndim + dim, streams.counts(names))
        raise PlanError(
            f"{self._where}: a mask of {list(mask.shape)}, of which dim {dim} is neither 1, the whole"
            f" {streams.total(names)} tokens of {'+'.join(names)}, nor this rank's {streams.local(names)}"
        )


def _by_kernel(kernel: Kernel, own: Compute) -> Compute:
    """Returns a function that calls the kernel, or the model's own attention if there is a mask or values have another
    width than queries: no kernel supports these."""

    def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None or v.shape[3] != q.shape[3]:
            return own(q, k, v, mask)
        if (repeats := q.shape[1] // k.shape[1]) > 1:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        return kernel(q, k, v)

    return compute


class ComfyOverride:
    """Called by ComfyUI's models in place of their attention function.

    The parameters are those of ComfyUI's attention functions, in their order, which `comfyui.contract` checks.
    """

    def __call__(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **named: Any,
    ) -> Tensor:
        if attn_precision is not None:  # None is its default
            named["attn_precision"] = attn_precision
        if not skip_reshape:
            q, k, v = heads_apart(q, k, v, heads)
        out = self.attend_by(chosen_by_the_file(function, named), q, k, v, mask, named)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def attend_by(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        named: dict[str, Any],
    ) -> Tensor:
        """Computes attention with `function`: q [B, H, Q_r, D], k and v [B, G, K_r, D] → [B, H, Q_r, D].

        Args:
            named: arguments that `function` takes by name besides, `transformer_options` among them.
        """
        raise NotImplementedError


class ComfyRoute(ComfyOverride, Route):
    """Route through ComfyUI's attention override; computes with ComfyUI's own attention function or the user's
    override."""

    def attend_by(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        named: dict[str, Any],
    ) -> Tensor:
        users = named[OPTIONS].get(_USERS) if OPTIONS in named else None
        if users is not None:
            function = partial(users, function)

        def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            return function(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, **named)

        return self.attend(q, k, v, mask, compute)


def heads_apart(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the heads: q [B, Q, H·D], and k and v likewise → [B, H, Q, D], [B, G, K, D]. In some of them the heads may
    already be a dimension of their own, which ComfyUI's attention accepts, too."""
    dim = q.shape[-1] // heads
    q, k, v = (x.flatten(2).unflatten(-1, (-1, dim)).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def chosen_by_the_file(function: Callable[..., Tensor], named: dict[str, Any]) -> Callable[..., Tensor]:
    """Returns the attention function that the file prefers for the module (newer ComfyUI's `preferred_attention`, which
    is removed from `named`) if this machine has it; else `function`. ComfyUI itself ignores the preference if there is
    an override."""
    chosen: Callable[..., Tensor] | None = getattr(named.pop("preferred_attention", None), "function", None)
    return function if chosen is None else chosen


class OverrideInGraph(ComfyOverride):
    """Override that attention finds inside a compiled block. Hooks announce which site's attention is next."""

    def enter(self, site: int) -> None:
        """Marks the start of a module that has a site of its own; the block's site is 0."""
        raise NotImplementedError

    def leave(self) -> None:
        """Marks its end."""
        raise NotImplementedError


class TorchRoute(Route):
    """Route through torch's `scaled_dot_product_attention`; takes its parameters and computes with it."""

    def __call__(
        self,
        function: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **named: Any,
    ) -> Tensor:
        if is_causal:
            raise PlanError(f"{self._where}: causal attention depends on the order of tokens, which a split changes")

        def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            return function(q, k, v, attn_mask=mask, dropout_p=dropout_p, **named)

        return self.attend(query, key, value, attn_mask, compute)


class ThroughOptions:
    """Routes of ComfyUI's models. A pre-hook of the module puts the route into the `transformer_options` that the
    module receives, so nested modules are routed alike, unless they have a route of their own."""

    def __init__(self, current: Callable[[], Streams]):
        self._current = current

    def install(
        self, module: nn.Module, streams: Pairs | None, kind: str, where: str, site: int, by_name: bool = False
    ) -> tuple[Route | None, list[RemovableHandle]]:
        """Routes the attention of a module; with `streams` None, its attention runs without a route.

        Args:
            site: number of the module's site in its block; 0 is the block itself.
            by_name: see `Site`.
        """
        route = None if streams is None else ComfyRoute(self._current, streams, kind, where)
        place = place_of_options(module)
        taken = inspect.signature(type(module).forward).parameters
        by_name |= OPTIONS not in taken and all(p.kind is not p.VAR_KEYWORD for p in taken.values())
        if route is not None and by_name:
            return route, _routed_by_name(module, route, vars(sys.modules[type(module).__module__]), ATTENTION, where)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            options = args[place] if place < len(args) else kwargs.get(OPTIONS)
            if site and (override := in_graph(options)) is not None:
                return override.enter(site)
            if self._current().ranks.size == 1 and (route is None or route.alone):
                return None
            if type(options) is not dict and not isinstance(options, Mapping):  # the first check is fast
                raise PlanError(f"{where} is given no {OPTIONS}: its attention cannot be routed")
            options = options_of(options, route)
            if route is not None:
                route.expect()
            if place < len(args):
                return (*args[:place], options, *args[place + 1 :]), kwargs
            return args, kwargs | {OPTIONS: options}

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            options = args[place] if place < len(args) else kwargs.get(OPTIONS)
            if (override := in_graph(options)) is not None:
                override.leave()

        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        if site:
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        return route, handles


class ThroughTorch:
    """Routes of models that call torch's attention function, such as diffusers' models."""

    def __init__(self, current: Callable[[], Streams]):
        self._current = current

    def install(
        self, module: nn.Module, streams: Pairs | None, kind: str, where: str, site: int, by_name: bool = False
    ) -> tuple[Route | None, list[RemovableHandle]]:
        """Routes the attention of a module."""
        if streams is None:
            return None, []
        route = TorchRoute(self._current, streams, kind, where)
        return route, _routed_by_name(module, route, vars(F), F.scaled_dot_product_attention.__name__, where)


def _routed_by_name(
    module: nn.Module, route: ComfyRoute | TorchRoute, namespace: dict[str, Any], name: str, where: str
) -> list[RemovableHandle]:
    """Replaces the attention function, which the module looks up by `name` in a Python module's `namespace`, by the
    routed one while the module runs, for the thread that runs it."""
    replaced: list[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        if route.alone:
            return
        if name not in namespace:
            raise PlanError(f"{where} takes no {OPTIONS}, nor knows {name}: its attention cannot be routed")
        route.expect()
        original, thread = namespace[name], get_ident()

        def routed(*args: Any, **kwargs: Any) -> Tensor:
            return route(original, *args, **kwargs) if get_ident() == thread else original(*args, **kwargs)

        namespace[name] = routed
        replaced.append(original)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        if replaced:
            namespace[name] = replaced.pop()

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True, prepend=True),
    ]


def place_of_options(module: nn.Module) -> int:
    """Returns the position of `transformer_options` among the arguments of a module."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return parameters.index(OPTIONS) if OPTIONS in parameters else len(parameters)


def in_graph(options: Any) -> OverrideInGraph | None:
    """Returns the override of a compiled block if these options hold it; else None."""
    override = options.get(OVERRIDE) if isinstance(options, Mapping) else None
    return override if isinstance(override, OverrideInGraph) else None


def options_of(options: Mapping[str, Any], route: Route | None) -> dict[str, Any]:
    """Returns the `transformer_options` for a module with this route; without one, attention uses the user's override,
    if any."""
    users = options[_USERS] if _USERS in options else options.get(OVERRIDE)
    if route is None and users is None:  # ComfyUI calls this entry even if it is None
        return {name: value for name, value in options.items() if name not in (OVERRIDE, _USERS)}
    return {**options, OVERRIDE: route or users, _USERS: users}
