"""Test-only nodes for templates: what models around the sampled one give, for nothing, always alike."""

import copy
import zlib
from types import SimpleNamespace
from typing import Any

import torch
from comfy.ldm.sam3.tracker import pack_masks
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

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
    """Makes latents of the right shape of pictures, videos and sound: noise and mean colours."""

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
        if pixels.ndim == 3:  # sound: [batch, samples, channels]
            generator = torch.Generator().manual_seed(int(pixels.float().abs().sum() * 100) % 2**31)
            return torch.randn(1, self._channels, *((2, 9) if self._channels == 32 else (9, 16)), generator=generator)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])[..., :3].float()
        count, *sides = pixels.shape[:3]
        size = [min(side // self._stride, LARGEST) for side in sides]
        means = adaptive_avg_pool2d(
            pixels.movedim(-1, 1), size
        )  # they may come from a sampler: nearly the same, nearly
        if self._frames:
            means = means[::4]
        noise = torch.randn(len(means), self._channels, *size, generator=torch.Generator().manual_seed(count))
        colours = torch.randn(self._channels, 3, generator=torch.Generator().manual_seed(0))
        latent = noise + torch.einsum("cp,nphw->nchw", colours, means - 0.5)
        return latent.movedim(0, 1)[None] if self._frames else latent

    def encode_tiled(self, pixels: Tensor, **_: Any) -> Tensor:
        return self.encode(pixels)

    def decode(self, latent: Tensor) -> Tensor:
        """Of a video."""
        frames = latent[:, :3].sigmoid().movedim(1, -1)
        frames = torch.cat([frames[:, :1], frames[:, 1:].repeat_interleave(4, 1)], 1)
        return frames.repeat_interleave(self._stride, 2).repeat_interleave(self._stride, 3)


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


class SPTemplateCLIPVision:
    """A CLIP vision model: random tokens, always the same."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        hidden = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(4))
        output = SimpleNamespace(penultimate_hidden_states=hidden, last_hidden_state=hidden)
        return (SimpleNamespace(encode_image=lambda image, crop: output),)


class SPTemplateTrack:
    """What SAM3 finds in a video: one thing that goes from left to right."""

    CATEGORY = "testing"
    RETURN_TYPES = ("SAM3_TRACK_DATA",)
    FUNCTION = "track"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"images": ("IMAGE",)}}

    def track(self, images: Tensor) -> tuple:
        count, height, width = images.shape[:3]
        columns = (torch.arange(width) - torch.arange(count)[:, None] * 2) % width < width // 3
        masks = columns[:, None, None].expand(count, 1, height, width)
        return ({"packed_masks": pack_masks(masks), "orig_size": (height, width), "n_frames": count},)


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (SPTemplateCLIP, SPTemplateVAE, SPTemplateCLIPVision, SPTemplateTrack)
}
