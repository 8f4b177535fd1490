"""Test-only nodes for templates: text encoders and VAEs that cost nothing, always the same for the same inputs."""

import copy
import zlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 12
"""Rows and columns of a latent, however large the picture."""


class _CLIP:
    """As a text encoder: one row of random numbers for some letters, as many as the text says."""

    def __init__(self, width: int):
        self.cond_stage_model = nn.Module()
        self._width = width

    def clone(self, *_: Any, **__: Any) -> "_CLIP":
        return copy.copy(self)

    def add_patches(self, *_: Any, **__: Any) -> list:
        return []

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, *_: Any, **__: Any) -> list:
        generator = torch.Generator().manual_seed(zlib.crc32(tokens.encode()))
        text = torch.randn(1, 6 + len(tokens) % 4, self._width, generator=generator)
        return [[text, {"pooled_output": torch.randn(1, 768, generator=generator)}]]


class _VAE:
    """Encodes pictures, videos and sound to random latents of the right shape."""

    audio_sample_rate = 32000

    def __init__(self, channels: int, stride: int, frames: bool):
        self._channels, self._stride, self._frames = channels, stride, frames
        self.latent_channels = channels
        self.first_stage_model = SimpleNamespace(
            latent_frequency_bins=16, num_of_latents_from_frames=lambda frames, rate: round(frames * 25 / rate)
        )

    def spacial_compression_encode(self) -> int:
        return self._stride

    def encode(self, pixels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(pixels.float().abs().sum() * 100) % 2**31)
        if pixels.ndim == 3:  # sound: [batch, samples, channels]
            shape = (1, self._channels, *((2, 9) if self._channels == 32 else (9, 16)))
        else:
            count, *sides = pixels.shape[:3]
            size = [min(side // self._stride, LARGEST) for side in sides]
            shape = (1, self._channels, (count - 1) // 4 + 1, *size) if self._frames else (count, self._channels, *size)
        return torch.randn(shape, generator=generator)


class SPTemplateCLIP:
    """A text encoder."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"width": ("INT", {"max": 1 << 20})}}

    def make(self, width: int) -> tuple:
        return (_CLIP(width),)


class SPTemplateVAE:
    """A VAE."""

    CATEGORY = "testing"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"channels": ("INT", {}), "stride": ("INT", {}), "frames": ("BOOLEAN", {})}}

    def make(self, channels: int, stride: int, frames: bool) -> tuple:
        return (_VAE(channels, stride, frames),)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (SPTemplateCLIP, SPTemplateVAE)}
