"""Writes the golden files of this folder with a real ComfyUI, on the CPU in fp32:

    COMFYUI_PATH=… python tests/golden/make_golden.py [case …]

Run it when a case is added, or when a newer ComfyUI gives other results on purpose; the files are committed.
Without names it makes all cases.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

COMFYUI = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
REPOSITORY = Path(__file__).resolve().parents[2]
# This repository comes last: its `nodes` and `tests` folders would hide ComfyUI's.
TEST_PACK = REPOSITORY / "tests" / "comfyui" / "test_pack"
sys.path[:] = [str(Path(__file__).parent), str(COMFYUI), *sys.path[1:], str(REPOSITORY), str(TEST_PACK)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfyui_version  # noqa: E402
import tiny_detection  # noqa: E402
import torch  # noqa: E402
import vectors  # noqa: E402
from torch import Tensor  # noqa: E402

from parallel.adapters.base import pack_text, unpack_text  # noqa: E402
from parallel.demo.checkpoint import WRITERS  # noqa: E402

TEXT_WIDTH = 64
REFERENCES = {"references": ((5, 4), (3, 8), (4, 4))}
VIDEO = {"family": "hunyuan_video"}
# name → family and options of the checkpoint, sizes of the inputs
FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padded_text": (VIDEO | {"seed": 1}, {"valid": 5}),
    "odd_tokens": (VIDEO | {"seed": 2, "depth_single": 2}, {"frames": 3, "height": 10, "width": 6, "text": 7}),
    "batch_2": (VIDEO | {"seed": 3, "heads": 1}, {"batch": 2}),
    "no_guidance": (VIDEO | {"seed": 4, "guidance": False}, {"valid": 6}),
    "image_to_video": (VIDEO | {"seed": 5, "in_channels": 33}, {"channels": 33, "valid": 7}),
    "original_names": (VIDEO | {"seed": 6, "names": "original", "prefix": "model.diffusion_model."}, {"valid": 3}),
    "three_heads": (VIDEO | {"seed": 7, "heads": 3}, {"text": 20, "valid": 17}),
    "first_frame": (VIDEO | {"seed": 10}, {"frames": 3, "height": 6, "width": 6, "valid": 6, "first_frame": 0.0}),
    "first_frame_no_guidance": (
        VIDEO | {"seed": 11, "guidance": False},
        {"frames": 3, "height": 4, "first_frame": 25.0},
    ),
    "first_frame_long_text": (
        VIDEO | {"seed": 13},
        {"frames": 3, "height": 4, "width": 6, "text": 9, "valid": 8, "first_frame": 0.0},
    ),
    "flux_references": ({"family": "flux", "seed": 12}, {"frames": 0, "height": 6, "width": 5} | REFERENCES),
    "flux_references_index": (
        {"family": "flux", "seed": 12},
        {"frames": 0, "height": 6, "method": "index"} | REFERENCES,
    ),
    "flux_references_uxo": (
        {"family": "flux", "seed": 12},
        {"frames": 0, "height": 5, "width": 6, "method": "uxo"} | REFERENCES,
    ),
    "flux_odd_size": ({"family": "flux", "seed": 9}, {"frames": 0, "height": 9, "width": 7, "batch": 2}),
}
WAN = {"family": "wan"}
WAN_FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wan_t2v_odd_size": (WAN | {"seed": 11}, {"text": 2}),
    "wan_i2v": (WAN | {"seed": 12, "in_channels": 36, "clip": True}, {"channels": 36, "image": 3}),
    "wan_i2v_without_image": (WAN | {"seed": 13, "in_channels": 36, "clip": True}, {"channels": 36, "text": 2}),
    "wan_first_and_last_frame": (
        WAN | {"seed": 14, "in_channels": 36, "clip": True, "clip_positions": 4}, {"channels": 36, "image": 4},
    ),
    "wan_22_i2v_batch_2": (WAN | {"seed": 15, "in_channels": 36}, {"channels": 36, "image": 1, "batch": 2}),
    "wan_22_5b_first_frame": (
        WAN | {"seed": 16, "in_channels": 48, "out_channels": 48},
        {"channels": 48, "height": 4, "width": 6, "text": 2, "timesteps": (0.0, 750.0, 750.0)},
    ),
}  # fmt: skip
MOCHI = {"family": "mochi"}
MOCHI_FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mochi": (MOCHI | {"seed": 21}, {"valid": 5}),
    "mochi_odd_batch_2": (
        MOCHI | {"seed": 22, "heads": 3, "depth": 3},
        {"frames": 3, "height": 6, "width": 10, "text": 7, "valid": 3, "batch": 2},
    ),
}
LTXV = {"family": "ltxv"}
LTXV_FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ltxv": (LTXV | {"seed": 31}, {"valid": (5,)}),
    "ltxv_unequal_texts": (LTXV | {"seed": 32, "heads": 1}, {"valid": (5, 8), "rate": 24.0}),
    "ltxv_first_frame": (
        LTXV | {"seed": 33, "heads": 3, "causal": True},
        {"frames": 3, "height": 3, "width": 2, "valid": (3, 3), "rate": 23.976, "clean_frames": 1},
    ),
}
QWEN = {"family": "qwen_image"}
QWEN_FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen_image": (QWEN | {"seed": 41}, {}),
    "qwen_image_unequal_texts": (QWEN | {"seed": 42, "heads": 1}, {"height": 5, "width": 7, "valid": (5, 8)}),
    "qwen_image_references": (QWEN | {"seed": 43, "heads": 3}, REFERENCES),
    "qwen_image_references_offset": (QWEN | {"seed": 43, "heads": 3}, REFERENCES | {"method": "offset"}),
    "qwen_image_clean_references": (
        QWEN | {"seed": 44, "clean_references": True},
        {"height": 7, "valid": (3,), "references": ((9, 4),)},
    ),
    "qwen_image_layered": (QWEN | {"seed": 45, "layered": True}, {"frames": 2, "references": ((4, 6),)}),
}
FLUX2 = {"family": "flux2"}
FLUX2_FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flux2_batch_2": (FLUX2 | {"seed": 51, "depth_single": 2}, {"batch": 2}),
    "flux2_klein_references": (FLUX2 | {"seed": 52, "guidance": False}, {"references": ((2, 3), (3, 1))}),
    "flux2_references_uxo": (FLUX2 | {"seed": 53, "heads": 1}, {"references": ((2, 1), (1, 2)), "method": "uxo"}),
    "flux2_references_offset": (FLUX2 | {"seed": 53, "heads": 1}, {"references": ((2, 1), (1, 2)), "method": "offset"}),
    "flux2_references_timestep_zero": (
        FLUX2 | {"seed": 54, "heads": 3},
        {"references": ((2, 1), (1, 2)), "method": "index_timestep_zero"},
    ),
}
VIDEO_15 = {"family": "hunyuan_video_15", "heads": 1, "depth": 1}
VIDEO_15_FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hunyuan_15_t2v_odd_size": (VIDEO_15 | {"seed": 21}, {"glyphs": 1}),
    "hunyuan_15_i2v_batch_2": (VIDEO_15 | {"seed": 22}, {"glyphs": 1, "image": 2, "batch": 2, "width": 2}),
    "hunyuan_15_padded_text": (VIDEO_15 | {"seed": 23}, {"text": 6, "valid": 3}),
}
COGVIDEOX = {"family": "cogvideox", "heads": 1}
COGVIDEOX_FORWARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cogvideox_odd_size_batch_2": (COGVIDEOX | {"seed": 31}, {"batch": 2}),
    "cogvideox_learned_positions": (  # ComfyUI knows tables of this length only, and of widths that 3 divides
        COGVIDEOX | {"seed": 32, "heads": 3, "learned_positions": 17550},
        {"height": 6, "width": 4},
    ),
    "cogvideox_15_odd_frames": (COGVIDEOX | {"seed": 33, "frames_per_patch": 2}, {"frames": 3}),
    "cogvideox_15_i2v": (
        COGVIDEOX | {"seed": 34, "frames_per_patch": 2, "in_channels": 32, "ofs": True},
        {"channels": 32, "height": 4, "width": 6, "ofs": 2.0},
    ),
}
TRAJECTORY = (VIDEO | {"seed": 8, "depth": 2, "depth_single": 2}, {"valid": 5})
STEPS = 4
NUMBERS: dict[str, type] = {"num_tokens": int, "frame_rate": float}
"""Inputs that are numbers (`pack_text`)."""


def inputs(
    *,
    frames: int = 2,
    height: int = 8,
    width: int = 8,
    channels: int = 16,
    text: int = 8,
    valid: int = 0,
    batch: int = 1,
    first_frame: float | None = None,
    references: tuple[tuple[int, int], ...] = (),
    method: str = "",
) -> dict[str, Tensor]:
    """`valid` is the number of text tokens that are no padding; 0 makes no mask. 0 frames make a picture, for FLUX.

    `first_frame` is the timestep of a given first frame; `references` are the sizes of FLUX's reference pictures.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": random(batch, channels, *([frames] if frames else []), height, width),
        "timestep": torch.linspace(850, 250, batch) / (1 if frames else 1000),
        "context": random(batch, text, TEXT_WIDTH),
        "y": random(batch, 768),
        "guidance": torch.full((batch,), 6.0),
    }
    if valid:
        tensors["attention_mask"] = (torch.arange(text) < valid).long().repeat(batch, 1)
    if first_frame is not None:
        tensors["guiding_frame_index"] = torch.full((batch,), first_frame)
    for i, size in enumerate(references):
        tensors[f"ref_latents.{i}"] = random(batch, channels, *size)
    if method:
        tensors["ref_latents_method"] = pack_text(method)
    return tensors


def wan_inputs(
    *,
    height: int = 3,
    width: int = 5,
    channels: int = 16,
    text: int = 1,
    image: int = 0,
    batch: int = 1,
    timesteps: tuple[float, ...] = (),
) -> dict[str, Tensor]:
    """Three frames. `image` is the number of CLIP's tokens, `timesteps` that of each frame."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": random(batch, channels, 3, height, width),
        "timestep": torch.tensor([timesteps] * batch) if timesteps else torch.linspace(850, 250, batch),
        "context": random(batch, text, 4096),
    }
    return tensors | {"clip_fea": random(batch, image, 1280)} if image else tensors


def hunyuan_15_inputs(
    *, height: int = 3, width: int = 5, text: int = 4, valid: int = 0, glyphs: int = 0, image: int = 0, batch: int = 1
) -> dict[str, Tensor]:
    """Two frames, with the channels of a given picture. `glyphs` and `image` are the numbers of ByT5's and SigLIP's
    tokens; with `valid`, which is as for `inputs`, ComfyUI can have neither."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": random(batch, 65, 2, height, width),
        "timestep": torch.linspace(850, 250, batch),
        "context": random(batch, text, TEXT_WIDTH),
    }
    if glyphs:
        tensors["txt_byt5"] = random(batch, glyphs, 1472)
    if image:
        tensors["clip_fea"] = random(batch, image, 1152)
    if valid:
        tensors["attention_mask"] = (torch.arange(text) < valid).long().repeat(batch, 1)
    return tensors


def cogvideox_inputs(
    *, frames: int = 2, height: int = 5, width: int = 7, channels: int = 16, batch: int = 1, ofs: float | None = None
) -> dict[str, Tensor]:
    """Three tokens of text."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": random(batch, channels, frames, height, width),
        "timestep": torch.linspace(850, 250, batch),
        "context": random(batch, 3, TEXT_WIDTH),
    }
    return tensors if ofs is None else tensors | {"ofs": torch.full((batch,), ofs)}


def mochi_inputs(
    *, frames: int = 2, height: int = 4, width: int = 6, text: int = 8, valid: int = 8, batch: int = 1
) -> dict[str, Tensor]:
    """`valid` is the number of text tokens that are no padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, 12, frames, height, width, generator=generator),
        "timestep": torch.linspace(0.85, 0.25, batch),
        "context": torch.randn(batch, text, TEXT_WIDTH, generator=generator),
        "attention_mask": (torch.arange(text) < valid).long().repeat(batch, 1),
        "num_tokens": pack_text(str(valid)),
    }


def ltxv_inputs(
    *,
    frames: int = 2,
    height: int = 2,
    width: int = 3,
    text: int = 8,
    valid: tuple[int, ...] = (8,),
    rate: float = 25.0,
    clean_frames: int = 0,
) -> dict[str, Tensor]:
    """`valid` is the number of text tokens of each sample that are no padding; `clean_frames` have a timestep of 0."""
    generator, batch = torch.Generator().manual_seed(0), len(valid)
    timestep = torch.linspace(0.85, 0.25, batch)
    if clean_frames:
        noisy = (torch.arange(frames) >= clean_frames).repeat_interleave(height * width)
        timestep = (timestep[:, None] * noisy)[..., None]
    return {
        "x": torch.randn(batch, 128, frames, height, width, generator=generator),
        "timestep": timestep,
        "context": torch.randn(batch, text, TEXT_WIDTH, generator=generator),
        "attention_mask": (torch.arange(text) < torch.tensor(valid)[:, None]).long(),
        "frame_rate": pack_text(str(rate)),
    }


def qwen_inputs(
    *,
    frames: int = 1,
    height: int = 6,
    width: int = 6,
    text: int = 8,
    valid: tuple[int, ...] = (),
    references: tuple[tuple[int, int], ...] = (),
    method: str = "",
) -> dict[str, Tensor]:
    """`valid` is the number of text tokens of each sample that are no padding; without it there is no mask."""
    generator, batch = torch.Generator().manual_seed(0), len(valid) or 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": random(batch, 16, frames, height, width),
        "timestep": torch.linspace(0.85, 0.25, batch),
        "context": random(batch, text, TEXT_WIDTH),
    }
    if valid:
        tensors["attention_mask"] = (torch.arange(text) < torch.tensor(valid)[:, None]).long()
    for i, size in enumerate(references):
        tensors[f"ref_latents.{i}"] = random(batch, 16, 1, *size)
    return tensors | {"ref_latents_method": pack_text(method)} if method else tensors


def flux2_inputs(
    *, batch: int = 1, references: tuple[tuple[int, int], ...] = (), method: str = ""
) -> dict[str, Tensor]:
    """A picture of 3 × 4 and five tokens of text."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "x": random(batch, 128, 3, 4),
        "timestep": torch.linspace(0.85, 0.25, batch),
        "context": random(batch, 5, TEXT_WIDTH),
        "guidance": torch.full((batch,), 4.0),
    }
    for i, size in enumerate(references):
        tensors[f"ref_latents.{i}"] = random(batch, 128, *size)
    return tensors | {"ref_latents_method": pack_text(method)} if method else tensors


def forward(patcher: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One call of ComfyUI's network."""
    network = patcher.model.diffusion_model
    assert next(network.parameters()).dtype == torch.float32
    conditioning: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.startswith("ref_latents."):
            conditioning.setdefault("ref_latents", []).append(tensor)
        elif name == "ref_latents_method":
            conditioning[name] = unpack_text(tensor)
        elif name in NUMBERS:
            conditioning[name] = NUMBERS[name](unpack_text(tensor))
        elif name not in ("x", "timestep"):
            conditioning[name] = tensor
    return tensors | {"expected": network(tensors["x"], tensors["timestep"], **conditioning)}


def trajectory(patcher: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """KSampler, euler, simple, without CFG: from noise to the latent that a graph would get."""
    conditioning = {name: tensors[name] for name in ("context", "y", "guidance", "attention_mask")}
    prompt = [[
        conditioning["context"],
        {"pooled_output": conditioning["y"], "guidance": 6.0, "attention_mask": conditioning["attention_mask"]},
    ]]  # fmt: skip
    noise, empty = tensors["x"], torch.zeros_like(tensors["x"])
    sampler = comfy.samplers.KSampler(patcher, STEPS, torch.device("cpu"), "euler", "simple", 1.0)
    latent = comfy.sample.sample(patcher, noise, STEPS, 1.0, "euler", "simple", prompt, prompt, empty, seed=0)
    return conditioning | {"noise": noise, "sigmas": sampler.sigmas, "expected": latent}


@torch.no_grad()
def main() -> None:
    tiny_detection.apply()
    made_by = f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, {platform.machine()}"
    cases = {name: (options, inputs(**sizes), forward) for name, (options, sizes) in FORWARDS.items()}
    cases |= {name: (options, wan_inputs(**sizes), forward) for name, (options, sizes) in WAN_FORWARDS.items()}
    cases |= {name: (options, mochi_inputs(**sizes), forward) for name, (options, sizes) in MOCHI_FORWARDS.items()}
    cases |= {name: (options, ltxv_inputs(**sizes), forward) for name, (options, sizes) in LTXV_FORWARDS.items()}
    cases |= {name: (options, qwen_inputs(**sizes), forward) for name, (options, sizes) in QWEN_FORWARDS.items()}
    cases |= {
        name: (options, hunyuan_15_inputs(**sizes), forward) for name, (options, sizes) in VIDEO_15_FORWARDS.items()
    }
    cases |= {
        name: (options, cogvideox_inputs(**sizes), forward) for name, (options, sizes) in COGVIDEOX_FORWARDS.items()
    }
    cases |= {name: (options, flux2_inputs(**sizes), forward) for name, (options, sizes) in FLUX2_FORWARDS.items()}
    cases["trajectory"] = (TRAJECTORY[0], inputs(**TRAJECTORY[1]), trajectory)
    for name in sys.argv[1:] or cases:
        options, tensors, run = cases[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.safetensors"
            WRITERS[options["family"]](path, **{name: value for name, value in options.items() if name != "family"})
            patcher = comfy.sd.load_diffusion_model(str(path))
            vectors.write(name, vectors.Golden(options, vectors.digest(path), made_by, run(patcher, tensors)))
        print(name)


if __name__ == "__main__":
    main()
