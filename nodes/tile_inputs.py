"""The inputs of the nodes that cut pictures and videos into tiles."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel.errors import ConfigError
from .sp_config import SPConfig


def tile_inputs(does: str, *, step: int, temporal_size: int = 64) -> list[Any]:
    """Returns the inputs for tile sizes, as in ComfyUI's tiled nodes, and for the devices.

    Args:
        does: verb of the tooltips, e.g. "decode".
        step: step of tile_size, in pixels.
        temporal_size: default of temporal_size, in frames.
    """
    return [
        io.Int.Input("tile_size", default=512, min=64, max=4096, step=step, tooltip="Height and width, in pixels."),
        io.Int.Input(
            "overlap",
            default=64,
            min=0,
            max=4096,
            step=32,
            tooltip="Pixels that neighbouring tiles share and blend.",
        ),
        io.Int.Input(
            "temporal_size",
            default=temporal_size,
            min=8,
            max=4096,
            step=4,
            tooltip=f"Video only: frames to {does} at a time. For Wan at least the whole video: with less, colours can"
            " jump where tiles meet.",
        ),
        io.Int.Input(
            "temporal_overlap",
            default=8,
            min=4,
            max=4096,
            step=4,
            tooltip="Video only: frames that neighbouring tiles share and blend.",
        ),
        SPConfig.Input(
            "sp_config",
            optional=True,
            tooltip="Devices. Without it: those of the workers that run already, or of the setting Default devices.",
        ),
    ]


def check_overlap(vae: Any, tile_size: int, overlap: int) -> None:
    """Refuses an overlap with which ComfyUI's VAE Encode (Tiled) would never end.

    Raises:
        ConfigError: the overlap leaves nothing of a tile.
    """
    # Pictures are cut three times, also into tiles of half the height or width.
    limit = tile_size // 2 if vae.latent_dim == 2 else tile_size
    if overlap >= limit:
        raise ConfigError(f"overlap is {overlap}; with tile_size {tile_size} it must be less than {limit}")
