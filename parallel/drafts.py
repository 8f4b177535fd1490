"""Drafts a split plan for one of ComfyUI's networks: `python -m parallel plan CLASS`, with ComfyUI's Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .errors import ConfigError

ENOUGH = 6
"""Minimum number of tokens of a small latent, so that it is not mistaken for another size."""


def draft(
    network: str, config: str = "", inputs: Sequence[str] = (), larger: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """Lists a network's modules with the arguments of their calls, a draft of its plan, and its plan if it has one.

    Args:
        network: name of a class in `comfy.ldm`, or a safetensors file.
        config: arguments of the class's constructor, as JSON or a file with JSON; empty: its defaults.
        inputs: arguments of its forward, each as NAME=JSON.
        larger: those of `inputs` that change with a larger latent, with their values for it.

    Raises:
        ConfigError: ComfyUI, the class or an argument is missing, or the arguments are not sufficient.
    """
    settings = _config(config)
    given, grown = (dict(map(_input, some)) for some in (inputs, larger))
    trial = _trial()
    from .plans.comfyui import plan_of
    from .plans.drafting import Draft, source, written

    def made_on(device: str) -> Any:
        if network.endswith((".safetensors", ".sft")):
            return trial.network_of_file(network, torch.device(device))
        return trial.network_of_class(network, settings, torch.device(device))

    def drafted_of(made: Any) -> Draft:
        """Drafts the plan, with larger latents if small ones have too few tokens, as in pixel space."""
        drafted = Draft(trial.passes(made, given, grown))
        if min((sizes[0] for sizes in drafted.streams.values()), default=ENOUGH) < ENOUGH:
            drafted = Draft(trial.passes(made, given, grown, times=8))
        return drafted

    made = made_on("meta")
    try:
        drafted = drafted_of(made)
    except NotImplementedError as error:  # its shapes depend on values, which the meta device does not have
        if (count := sum(each.numel() for each in made.parameters())) > trial.RUNS_ON_CPU:
            raise ConfigError(
                f"{network} runs on a CPU only ({error}), and has {count} parameters; give a config with at most"
                f" {trial.RUNS_ON_CPU}"
            ) from error
        made = made_on("cpu")
        drafted = drafted_of(made)
    name = type(made).__name__
    existing = written(name, plan) if (plan := plan_of(made)) else ""
    text = [drafted.tree(), "", "A draft; see CONTRIBUTING, Add a model by a plan. The order of streams is a guess."]
    text += [written(name, drafted.plan)] if drafted.plan else ["# no list of blocks attends to tokens of the latent"]
    if existing:
        text += ["", f"{name} has this plan:", existing]
    sites = {
        path: {
            "cut": {argument: source(rule) for argument, rule in site.cut.items()},
            "whole": (site.whole or "").split(),
            "attention": {module: source(pair) for module, pair in site.attention.items()},
            "join": source(site.join) if site.join else "",
        }
        for path, site in drafted.plan.items()
    }
    return {"class": name, "streams": drafted.streams, "sites": sites, "plan": existing}, "\n".join(text)


def _trial() -> ModuleType:
    """Returns the module that imports ComfyUI."""
    from .comfyui.start import find, prepare

    folder = find()
    try:
        prepare(folder, {"cpu": True, "use_pytorch_cross_attention": True})
        from .comfyui import trial
    except ImportError as error:
        raise ConfigError(f"ComfyUI at {folder} cannot be imported ({error}); run this with its Python") from error
    return trial


def _config(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"config is {text!r}; give a JSON object, or a file with one ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"config is {text!r}; give a JSON object")
    return found


def _input(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if equals and name:
            return name, json.loads(value)
    except ValueError:
        pass
    raise ConfigError(f"input is {text!r}; give NAME=JSON, e.g. x=[1,16,10,14] for a tensor's shape, or num_tokens=7")
