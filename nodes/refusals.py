"""Refusals of features that cannot work when the network's blocks run in other processes; each names the node."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from ..parallel.errors import UnsupportedError
from .options import as_data, hands_on

log = logging.getLogger("sequence_parallel")

_WHO = "Load Diffusion Model (SP) or Load Checkpoint (SP)"

_OPTIONS = {
    "patches": "a block patch",
    "patches_replace": "a block replacement",
    "optimized_attention_override": "an attention override",
    "ar_state": "SamplerARVideo",
}

_REPLACES = "set_model_options_patch_replace"
"""Function that ComfyUI's guidance nodes call, e.g. SkipLayerGuidanceDiT and PerturbedAttentionGuidance."""


def refuse(what: str, instead: str = "use ComfyUI's own loader for this graph, or remove the node") -> UnsupportedError:
    """Returns the error for a feature that cannot reach the workers."""
    return UnsupportedError(f"{what} cannot be used with {_WHO}; {instead}")


def refuse_loader(who: str, model: Any, instead: str) -> UnsupportedError:
    """Returns the error of one of this pack's nodes for a MODEL from another loader.

    Args:
        who: name of the node.
        instead: advice for a MODEL from ComfyUI's own loader.
    """
    if type(model).__name__ == "GGUFModelPatcher":
        instead = "Choose the .gguf file in Load Diffusion Model (SP), instead of Unet Loader (GGUF)"
    return UnsupportedError(f"{who} works on the MODEL of {_WHO} only; this one comes from another loader. {instead}")


def refuse_value(name: str, value: Any) -> UnsupportedError:
    """Returns the error for an input that is neither a tensor nor plain data, e.g. ControlNet's residuals."""
    if name == "control":
        return refuse("ControlNet", "remove Apply ControlNet")
    if name.startswith("transformer_options."):
        return refuse(f"{node_of(value)} (the option {name.partition('.')[2]!r})")
    return refuse(f"the conditioning input {name!r} ({type(value).__name__})", "remove the node that adds it")


def refuse_transformer_options(options: Mapping[str, Any]) -> None:
    """Refuses code of nodes that would run inside the network's blocks.

    Args:
        options: `transformer_options`.

    Raises:
        UnsupportedError: there is such code; the message names the node if its function reveals it, and the kind of
            patch.
    """
    understood = as_data(options)
    for option, what in _OPTIONS.items():
        value = options.get(option)
        if not value or option in understood:
            continue
        nodes = sorted({name for function in _functions(value) if (name := node_of(function))})
        raise refuse(f"{', '.join(nodes)} ({what})" if nodes else f"{what} ({option})")


def refuse_skipping(functions: Any, possible: Any, cache: Any) -> None:
    """Refuses nodes that skip blocks, if the workers cannot skip them.

    Args:
        functions: functions that replace the blocks.
        possible: truthy if blocks of this network can be skipped.
        cache: cache of this sampling, or None.

    Raises:
        UnsupportedError: the workers cannot; the message names the node.
    """
    nodes = " and ".join(sorted({node_of(function) for function in _functions(functions)}))
    if not possible:
        raise refuse(f"{nodes} with this model")
    if cache is not None:
        raise refuse(f"{nodes} together with a cache between steps", "remove one of the two nodes")


def refuse_sampling_functions(model_options: Mapping[str, Any]) -> None:
    """Refuses guidance that replaces blocks only later, possibly in the middle of the sampling.

    Raises:
        UnsupportedError: there is such guidance; the message names the node.
    """
    for option, value in model_options.items():
        for function in _functions(value) if option.startswith("sampler_") else []:
            code = getattr(function, "__code__", None)
            if code is not None and _REPLACES in code.co_names and not _skips(function):
                raise refuse(f"{node_of(function)} (a block replacement)")


def warn_of_native_compile(model_options: Mapping[str, Any]) -> None:
    """Warns of ComfyUI's TorchCompileModel: it does no harm, but has no network to compile in this process."""
    if "torch_compile_kwargs" in model_options:
        log.warning("TorchCompileModel changes nothing with %s; use Torch Compile (SP)", _WHO)


def _functions(value: Any) -> list[Any]:
    """Returns the callables in a nest of dicts and lists."""
    if isinstance(value, Mapping):
        return [function for part in value.values() for function in _functions(part)]
    if isinstance(value, list | tuple):
        return [function for part in value for function in _functions(part)]
    return [value] if callable(value) else []


def _skips(function: FunctionType) -> bool:
    """Returns True if all functions by which `function` can replace a block skip the block."""
    used = inspect.getclosurevars(function).nonlocals.values()
    own = [value for value in used if isinstance(value, FunctionType)]
    return bool(own) and all(map(hands_on, own))


def node_of(value: Any) -> str:
    """Names the node that made a function or object: `SkipLayerGuidanceDiT.execute.<locals>.skip` →
    `SkipLayerGuidanceDiT`, and `DiffSynthCnetPatch` → the nodes whose code names this class or function."""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    name = name.partition(".")[0].removeprefix("<lambda>")
    nodes: dict[str, type] = getattr(importlib.import_module("nodes"), "NODE_CLASS_MAPPINGS", {})  # ComfyUI's module
    if not name or any(node.__name__ == name for node in nodes.values()):
        return name
    return " or ".join(sorted(node for node, made in nodes.items() if name in _named_in(made))) or name


def _named_in(node: type) -> set[str]:
    """Returns the names that the code of a node's methods uses."""

    def within(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from within(constant)

    methods = [getattr(method, "__func__", method) for base in node.__mro__ for method in vars(base).values()]
    return {name for method in methods if isinstance(method, FunctionType) for name in within(method.__code__)}
