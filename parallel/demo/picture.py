"""Decodes a latent to an animated file, with a tiny random VAE of HunyuanVideo's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_TILE = 128
"""Tile size in pixels; tiles overlap by a quarter."""


def decode_in_tiles(latent: Tensor) -> Tensor:
    """Decodes a latent [1, 16, T, H, W] to frames [4T − 3, 8H, 8W, 3] as uint8."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    vae: Any = AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=16
    )
    vae.eval()
    vae.enable_tiling(
        tile_sample_min_height=_TILE,
        tile_sample_min_width=_TILE,
        tile_sample_stride_height=_TILE * 3 // 4,
        tile_sample_stride_width=_TILE * 3 // 4,
    )
    with torch.no_grad():
        video = vae.decode(latent).sample[0]
    low, high = video.amin(), video.amax()
    return ((video - low) / (high - low) * 255).to(torch.uint8).permute(1, 2, 3, 0)


def write_animation(frames: Tensor, path: Path, frames_per_second: int = 12) -> Path:
    """Writes [F, H, W, 3] uint8 frames as an animated WebP and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(frame.numpy()) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=1000 // frames_per_second, loop=0)
    return path
