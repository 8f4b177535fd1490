"""Maps networks to the names under which TeaCache's published polynomials know them: family, and configuration by
diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Known = tuple[str, dict[str, Any]]
"""Family and configuration, as `cache.coefficients` takes them."""


def _wan(config: Mapping[str, Any]) -> Known:
    return "wan", {
        "num_attention_heads": config.get("num_heads"),
        "in_channels": config.get("in_dim"),
        "out_channels": config.get("out_dim"),
        "image_dim": 1280 if config.get("model_type") == "i2v" else None,
    }


def _ltxv(config: Mapping[str, Any]) -> Known:
    return "ltxv", {
        "num_layers": config.get("num_layers"),
        "causal_temporal_positioning": config.get("causal_temporal_positioning", False),
    }


def _flux(config: Mapping[str, Any]) -> Known:
    """Recognises FLUX.1 by its pooled text, which FLUX.2 and other models of this class do not take."""
    is_flux_1 = config.get("image_model") == "flux" and config.get("vec_in_dim")
    return "flux" if is_flux_1 else "this model of the class Flux", {}


def _hunyuan_video(config: Mapping[str, Any]) -> Known:
    """Recognises the first HunyuanVideo, likewise by its pooled text."""
    return "hunyuan_video" if config.get("vec_in_dim") else "this model of the class HunyuanVideo", {}


def _cogvideox(config: Mapping[str, Any]) -> Known:
    """Passes the configuration on: the classes of both libraries have this name, and the same names for its entries."""
    return "cogvideox", {"patch_size_t": None, **config}


_NETWORKS: Mapping[str, Callable[[Mapping[str, Any]], Known]] = {
    "AsymmDiTJoint": lambda config: ("mochi", {}),
    "CogVideoXTransformer3DModel": _cogvideox,
    "Flux": _flux,
    "HunyuanVideo": _hunyuan_video,
    "LTXVModel": _ltxv,
    "WanModel": _wan,
    "WanTransformer3DModel": lambda config: ("wan", dict(config)),
}


def known_as(network: str, config: Mapping[str, Any]) -> Known:
    """Returns the arguments for `cache.coefficients`, which refuses a class that it does not know by its name.

    Args:
        network: name of the class.
        config: see `Recipe.arguments`.
    """
    return _NETWORKS[network](config) if network in _NETWORKS else (network, {})
