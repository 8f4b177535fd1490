"""What a model file's name says: which family, of which class of ComfyUI's, and how it is quantised."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Models that one class of ComfyUI's runs."""

    pattern: str
    """Of file names."""
    title: str
    network: str = ""
    """ComfyUI's class; empty where it is known by newer versions only, and not by name here."""


FAMILIES = tuple(
    Family(*line)
    for line in (
        ("fasth3", "FastH3", "MiniMaxH3Model"),
        ("minimax_h3", "MiniMax-H3", "MiniMaxH3Model"),
        ("minimax_music", "MiniMax-Music 3", "MiniMaxMusic3DiT"),
        (r"qwen_image_2\.1", "Qwen-Image 2.1", "QwenImage21Transformer2DModel"),
        (r"ltx-2\.5", "LTX-2.5", "LTXAVModel"),
        (r"ltx-2\.3", "LTX-2.3", "LTXAVModel"),
        ("ltx-2-19b", "LTX-2", "LTXAVModel"),
        ("ltx-video", "LTX-Video", "LTXVModel"),
        ("z_image", "Z-Image", "NextDiT"),
        ("NetaYume|NewBie", "Lumina 2", "NextDiT"),
        ("wan_animate_2", "Wan-Animate 2", "WanAnimate2Model"),
        ("SCAIL_2", "SCAIL-2", "SCAIL2WanModel"),
        ("vace", "Wan VACE", "VaceWanModel"),
        ("s2v", "Wan S2V", "WanModel_S2V"),
        ("humo", "HuMo", "HumoWanModel"),
        ("dancer", "WanDancer", "WanDancerModel"),
        ("fun_camera", "Wan Fun Camera", "CameraWanModel"),
        ("causal_forcing", "Wan, causal", "CausalWanModel"),
        ("bernini", "Wan Bernini", "WanModel"),
        ("chrono_edit", "ChronoEdit", "WanModel"),
        (r"wan2?\.?2|wan2_1|wan21|wan2\.1", "Wan 2.1, 2.2", "WanModel"),
        ("krea2", "Krea 2", "SingleStreamDiT"),
        ("flux3", "FLUX.3 Klein"),
        ("flux-?2", "FLUX.2", "Flux"),
        ("longcat", "LongCat", "Flux"),
        ("ovis", "Ovis", "Flux"),
        ("pid_flux", "PiD", "PidNet"),
        ("flux", "FLUX.1", "Flux"),
        ("qwen_image|FireRed", "Qwen-Image", "QwenImageTransformer2DModel"),
        ("moss", "MOSS-Image"),
        ("ming_image", "Ming-Image"),
        ("mage_flow", "Mage-Flow", "MageFlowTransformer2DModel"),
        ("trellis|pixal3d", "TRELLIS 2, Pixal3D", "Trellis2"),
        (r"hunyuan_3d_v2\.1", "Hunyuan3D 2.1", "HunYuanDiTPlain"),
        ("hunyuan3d", "Hunyuan3D 2", "Hunyuan3Dv2"),
        ("triposplat", "TripoSplat", "LatentSeqMMFlowModel"),
        ("seedvr", "SeedVR2", "NaDiT"),
        ("anima", "Anima", "Anima"),
        ("sd_xl|sdxl", "SDXL", "UNetModel"),
        (r"sd3\.5", "SD 3.5", "OpenAISignatureMMDITWrapper"),
        ("stable.audio", "Stable Audio", "AudioDiffusionTransformer"),
        (r"ace_?step_?(v?1\.5)", "ACE-Step 1.5", "AceStepConditionGenerationModel"),
        ("ace_step", "ACE-Step", "ACEStepTransformer2DModel"),
        ("void", "VOID", "CogVideoXTransformer3DModel"),
        ("lotus", "Lotus", "UNetModel"),
        ("hunyuan_?video|capybara", "HunyuanVideo, 1.5", "HunyuanVideo"),
        ("ideogram", "Ideogram 4", "Ideogram4Transformer2DModel"),
        ("hidream_o1", "HiDream O1", "HiDreamO1Transformer"),
        ("hidream", "HiDream I1, E1", "HiDreamImageTransformer2DModel"),
        ("pixeldit", "PixelDiT", "PixDiT_T2I"),
        ("radiance", "Chroma Radiance", "ChromaRadiance"),
        ("chroma", "Chroma", "Chroma"),
        ("ernie", "ERNIE-Image", "ErnieImageModel"),
        ("lens", "Lens", "LensTransformer2DModel"),
        ("boogu", "Boogu", "BooguTransformer2DModel"),
        ("kandinsky5", "Kandinsky 5", "Kandinsky5"),
        ("omnigen2", "OmniGen2", "OmniGen2Transformer2DModel"),
        ("joyai", "JoyImage", "JoyImageTransformer3DModel"),
        ("yue2", "YuE 2"),
        ("fibo2", "FIBO 2"),
        ("svd", "SVD", "UNetModel"),
        ("v1-5|dreamshaper|sd15|512-inpaint|sd-v1", "SD 1.5", "UNetModel"),
    )
)
"""The first whose pattern is found in a name counts."""

QUANTISED = {
    "int8.convrot": "int8_convrot",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
    "fp8mixed": "fp8mixed",
    "fp8.*scaled|klein-(base-9b|4b)-fp8": "fp8_scaled",
    "fp8": "fp8",
    "svdq|nunchaku": "SVDQuant",
    "gguf": "GGUF",
}
"""Pattern → how; FLUX.2 Klein's files do not say that they have scales."""


def family_of(name: str) -> Family:
    """The family of a file; one without a class if it is not known."""
    known = (family for family in FAMILIES if re.search(family.pattern, name, re.IGNORECASE))
    return next(known, Family("", f"unknown ({name})"))


def quantised_as(name: str) -> str:
    """`16 bit` where the name says nothing."""
    return next((form for pattern, form in QUANTISED.items() if re.search(pattern, name.lower())), "16 bit")
