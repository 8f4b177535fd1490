"""As what TeaCache's published polynomials know networks: family and configuration by diffusers' names."""

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
    """FLUX.1: FLUX.2 and others of this class take no pooled text."""
    is_flux_1 = config.get("image_model") == "flux" and config.get("vec_in_dim")
    return "flux" if is_flux_1 else "this model of the class Flux", {}


def _hunyuan_video(config: Mapping[str, Any]) -> Known:
    """The first one, likewise."""
    return "hunyuan_video" if config.get("vec_in_dim") else "this model of the class HunyuanVideo", {}


def _cogvideox(config: Mapping[str, Any]) -> Known:
    """Both libraries' classes have this name, and the same names for these."""
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
    """What to ask `cache.coefficients` for; it refuses a class that is not known by its name.

    Args:
        network: the class.
        config: see `Recipe.arguments`.
    """
    return _NETWORKS[network](config) if network in _NETWORKS else (network, {})
