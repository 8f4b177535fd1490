"""How the models of a template are made tiny: by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tiny:
    """A tiny network and what belongs to it."""

    supported: str
    """ComfyUI's entry in `comfy.supported_models`."""
    config: str
    """Name of the configuration in `tests/comfyui/split_models.py`."""
    text: int
    """Width of the text encoder's result."""
    vae: tuple[int, int, bool] | None
    """Channels, stride, and whether latents have frames; None: a real one."""
    heads: int = 4
    more: tuple[tuple[str, Any], ...] = ()
    """Of the configuration, besides."""
    metadata: bool = False


_LTX = Tiny("LTXAV", "ltx23", 384, None, heads=8, metadata=True)
_FLUX2 = (("in_channels", 128), ("out_channels", 128), ("context_in_dim", 64))
_SEEDVR2_7B = (("mlp_type", "normal"), ("rope_type", "rope3d"), ("rope_dim", 64), ("vid_out_norm", None))

TINY = {
    "MiniMax-H3": Tiny("MiniMaxH3", "minimax_h3", 48, (24, 16, True)),
    "LTX-2.3": _LTX,
    "LTX-2.5": _LTX,
    "Z-Image": Tiny("Lumina2", "lumina", 48, (16, 8, False)),
    "Wan 2.1, 2.2": Tiny("WAN21_T2V", "wan", 4096, (16, 8, True)),
    "Wan, image to video": Tiny("WAN21_T2V", "wan", 4096, (16, 8, True), more=(("in_dim", 36),)),
    "Krea 2": Tiny("Krea2", "krea2", 240, (16, 8, True)),
    "Qwen-Image": Tiny("QwenImage", "qwen_image", 48, (16, 8, True)),
    "FLUX.2": Tiny("Flux2", "flux2", 64, (128, 16, False), heads=2, more=_FLUX2),
    "FLUX.2 Klein": Tiny("Flux2", "flux2", 64, (128, 16, False), heads=2, more=(*_FLUX2, ("guidance_embed", False))),
    "FLUX.1": Tiny("Flux", "flux", 4096, (16, 8, False), heads=2),
    "FLUX.1 Fill": Tiny("FluxInpaint", "flux", 4096, (16, 8, False), heads=2, more=(("in_channels", 96),)),
    "Anima": Tiny("Anima", "anima", 1024, (16, 8, True)),
    "SDXL": Tiny("SDXL", "sdxl", 64, (4, 8, False)),
    "SeedVR2": Tiny("SeedVR2", "seedvr2", 64, (16, 8, True)),
    "SeedVR2 7B": Tiny("SeedVR2", "seedvr2", 64, (16, 8, True), heads=6, more=_SEEDVR2_7B),
    "SCAIL-2": Tiny("WAN21_SCAIL2", "wan", 4096, (16, 8, True), more=(("model_type", "scail2"), ("in_dim", 20))),
}


def tiny_of(family: str, file: str) -> str:
    """The key of TINY for a file of a family."""
    if family == "Wan 2.1, 2.2" and "i2v" in file:
        return "Wan, image to video"
    if family == "FLUX.2" and "klein" in file:
        return "FLUX.2 Klein"
    if family == "FLUX.1" and "fill" in file:
        return "FLUX.1 Fill"
    if family == "SeedVR2" and "7b" in file:
        return "SeedVR2 7B"
    return family
