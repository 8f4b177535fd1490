"""Test-only nodes: what text encoders, VAEs and CLIP vision models give, without any of these models."""

import copy
import ctypes
import gc
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import get_attention_function
from comfy.model_patcher import ModelPatcher

from nodes import VAEEncodeTiled  # ComfyUI's

from .vae_networks import NETWORKS, make_vae

TILES = ("tile_size", "overlap", "temporal_size", "temporal_overlap")


class SPTestConditioning:
    """Random conditioning, always the same for the same inputs, in the form HunyuanVideo's text encoder gives."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "tokens": ("INT", {"default": 8, "min": 1, "max": 4096, "tooltip": "length with padding"}),
                "valid_tokens": ("INT", {"default": 8, "min": 1, "max": 4096}),
                "width": ("INT", {"default": 64, "min": 1, "max": 16384}),
                "pooled_width": ("INT", {"default": 768, "min": 1, "max": 16384}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "tooltip": "-1: none"}),
            },
            "optional": {"glyph_tokens": ("INT", {"default": 0, "tooltip": "of HunyuanVideo 1.5's second encoder"})},
        }

    def make(
        self,
        seed: int,
        tokens: int,
        valid_tokens: int,
        width: int,
        pooled_width: int,
        guidance: float,
        glyph_tokens: int = 0,
    ) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        cond = torch.randn(1, tokens, width, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled_width, generator=generator)}
        if valid_tokens < tokens:
            extra["attention_mask"] = (torch.arange(tokens) < valid_tokens).long().unsqueeze(0)
        if guidance >= 0:
            extra["guidance"] = guidance
        if glyph_tokens:
            extra["conditioning_byt5small"] = torch.randn(1, glyph_tokens, 1472, generator=generator)
        return ([[cond, extra]],)


class SPTestLatent:
    """A random picture's latent, always the same for the same inputs."""

    CATEGORY = "testing"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        size = ("INT", {"default": 64, "min": 8, "max": 4096, "step": 8, "tooltip": "in pixels"})
        return {"required": {"seed": ("INT", {"default": 0}), "width": size, "height": size}}

    def make(self, seed: int, width: int, height: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        return ({"samples": torch.randn(1, 16, height // 8, width // 8, generator=generator)},)


class SPTestVAE:
    """Encodes any video to random latents of the right shape, always the same ones."""

    CATEGORY = "testing"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        whole = {
            "channels": ("INT", {"default": 16}),
            "stride": ("INT", {"default": 8}),
            "seed": ("INT", {"default": 3}),
        }
        return {"required": whole}

    def make(self, channels: int, stride: int, seed: int) -> tuple:
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            frames, height, width = pixels.shape[:3]
            shape = (1, channels, (frames - 1) // 4 + 1, height // stride, width // stride)
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        return (SimpleNamespace(encode=encode, get_sd=dict),)


class SPTestCLIPVisionOutput:
    """Random image tokens, always the same for the same inputs."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"tokens": ("INT", {"default": 257}), "width": ("INT", {"default": 1280})}}

    def make(self, tokens: int, width: int) -> tuple:
        hidden = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(4))
        layers = hidden[:, None].expand(-1, 20, -1, -1)
        return (
            SimpleNamespace(
                penultimate_hidden_states=hidden, last_hidden_state=hidden.flip(1), all_hidden_states=layers
            ),
        )


class SPTestNoClip:
    """No text encoder, for nodes that want one and do without."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        return (None,)


class SPTestControlNet:
    """A ControlNet that adds another vector to each token of 2 × 2 latent pixels after the first block."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"width": ("INT", {"default": 256})}, "optional": {"place": (["input", "output"],)}}

    def make(self, width: int, place: str = "input") -> tuple:
        return (_ConstantControl(torch.linspace(-1, 1, width), place),)


class _ConstantControl(ControlBase):
    def __init__(self, vector: torch.Tensor, place: str):
        super().__init__()
        self._vector, self._place = vector, place

    def get_control(self, x_noisy: torch.Tensor, *_: object) -> dict:
        *frames, rows, columns = x_noisy.shape[2:]
        tokens = math.prod(frames) * -(-rows // 2) * -(-columns // 2)
        places = torch.linspace(1, 3, tokens).to(x_noisy)[None, :, None]
        return {"input": [], "output": []} | {self._place: [self.strength * places * self._vector.to(x_noisy)]}

    def copy(self) -> "_ConstantControl":
        copied = _ConstantControl(self._vector, self._place)
        self.copy_to(copied)
        return copied


class SPTestRandomVAE:
    """ComfyUI's own VAE with random weights."""

    CATEGORY = "testing"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"kind": (list(NETWORKS),), "seed": ("INT", {"default": 0})}}

    def make(self, kind: str, seed: int) -> tuple:
        return (make_vae(kind, seed),)


class SPTestTiledVAE:
    """A VAE that encodes as VAE Encode (Tiled) does, on one device."""

    CATEGORY = "testing"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"vae": ("VAE",)} | {name: ("INT", {"default": 64}) for name in TILES}}

    def make(self, vae: Any, **tiles: int) -> tuple:
        tiled = copy.copy(vae)
        tiled.encode = lambda pixels: VAEEncodeTiled().encode(vae, pixels, **tiles)[0]["samples"]
        return (tiled,)


class SPTestVideoLatent:
    """A random video's latent, always the same for the same inputs; sizes as they are in the latent. 0 frames make a
    picture's."""

    CATEGORY = "testing"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        sizes = {name: ("INT", {"default": 4, "min": 0, "max": 4096}) for name in ("frames", "height", "width")}
        channels = {"channels": ("INT", {"default": 16, "min": 1, "max": 4096})}
        return {"required": {"seed": ("INT", {"default": 0}), **sizes}, "optional": channels}

    def make(self, seed: int, frames: int, height: int, width: int, channels: int = 16) -> tuple:
        size = (frames, height, width) if frames else (height, width)
        return ({"samples": torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed))},)


class SPTestAsLatent:
    """The numbers of a picture, of sound or of conditioning (with its pooled output) as they are, for SaveLatent."""

    CATEGORY = "testing"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": ("IMAGE,AUDIO,CONDITIONING",)}}

    def make(self, value: Any) -> tuple:
        if isinstance(value, dict):
            value = value["waveform"]
        elif isinstance(value, list):
            value = torch.cat([part.flatten() for cond, extra in value for part in (cond, extra["pooled_output"])])
        return ({"samples": value},)


class SPTestFlatLatent:
    """All parts of a latent as one row, for SaveLatent."""

    CATEGORY = "testing"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"samples": ("LATENT",)}}

    def make(self, samples: dict) -> tuple:
        parts = samples["samples"].unbind()
        return ({"samples": torch.cat([part.flatten(1) for part in parts], dim=1)},)


class SPTestAttention:
    """A node that computes attention in its own way."""

    CATEGORY = "testing"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple:
        def attend(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return function(*args, **kwargs)

        patched = model.clone()
        options = patched.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = attend
        return (patched,)


class SPTestAttentionBackend:
    """ModelAttentionBackend, with any function that ComfyUI has registered."""

    CATEGORY = "testing"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "name": ("STRING", {"default": "split"})}}

    def patch(self, model: Any, name: str) -> tuple:
        patched = model.clone()
        patched.set_model_optimized_attention(get_attention_function(name))
        return (patched,)


class SPTestOption:
    """An option of the network that no network has: plain data as a node of a newer ComfyUI's, or an object."""

    CATEGORY = "testing"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "name": ("STRING", {}), "plain": ("BOOLEAN", {"default": True})}}

    def patch(self, model: Any, name: str, plain: bool) -> tuple:
        patched = model.clone()
        value = {"device": "cpu", "blocks": (1, 2), "scale": torch.ones(2)} if plain else _Remembers()
        patched.model_options["transformer_options"][name] = value
        return (patched,)


class _Remembers:
    """No plain data."""


class SPTestModelPatch:
    """A network that nodes such as QwenImageDiffsynthControlnet run inside another one's blocks; it is never run."""

    CATEGORY = "testing"
    RETURN_TYPES = ("MODEL_PATCH",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        network = torch.nn.Linear(1, 1)
        network.cond_in_channels, network.additional_in_dim = 3, 0
        network.process_input_latent_image = lambda latent: latent
        network.audio_proj = _AudioProjection()
        return (ModelPatcher(network, torch.device("cpu"), torch.device("cpu")),)


class _AudioProjection:
    seq_len = 5

    def __call__(self, first: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 1 + later.shape[1], 4, 8)


class SPTestAudioEncoderOutput:
    """What an audio encoder makes of 0.8 s, for WanInfiniteTalkToVideo."""

    CATEGORY = "testing"
    RETURN_TYPES = ("AUDIO_ENCODER_OUTPUT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        return ({"encoded_audio_all_layers": [torch.zeros(1, 40, 8)] * 3},)


class SPTestBlockSparseAttention:
    """What BlockSparseAttention does, a node that ComfyUI 0.33 has not, to a model that it takes for no MiniMax-H3."""

    CATEGORY = "testing"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple:
        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args: function
        patched.add_callback_with_key("on_prepare_state", "block_sparse_attention", lambda *args: None)
        raise ValueError("VSA selection needs a MiniMax-H3 model")


class SPTestSoundVAE:
    """Encodes any sound to the same random latent of LTX-2's: 5 tokens."""

    CATEGORY = "testing"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        latent = torch.randn(1, 8, 5, 16, generator=torch.Generator().manual_seed(4))
        return (SimpleNamespace(audio_sample_rate=44100, encode=lambda waveform: latent),)


class SPTestModelSize:
    """Bytes that ComfyUI's memory management counts for a model."""

    CATEGORY = "testing"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",)}}

    def tell(self, model: Any) -> dict:
        return {"ui": {"bytes": [model.model_size()]}}


class SPTestHeldMemory:
    """What ComfyUI's process holds while a MODEL is there, in bytes. What is free there goes back to the system first.

    Private_Dirty and Anonymous are the kernel's sums, "file" the resident pages of a mapped file, "tensors" all that
    Python has.
    """

    CATEGORY = "testing"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "after": ("LATENT",), "file": ("STRING", {})}}

    def tell(self, model: Any, after: dict, file: str) -> dict:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        found = dict.fromkeys(("Private_Dirty", "Anonymous", "file"), 0)
        path = ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, rest = line.partition(":")
            if " " in name:  # a mapping's first line: addresses, permissions, offset, device, inode, path
                path = line.split(maxsplit=5)[-1]
            elif name in found:
                found[name] += int(rest.split()[0]) * 1024
            elif name == "Rss" and path == file:
                found["file"] += int(rest.split()[0]) * 1024
        held = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
        sizes = {(t.data_ptr(), t.nbytes) for t in held if t.device.type == "cpu" and t.layout == torch.strided}
        found["tensors"] = sum(nbytes for _, nbytes in sizes)
        return {"ui": {name: [value] for name, value in found.items()}}


class SPTestWorkersBoot:
    """From now on workers are started by another script than the pack's own; empty: by that again."""

    CATEGORY = "testing"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "set"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"script": ("STRING", {"default": ""}), "environment": ("STRING", {"default": "{}"})}}

    def set(self, script: str, environment: str) -> tuple:
        (module,) = (m for name, m in list(sys.modules.items()) if name.endswith(".parallel.host.process"))
        module._BOOT = Path(script) if script else Path(module.__file__).parents[1] / "worker" / "boot.py"
        os.environ.update(json.loads(environment))
        return ()


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        SPTestConditioning, SPTestLatent, SPTestVAE, SPTestCLIPVisionOutput, SPTestNoClip, SPTestControlNet,
        SPTestRandomVAE, SPTestTiledVAE, SPTestVideoLatent, SPTestAsLatent, SPTestFlatLatent, SPTestAttention,
        SPTestAttentionBackend, SPTestOption, SPTestModelPatch, SPTestAudioEncoderOutput, SPTestBlockSparseAttention,
        SPTestSoundVAE, SPTestModelSize, SPTestHeldMemory, SPTestWorkersBoot,
    )
}  # fmt: skip
