"""What cannot work when the network's blocks run in other processes, refused by the name of the node that wants it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from ..parallel.errors import UnsupportedError

log = logging.getLogger("sequence_parallel")

_WHO = "Load Diffusion Model (SP)"

_OPTIONS = {
    "patches": "a block patch",
    "patches_replace": "a block replacement",
    "optimized_attention_override": "an attention override",
    "rope_options": "changed position embeddings",
}


_REPLACES = "set_model_options_patch_replace"
"""What ComfyUI's guidance nodes call, e.g. SkipLayerGuidanceDiT and PerturbedAttentionGuidance."""


def refuse(what: str, instead: str = "use Load Diffusion Model for this graph, or remove the node") -> UnsupportedError:
    """The error for a feature that cannot reach the workers."""
    return UnsupportedError(f"{what} cannot be used with {_WHO}; {instead}")


def refuse_value(name: str, value: Any) -> UnsupportedError:
    """The error for a conditioning input that is no tensor, e.g. ControlNet's residuals."""
    if name == "control":
        return refuse("ControlNet", "remove Apply ControlNet")
    return refuse(f"the conditioning input {name!r} ({type(value).__name__})", "remove the node that adds it")


def refuse_transformer_options(options: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """Refuses code that nodes want to run inside the network's blocks.

    Args:
        options: `transformer_options`.
        allowed: options that this network heeds.

    Raises:
        UnsupportedError: naming the node where its function tells, else the kind of patch.
    """
    for option, what in _OPTIONS.items():
        value = options.get(option)
        if not value or option in allowed:
            continue
        nodes = sorted({name for function in _functions(value) if (name := node_of(function))})
        raise refuse(f"{', '.join(nodes)} ({what})" if nodes else f"{what} ({option})")


def refuse_sampling_functions(model_options: Mapping[str, Any]) -> None:
    """Refuses guidance that will replace blocks when its time has come, which may be in the middle of the sampling.

    Raises:
        UnsupportedError: naming the node.
    """
    for option, value in model_options.items():
        for function in _functions(value) if option.startswith("sampler_") else []:
            code = getattr(function, "__code__", None)
            if code is not None and _REPLACES in code.co_names:
                raise refuse(f"{node_of(function)} (a block replacement)")


def warn_of_native_compile(model_options: Mapping[str, Any]) -> None:
    """ComfyUI's TorchCompileModel does no harm, but there is no network in this process for it to compile."""
    if "torch_compile_kwargs" in model_options:
        log.warning("TorchCompileModel changes nothing with %s; use Torch Compile (SP)", _WHO)


def _functions(value: Any) -> list[Any]:
    """The callables in a nest of dicts and lists."""
    if isinstance(value, Mapping):
        return [function for part in value.values() for function in _functions(part)]
    if isinstance(value, list | tuple):
        return [function for part in value for function in _functions(part)]
    return [value] if callable(value) else []


def node_of(function: Any) -> str:
    """`SkipLayerGuidanceDiT.execute.<locals>.skip` → `SkipLayerGuidanceDiT`."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return name.partition(".")[0].removeprefix("<lambda>")
