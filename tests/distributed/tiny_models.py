"""Tiny checkpoints, and the inputs of one step for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.adapters.base import pack_text
from parallel.config import SequenceParallelConfig
from parallel.demo.checkpoint import WRITERS
from parallel.host.group import WorkerGroup
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from tests.distributed.devices import on_ranks

StartGroup = Callable[[str], WorkerGroup]
TEXT_WIDTH = 64


class TinyModels:
    """A folder of checkpoints; asking twice for the same one writes it once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._written: dict[str, Path] = {}

    def path(self, family: str = "hunyuan_video", **options: Any) -> Path:
        """The checkpoint that `parallel.demo.checkpoint` makes of these options."""
        key = repr((family, sorted(options.items())))
        if key not in self._written:
            path = self._folder / f"{len(self._written)}.safetensors"
            WRITERS[family](path, **options)
            self._written[key] = path
        return self._written[key]


@dataclass(frozen=True)
class Inputs:
    """Sizes of one step's inputs."""

    frames: int | None = 2
    """None makes a picture's latent, without that dimension."""
    height: int = 8
    width: int = 8
    channels: int = 16
    text: int = 8
    valid: tuple[int, ...] | None = None
    """Valid text tokens of each sample; None sends no mask."""
    padding_first: bool = False
    batch: int = 1
    first_frame: float | None = None
    """Timestep of a given first frame."""
    references: tuple[tuple[int, int], ...] = ()
    """Heights and widths of further pictures, for FLUX."""
    method: str | None = None
    """How the references are placed."""
    sigma: bool = False
    """Timesteps of 0 to 1, not of 0 to 1000."""
    seed: int = 0

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        conditioning = {
            "context": random(self.batch, self.text, TEXT_WIDTH),
            "y": random(self.batch, 768),
            "guidance": torch.full((self.batch,), 6.0),
        }
        if self.valid is not None:
            mask = (torch.arange(self.text)[None] < torch.tensor(self.valid)[:, None]).long()
            conditioning["attention_mask"] = mask.flip(1) if self.padding_first else mask
        if self.first_frame is not None:
            conditioning["guiding_frame_index"] = torch.full((self.batch,), self.first_frame)
        for i, size in enumerate(self.references):
            conditioning[f"ref_latents.{i}"] = random(self.batch, self.channels, *size)
        if self.method is not None:
            conditioning["ref_latents_method"] = pack_text(self.method)
        frames = () if self.frames is None else (self.frames,)
        x = random(self.batch, self.channels, *frames, self.height, self.width)
        return x, torch.linspace(900, 300, self.batch) / (1000 if self.sigma else 1), conditioning


@dataclass(frozen=True)
class WanInputs:
    """Sizes of one step's inputs for Wan."""

    frames: int = 2
    height: int = 8
    width: int = 8
    channels: int = 16
    text: int = 8
    image: int = 0
    """CLIP's tokens; 0 sends none."""
    clean_frames: int = 0
    """Frames whose timestep is 0; with any, each frame has a timestep of its own."""
    batch: int = 1

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        conditioning = {"context": random(self.batch, self.text, TEXT_WIDTH)}
        if self.image:
            conditioning["clip_fea"] = random(self.batch, self.image, 1280)
        timestep = torch.linspace(900, 300, self.batch)
        if self.clean_frames:
            noisy = torch.arange(self.frames) >= self.clean_frames
            timestep = timestep[:, None] * noisy
            conditioning["denoise_mask"] = noisy.float()[None, None, :, None, None].expand(self.batch, 1, -1, 1, 1)
        return random(self.batch, self.channels, self.frames, self.height, self.width), timestep, conditioning


@dataclass(frozen=True)
class Hunyuan15Inputs:
    """Sizes of one step's inputs for HunyuanVideo 1.5."""

    frames: int = 2
    height: int = 4
    width: int = 4
    text: int = 8
    valid: tuple[int, ...] | None = None
    """As for HunyuanVideo."""
    glyphs: int = 3
    """ByT5's tokens; 0 sends none."""
    image: int = 0
    """SigLIP's."""
    batch: int = 1

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        conditioning = {"context": random(self.batch, self.text, TEXT_WIDTH), "guidance": torch.tensor([6.0])}
        if self.glyphs:
            conditioning["txt_byt5"] = random(self.batch, self.glyphs, 1472)
        if self.image:
            conditioning["clip_fea"] = random(self.batch, self.image, 1152)
        if self.valid is not None:
            conditioning["attention_mask"] = (torch.arange(self.text)[None] < torch.tensor(self.valid)[:, None]).long()
        x = random(self.batch, 65, self.frames, self.height, self.width)
        return x, torch.linspace(900, 300, self.batch), conditioning


@dataclass(frozen=True)
class CogVideoXInputs:
    """Sizes of one step's inputs for CogVideoX."""

    frames: int = 2
    height: int = 8
    width: int = 8
    channels: int = 16
    text: int = 8
    ofs: bool = False
    batch: int = 1

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        conditioning = {"context": random(self.batch, self.text, TEXT_WIDTH)}
        if self.ofs:
            conditioning["ofs"] = torch.full((self.batch,), 2.0)
        x = random(self.batch, self.channels, self.frames, self.height, self.width)
        return x, torch.linspace(900, 300, self.batch), conditioning


@dataclass(frozen=True)
class MochiInputs:
    """Sizes of one step's inputs for Mochi."""

    frames: int = 2
    height: int = 8
    width: int = 8
    text: int = 8
    valid: int = 8
    """Text tokens that are no padding."""
    batch: int = 1

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(0)
        conditioning = {
            "context": torch.randn(self.batch, self.text, TEXT_WIDTH, generator=generator),
            "attention_mask": (torch.arange(self.text) < self.valid).long().repeat(self.batch, 1),
            "num_tokens": pack_text(str(self.valid)),
        }
        x = torch.randn(self.batch, 12, self.frames, self.height, self.width, generator=generator)
        return x, torch.linspace(0.9, 0.3, self.batch), conditioning


@dataclass(frozen=True)
class LTXVInputs:
    """Sizes of one step's inputs for LTXV."""

    frames: int = 2
    height: int = 4
    width: int = 4
    text: int = 8
    valid: tuple[int, ...] | None = None
    """Valid text tokens of each sample; None sends no mask."""
    rate: float = 25.0
    clean_frames: int = 0
    """Frames whose timestep is 0; with any, each token has a timestep of its own."""
    batch: int = 1

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(0)
        conditioning = {
            "context": torch.randn(self.batch, self.text, TEXT_WIDTH, generator=generator),
            "frame_rate": pack_text(str(self.rate)),
        }
        if self.valid is not None:
            conditioning["attention_mask"] = (torch.arange(self.text) < torch.tensor(self.valid)[:, None]).long()
        timestep = torch.linspace(0.9, 0.3, self.batch)
        if self.clean_frames:
            noisy = (torch.arange(self.frames) >= self.clean_frames).repeat_interleave(self.height * self.width)
            timestep = (timestep[:, None] * noisy)[..., None]
        return (
            torch.randn(self.batch, 128, self.frames, self.height, self.width, generator=generator),
            timestep,
            conditioning,
        )


@dataclass(frozen=True)
class QwenImageInputs:
    """Sizes of one step's inputs for Qwen-Image."""

    frames: int = 1
    height: int = 8
    width: int = 8
    text: int = 8
    valid: tuple[int, ...] | None = None
    """Valid text tokens of each sample; None sends no mask."""
    references: tuple[tuple[int, int], ...] = ()
    """Heights and widths of further pictures."""
    method: str | None = None
    """How the references are placed."""
    batch: int = 1

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        conditioning = {"context": random(self.batch, self.text, TEXT_WIDTH)}
        if self.valid is not None:
            conditioning["attention_mask"] = (torch.arange(self.text) < torch.tensor(self.valid)[:, None]).long()
        for i, size in enumerate(self.references):
            conditioning[f"ref_latents.{i}"] = random(self.batch, 16, 1, *size)
        if self.method is not None:
            conditioning["ref_latents_method"] = pack_text(self.method)
        x = random(self.batch, 16, self.frames, self.height, self.width)
        return x, torch.linspace(0.9, 0.3, self.batch), conditioning


@dataclass(frozen=True)
class Flux2Inputs:
    """Sizes of one step's inputs for FLUX.2."""

    height: int = 4
    width: int = 4
    text: int = 8
    references: tuple[tuple[int, int], ...] = ()
    """Heights and widths of further pictures."""
    method: str | None = None
    """How the references are placed."""
    batch: int = 1

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        conditioning = {"context": random(self.batch, self.text, TEXT_WIDTH), "guidance": torch.tensor([4.0])}
        for i, size in enumerate(self.references):
            conditioning[f"ref_latents.{i}"] = random(self.batch, 128, *size)
        if self.method is not None:
            conditioning["ref_latents_method"] = pack_text(self.method)
        return random(self.batch, 128, self.height, self.width), torch.linspace(0.9, 0.3, self.batch), conditioning


class StepInputs(Protocol):
    """What makes the inputs of one step."""

    def make(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timestep, conditioning."""


def on(device: torch.device, inputs: StepInputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The inputs of a step, on a device."""
    x, timestep, conditioning = inputs.make()
    return x.to(device), timestep.to(device), {name: tensor.to(device) for name, tensor in conditioning.items()}


@dataclass(frozen=True)
class Model:
    """A checkpoint, the step it is asked for, and how it is loaded."""

    checkpoint: dict[str, Any] = field(default_factory=dict)
    """Arguments of `TinyModels.path`."""
    inputs: StepInputs = field(default_factory=Inputs)
    weight_dtype: torch.dtype = torch.float32


def recipe_of(path: Path, devices: str, weight_dtype: torch.dtype = torch.float32, **degrees: int) -> Recipe:
    """fp32 arithmetic; `degrees` as in `SequenceParallelConfig`."""
    config = SequenceParallelConfig(devices=on_ranks(devices), **degrees)
    return Recipe(path=str(path), weight_dtype=weight_dtype, compute_dtype=torch.float32, config=config)


@contextmanager
def loaded(
    group: WorkerGroup, path: Path, weight_dtype: torch.dtype = torch.float32, **degrees: int
) -> Iterator[RemoteModel]:
    """The model on this group, for the time of the `with` block."""
    model = RemoteModel(recipe_of(path, group.layout.describe(), weight_dtype, **degrees), group=group)
    model.ensure_loaded()
    try:
        yield model
    finally:
        model.unload()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """max|a − b| / max|b|."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()
