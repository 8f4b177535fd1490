"""A transformer folder of diffusers (`config.json` and safetensors): its class built without weights, its tensors
mapped."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SequenceParallelConfig
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..headers import read_json
from ..host.recipe import Recipe
from ..plans.diffusers import CHANNELS_DIM, PLANS
from ..quantise.networks import linear_layers
from ..split.routes import ThroughTorch
from ..split.sites import Plan
from ..versions import describe_libraries
from .tensors import mapped

CONFIG = "config.json"
_COMPUTES = (torch.float32, torch.bfloat16, torch.float16)


class NetworkFile:
    """A folder, mapped.

    Args:
        path: path of the folder.
        weight_dtype: dtype in which weights are kept and computed with; None is the file's. Weights that diffusers
            keeps in fp32 stay in fp32.
        device: device that the network will run on.

    Raises:
        CheckpointError: the folder is damaged, or incomplete.
        UnsupportedError: its class has no plan.
    """

    routes = ThroughTorch
    attention = "sdpa"

    def __init__(self, path: str, weight_dtype: torch.dtype | None, device: torch.device):
        self._path, self._weight_dtype = path, weight_dtype
        self._config = read_config(path)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by the network's names, mapped."""
        ignored = transformer_class(self._config["_class_name"])._keys_to_ignore_on_load_unexpected or ()
        return {
            name: tensor
            for name, tensor in mapped(self._path).items()
            if not any(re.search(pattern, name) for pattern in ignored)
        }

    def network(self) -> tuple[nn.Module, dict[str, torch.dtype]]:
        """Builds diffusers' network. Its parameters are the file's mapped tensors, without a copy.

        Returns:
            The network; name of a parameter → dtype in which it is kept, if that is not the file's.
        """
        tensors = self.tensors()
        from diffusers.models.modeling_utils import no_init_weights

        # The memory allocated for weights is never touched, so the system never commits it. Buffers are in no file.
        with no_init_weights():
            network: nn.Module = _made(self._path, self._config)
        wanted = {name: parameter.shape for name, parameter in network.named_parameters()}
        for name, tensor in tensors.items():
            if name in wanted and tensor.shape != wanted[name]:
                raise CheckpointError(
                    f"{self._path}: tensor {name!r} has the shape {list(tensor.shape)},"
                    f" but {type(network).__name__} needs {list(wanted[name])}"
                )
        missing, unexpected = network.load_state_dict(tensors, strict=False, assign=True)
        for names, what in ((missing, "lacks"), (unexpected, "has, and should not have,")):
            if names:
                raise CheckpointError(
                    f"{self._path} {what} {len(names)} tensors of {type(network).__name__}, e.g. {', '.join(names[:3])}"
                )
        return network.eval().requires_grad_(False), _changed_dtypes(network, tensors, self._weight_dtype)

    def plan(self, network: nn.Module) -> Plan:
        """Returns the plan of the network's class."""
        return PLANS[type(network).__name__]


def recipe(path: str, config: SequenceParallelConfig, weight_dtype: torch.dtype | None = None) -> Recipe:
    """Returns the recipe by which workers build a folder's network. Reads its headers; see `NetworkFile` for the
    arguments.

    Raises:
        ConfigError: diffusers' layers cannot compute in `weight_dtype`.
        CheckpointError: the folder is damaged.
        UnsupportedError: its class has no plan, or diffusers cannot be imported.
    """
    if weight_dtype not in (None, *_COMPUTES):
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _COMPUTES)
        raise ConfigError(
            f"weight_dtype is {str(weight_dtype).removeprefix('torch.')}, in which diffusers' layers cannot compute;"
            f" allowed are {allowed}, and None for the file's"
        )
    with torch.device("meta"):
        network = _made(path, read_config(path))
    name, arguments = type(network).__name__, dict(network.config)  # with defaults for entries that the file omits
    tensors = NetworkFile(path, weight_dtype, torch.device("cpu")).tensors()
    changed = _changed_dtypes(network, tensors, weight_dtype)
    dtypes = {n: changed.get(n, tensor.dtype) for n, tensor in tensors.items()}
    return Recipe(
        library="diffusers",
        path=path,
        weight_dtype=weight_dtype,
        network=name,
        config=config,
        nbytes=sum(prod(tensor.shape) * dtypes[n].itemsize for n, tensor in tensors.items()),
        in_the_file=sum(tensor.nbytes for n, tensor in tensors.items() if n not in changed),
        heads=arguments["num_attention_heads"],
        arguments=arguments,
        channels=arguments.get("out_channels") or arguments["in_channels"],
        channels_dim=CHANNELS_DIM.get(name, 1),
        linear=tuple(linear_layers(network, PLANS[name], dtypes)),
    )


def read_config(path: str) -> dict[str, Any]:
    """Returns a folder's `config.json`.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UnsupportedError: its class has no plan.
    """
    try:
        config = read_json(Path(path) / CONFIG)
        name = str(config["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no transformer folder of diffusers: {CONFIG}: {error!r}") from error
    if name not in PLANS:
        raise UnsupportedError(
            f"{path} is a {name[:100]}, which has no plan; plans exist for {', '.join(sorted(PLANS))}"
        )
    return dict(config)


def transformer_class(name: str) -> Any:
    """Returns diffusers' class.

    Raises:
        UnsupportedError: it cannot be imported; names the versions of all packages that diffusers imports.
    """
    try:
        return getattr(importlib.import_module("diffusers"), name)
    except Exception as error:  # an optional package of diffusers may raise anything while it is imported
        raise UnsupportedError(
            f"diffusers cannot be imported: {type(error).__name__}: {error} ({describe_libraries()})."
            " Some of these packages do not fit together; `pip install -U diffusers transformers` brings a set that"
            " does"
        ) from error


def _made(path: str, config: Mapping[str, Any]) -> Any:
    """Builds the network of the class in `config`, with arbitrary weights.

    Raises:
        CheckpointError: the class does not accept these values.
    """
    made = transformer_class(config["_class_name"])
    try:
        return made.from_config(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {config['_class_name']} cannot be made as {CONFIG} says: {type(error).__name__}: {error}"
        ) from error


def _changed_dtypes(
    network: nn.Module, tensors: Mapping[str, Tensor], weight_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Returns the tensors that are kept in another dtype than the file's."""
    if weight_dtype is None:
        return {}
    fp32 = getattr(network, "_keep_in_fp32_modules", None) or ()
    wanted = {
        name: torch.float32 if any(part in name.split(".") for part in fp32) else weight_dtype for name in tensors
    }
    return {name: dtype for name, dtype in wanted.items() if tensors[name].dtype != dtype}
