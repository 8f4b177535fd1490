"""TeaCache's polynomials, which estimate the change of a network's output from that of a timestep-modulated input.

They were fitted to each model by TeaCache's authors (https://arxiv.org/abs/2411.19108), and published at
https://github.com/ali-vilab/TeaCache in `TeaCache4HunyuanVideo/teacache_sample_video.py`,
`TeaCache4FLUX/teacache_flux.py`, `TeaCache4Mochi/teacache_mochi.py`, `TeaCache4LTX-Video/teacache_ltx.py`,
`TeaCache4Wan2.1/teacache_generate.py` (Wan with `--use_ret_steps`, whose input is the modulation itself, e0) and
`TeaCache4CogVideoX1.5/teacache_sample_video.py` (whose input is the time embedding); for
FLUX.1 Kontext at https://github.com/welltop-cn/ComfyUI-TeaCache, `nodes.py`. TeaCache is not available here for a model
without a published polynomial: with another model's, steps would be skipped at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedError

Polynomial = tuple[float, ...]
"""Coefficients, highest degree first."""

HUNYUAN_VIDEO: Polynomial = (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02)
FLUX: Polynomial = (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)
FLUX_KONTEXT: Polynomial = (-1.04655119e03, 3.12563399e02, -1.69500694e01, 4.10995971e-01, 3.74537863e-02)
MOCHI: Polynomial = (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03)
LTXV: Polynomial = (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03)
WAN_T2V_1_3B: Polynomial = (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02)
WAN_T2V_14B: Polynomial = (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01)
WAN_I2V_480P: Polynomial = (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01)
WAN_I2V_720P: Polynomial = (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02)
COGVIDEOX_2B: Polynomial = (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03)
COGVIDEOX_5B: Polynomial = (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)
COGVIDEOX_15: Polynomial = (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02)
COGVIDEOX_15_I2V: Polynomial = (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02)

_COGVIDEOX = {
    (30, 16, None): COGVIDEOX_2B,
    (48, 16, None): COGVIDEOX_5B,
    (48, 32, None): COGVIDEOX_5B,
    (48, 16, 2): COGVIDEOX_15,
    (48, 32, 2): COGVIDEOX_15_I2V,
}
"""Maps (heads, channels, frames per patch) to polynomials."""
_HEADS_OF_1_3B, _HEADS_OF_14B = 12, 40
_LAYERS_OF_LTXV_2B = 28
_LATENT_PIXELS_OF_480P = 832 * 480 // 64


def coefficients(
    family: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Polynomial:
    """Returns the polynomial of a checkpoint, see `settings.CacheSettings.rule` for the arguments.

    Raises:
        UnsupportedError: no polynomial has been published for the checkpoint.
    """
    if family == "hunyuan_video":
        return HUNYUAN_VIDEO
    if family == "flux":
        return FLUX_KONTEXT if any(name.startswith("ref_latents.") for name in shapes or {}) else FLUX
    if family == "mochi":
        return MOCHI
    if family == "ltxv":
        if config["num_layers"] == _LAYERS_OF_LTXV_2B and not config["causal_temporal_positioning"]:
            return LTXV
        raise _unknown(
            f"this LTXV model ({config['num_layers']} layers, causal_temporal_positioning"
            f" {config['causal_temporal_positioning']}; published is 2B 0.9.1)"
        )
    if family == "wan":
        return _of_wan(config, shapes)
    if family == "cogvideox":
        return _of_cogvideox(config)
    raise _unknown(family)


def _of_cogvideox(config: Mapping[str, Any]) -> Polynomial:
    key = tuple(config[name] for name in ("num_attention_heads", "in_channels", "patch_size_t"))
    if key in _COGVIDEOX:
        return _COGVIDEOX[key]
    raise _unknown(
        f"this CogVideoX model ({key[0]} heads, in_channels {key[1]}; published are 2B, 5B and 1.5 5B, text to video"
        " and image to video)"
    )


def _of_wan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None) -> Polynomial:
    heads, channels, has_image = config["num_attention_heads"], config["in_channels"], config["image_dim"] is not None
    if channels == config["out_channels"] and not has_image:
        if heads == _HEADS_OF_1_3B and channels == 16:
            return WAN_T2V_1_3B
        if heads == _HEADS_OF_14B and channels == 16:
            return WAN_T2V_14B
    if heads == _HEADS_OF_14B and has_image:
        # The checkpoints for the two resolutions have the same config: the latent's size tells which one is in use.
        height, width = shapes["x"][3:] if shapes is not None else (0, 0)
        return WAN_I2V_480P if height * width <= 1.5 * _LATENT_PIXELS_OF_480P else WAN_I2V_720P
    raise _unknown(
        f"this Wan model (in_channels {channels}, {heads} heads, {'with' if has_image else 'without'} CLIP image"
        " layers; published are Wan 2.1 text to video 1.3B and 14B, and image to video 14B)"
    )


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"TeaCache (SP): no TeaCache coefficients have been published for {what}; use First Block Cache (SP)"
    )
