"""Writes tiny random files in the names and layouts of a template's, with ComfyUI's Python:

    python -m tests.templates.write_files COMFYUI < jobs.json

Each job: {"path", "kind": "network", "checkpoint", "lora", "ltx vae", "upscaler" or "video", "tiny": key of TINY,
"form"}.
"""

from __future__ import annotations

import json
import struct
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.comfyui import split_models
from tests.comfyui.quantised_networks import FORMATS, quantised
from tests.comfyui.write_models import _LTX_VAE, tensors_of
from tests.templates.tiny import TINY

_PREFIX = "model.diffusion_model."
_DTYPES = {torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8"}
_UPSCALER = {"in_channels": 128, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3, "spatial_upsample": True}


def configuration(key: str) -> dict[str, Any]:
    """What ComfyUI's detection finds of the tiny network."""
    tiny = TINY[key]
    make = getattr(split_models, tiny.config)
    return (make() if tiny.config == "sdxl" else make(tiny.heads)) | dict(tiny.more)


def network_of(key: str) -> nn.Module:
    """The tiny network; its weights are the same each time."""
    network = split_models.empty_network(TINY[key].supported, configuration(key), "cpu")
    network.load_state_dict(tensors_of(network, 0))
    return network.requires_grad_(False)


def tensors(key: str, form: str) -> dict[str, Tensor]:
    """As a file has them, by the network's names."""
    network = network_of(key)
    beside = split_models.conditioners(TINY[key].supported, configuration(key))
    if form in FORMATS and form != "fp8":
        found = quantised(network, form)
        assert any(name.endswith(("comfy_quant", "scale_weight")) for name in found), f"nothing of {key} is quantised"
        return beside | found
    found = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if form == "fp8":  # without scales
        found = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in found.items()}
    return beside | found


def lora(key: str) -> dict[str, Tensor]:
    """Of the first and the last linear layer of the blocks that is quantised where others are."""
    layers = [
        (name, module)
        for name, module in network_of(key).named_modules()
        if isinstance(module, nn.Linear) and ("blocks." in name or "layers." in name) and not module.in_features % 256
    ]
    found = {}
    for name, module in (layers[0], layers[-1]):
        found[f"diffusion_model.{name}.lora_A.weight"] = 0.1 * split_models.random(4, module.in_features)
        found[f"diffusion_model.{name}.lora_B.weight"] = 0.1 * split_models.random(module.out_features, 4)
    return found


def save(made: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file whose large tensors lie as new ones do in memory: at multiples of 64 bytes.

    CPU workers compute with weights where the file is mapped, and the last bits of a CPU's product with a single row
    depend on where the weight lies, by 16 bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    order = sorted(made, key=lambda name: made[name].nbytes % 64 != 0)
    parts = [made[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name in order]
    ends = list(accumulate(map(len, parts), initial=0))
    header: dict[str, Any] = {
        name: {"dtype": _DTYPES[made[name].dtype], "shape": list(made[name].shape), "data_offsets": [start, end]}
        for name, start, end in zip(order, ends, ends[1:], strict=False)
    }
    text = json.dumps({"__metadata__": metadata} | header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def video(path: Path) -> None:
    """Writes 17 frames of noise, 30 a second."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=30, options={"flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(17):
            pixels = 255 * torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(number))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.byte().numpy(), "rgb24")))
        file.mux(stream.encode())


def main(comfyui: str) -> None:
    """Writes what standard input names."""
    from parallel.comfyui.start import prepare

    prepare(comfyui, {"cpu": True})
    import comfy.ops
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
    from comfy.taesd.taesd import TAESD

    def ltx_vae(prefix: str) -> dict[str, Tensor]:
        made = tensors_of(VideoVAE(config=_LTX_VAE), 1)
        made |= {name: made[name].abs() + 0.5 for name in made if name.endswith("std-of-means")}
        return {prefix + name: tensor for name, tensor in made.items()}

    for job in json.load(sys.stdin):
        if job["kind"] == "video":
            video(Path(job["path"]))
            continue
        key, form = job.get("tiny", ""), job.get("form", "")
        metadata: dict[str, Any] = {"transformer": configuration(key)} if key and TINY[key].metadata else {}
        if job["kind"] == "network":
            made = tensors(key, form)
        elif job["kind"] == "lora":
            made, metadata = lora(key), {}
        elif job["kind"] == "ltx vae":
            made, metadata = ltx_vae(""), {"vae": _LTX_VAE}
        elif job["kind"] == "upscaler":
            made = tensors_of(LatentUpsampler.from_config(_UPSCALER, operations=comfy.ops.disable_weight_init), 2)
            metadata = _UPSCALER
        else:
            made = {_PREFIX + name: tensor for name, tensor in tensors(key, form).items()}
            if metadata:
                sound = {f"{part}.decoder.conv_in.weight": torch.zeros(8, 8, 3) for part in ("audio_vae", "vocoder")}
                made |= ltx_vae("vae.") | sound
                metadata |= {"vae": _LTX_VAE}
            else:
                made |= {f"first_stage_model.{name}": tensor for name, tensor in tensors_of(TAESD(), 1).items()}
        save(made, Path(job["path"]), {"config": json.dumps(metadata)} if metadata else {})


if __name__ == "__main__":
    main(sys.argv[1])
