"""ComfyUI's own VAEs with random weights. Imported where ComfyUI can be: in its process, not in the tests'."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.ldm.cogvideo.vae
import comfy.ldm.genmo.vae.model
import comfy.ldm.lightricks.vae.causal_video_autoencoder
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.taesd.taehv
import comfy.taesd.taesd
import torch
from torch import nn

_PICTURE = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_WAN = {
    "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True], "dropout": 0.0,
}  # fmt: skip

_HUNYUAN_15 = {
    "block_out_channels": [128, 256, 512, 1024, 1024], "in_channels": 3, "out_channels": 3, "num_res_blocks": 2,
    "ffactor_spatial": 16, "ffactor_temporal": 4, "downsample_match_channel": True, "upsample_match_channel": True,
    "z_channels": 32,
}  # fmt: skip
_LTX_2 = {
    "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128, "norm_layer": "pixel_norm", "patch_size": 4,
    "latent_log_var": "uniform", "causal_decoder": False, "encoder_base_channels": 16, "decoder_base_channels": 16,
    "blocks": [["res_x", 1], *([["compress_all", 1], ["res_x", 1]] * 3)],
}  # fmt: skip


def _engine(module: str, parameters: dict[str, Any], regularizer: str) -> nn.Module:
    parts = {
        f"{part.lower()}_config": {"target": f"{module}.{part}", "params": parameters}
        for part in ("Encoder", "Decoder")
    }
    target = {"target": f"comfy.ldm.models.autoencoder.{regularizer}"}
    return comfy.ldm.models.autoencoder.AutoencodingEngine(regularizer_config=target, **parts)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: _engine("comfy.ldm.modules.diffusionmodules.model", _PICTURE, "DiagonalGaussianRegularizer"),
    "hunyuan_video": lambda: comfy.ldm.models.autoencoder.AutoencoderKL(
        ddconfig={**_PICTURE, "conv3d": True, "time_compress": 4}, embed_dim=16
    ),
    "wan_2_1": lambda: comfy.ldm.wan.vae.WanVAE(dim=16, image_channels=3, conv_out_channels=3, **_WAN),
    "hunyuan_video_15": lambda: _engine("comfy.ldm.hunyuan_video.vae_refiner", _HUNYUAN_15, "EmptyRegularizer"),
    "wan_2_2": lambda: comfy.ldm.wan.vae2_2.WanVAE(**_WAN | {"dim": 160, "z_dim": 48}),
    "mochi": comfy.ldm.genmo.vae.model.VideoVAE,
    "ltxv": comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE,
    "ltx_2": lambda: comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE(config=_LTX_2),
    "flux2": lambda: comfy.ldm.models.autoencoder.AutoencoderKL(
        ddconfig={**_PICTURE, "z_channels": 32, "batch_norm_latent": True}, embed_dim=32
    ),
    "cogvideox": lambda: comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX(latent_channels=16),
    # The small ones for previews. Latents of the same channels and sizes as those of:
    "tiny_flux": lambda: comfy.taesd.taesd.TAESD(latent_channels=16),
    "tiny_flux2": lambda: comfy.taesd.taesd.TAESD(latent_channels=128),
    "tiny_mochi": lambda: comfy.taesd.taehv.TAEHV(latent_channels=12),
    "tiny_hunyuan_video_15": lambda: comfy.taesd.taehv.TAEHV(latent_channels=32),
    "tiny_ltxv": lambda: comfy.taesd.taehv.TAEHV(latent_channels=128),
}
_METADATA: dict[str, dict[str, Any]] = {
    "tiny_flux2": {"tae_latent_channels": 128},
    "ltx_2": {"config": json.dumps({"vae": _LTX_2})},
}


def make_vae(kind: str, seed: int = 0) -> comfy.sd.VAE:
    """As Load VAE makes it from a file; in float32, but for the largest."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if kind == "hunyuan_video_15" else torch.float32
    with torch.device("meta"):
        shapes = NETWORKS[kind]().state_dict()
    state = {name: _random(name, tensor, generator).to(dtype) for name, tensor in shapes.items()}
    return comfy.sd.VAE(sd=state, dtype=dtype, metadata=_METADATA.get(kind))


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if name.endswith(("running_var", "std-of-means")):
        return 1 + torch.rand(tensor.shape, generator=generator)
    if tensor.ndim < 2:
        value = torch.randn(tensor.shape, generator=generator) * 0.1
        return value + 1 if name.endswith(("weight", "gamma")) else value
    if name.endswith("gamma"):  # Wan's norms
        return 1 + torch.randn(tensor.shape, generator=generator) * 0.1
    fan_in = tensor[0].numel()
    return torch.randn(tensor.shape, generator=generator) / fan_in**0.5
