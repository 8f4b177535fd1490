"""A template as a small prompt: what is sampled is what the template samples; what is around it costs little.

Stand-ins (`stand_ins`) replace text encoders, VAEs other than LTX's and a checkpoint's own, and language models that
write prompts, and models that look at pictures. Left out is what comes behind the samplers, and nodes that scale
pictures. Sizes and steps are small, and a switch before a LoRA is on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.comfyui.server import Graph
from tests.templates.families import family_of
from tests.templates.tiny import TINY, tiny_of

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
NETWORK_FILES = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
CHECKPOINTS = ("CheckpointLoaderSimple", "SPLoadCheckpoint")
_CLIPS = ("CLIPLoader", "DualCLIPLoader", "LTXAVTextEncoderLoader")
_TRACKER = "SAM3_VideoTrack"
_WRITERS = ("TextGenerate", "TextGenerateLTX2Prompt")
_SCALERS = {
    "FluxKontextImageScale": "image",
    "ImageScaleToTotalPixels": "image",
    "LTXVPreprocess": "image",
    "ResizeImageMaskNode": "input",
}
_VIDEO, _PICTURE = {"width": 64, "height": 64, "length": 5}, {"width": 96, "height": 64}
_SMALL: dict[str, dict[str, Any]] = {
    "MiniMaxH3ImageToVideo": _VIDEO,
    "MiniMaxH3ReferenceToVideo": _VIDEO,
    "WanImageToVideo": _VIDEO,
    "WanFirstLastFrameToVideo": _VIDEO,
    "WanSCAILToVideo": {"width": 64, "height": 96, "length": 9},
    "EmptyHunyuanLatentVideo": _VIDEO,
    "EmptyLTXVLatentVideo": {"width": 128, "height": 64, "length": 9},
    "LTXVEmptyLatentAudio": {"frames_number": 9},
    "EmptySD3LatentImage": _PICTURE,
    "EmptyLatentImage": _PICTURE,
    "EmptyFlux2LatentImage": _PICTURE,
    "EmptyImage": _PICTURE,
    "Flux2Scheduler": {**_PICTURE, "steps": 3},
    "BasicScheduler": {"steps": 3},
    "KSampler": {"steps": 3},
    "TrimAudioDuration": {"start_index": 0, "duration": 0.3},
    "SolidMask": _PICTURE,
}
_SOUND = (8, 1, False)
"""Of LTX; H3's has 32 channels."""


def networks(prompt: Graph) -> Iterable[tuple[str, str, str]]:
    """The files of networks that are sampled: (folder, name, key of TINY)."""
    for loader, node in prompt.items():
        if (name := NETWORK_FILES.get(node["class_type"])) is not None and not _is_for_a_tracker(prompt, loader):
            file = node["inputs"][name]
            folder = "diffusion_models" if name == "unet_name" else "checkpoints"
            yield folder, file, tiny_of(family_of(file).title, file)


def small(prompt: Graph, key: str) -> Graph:
    """The prompt, made small; its samplers' latents are saved under their own names.

    Args:
        prompt: of a template, converted or not.
        key: of TINY.
    """
    tiny = TINY[key]
    made = {name: {**node, "inputs": dict(node["inputs"])} for name, node in prompt.items()}
    for name, node in made.items():
        kind, inputs = node["class_type"], node["inputs"]
        inputs |= _SMALL.get(kind, {})
        if kind in _CLIPS:
            made[name] = {"class_type": "SPTemplateCLIP", "inputs": {"width": tiny.text}}
        elif kind == "CLIPVisionLoader":
            made[name] = {"class_type": "SPTemplateCLIPVision", "inputs": {}}
        elif kind == _TRACKER:
            made[name] = {"class_type": "SPTemplateTrack", "inputs": {"images": inputs["images"]}}
        elif kind in _WRITERS:
            made[name] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "A small boat on a lake."}}
        elif kind == "LTXVAudioVAELoader" or (kind == "VAELoader" and "audio" in inputs["vae_name"].lower()):
            channels = 32 if key == "MiniMax-H3" else 8
            made[name] = _vae(channels, 1, False)
        elif kind == "VAELoader" and tiny.vae is not None:
            made[name] = _vae(*tiny.vae)
        elif kind == "KSamplerAdvanced":
            first = inputs["add_noise"] == "enable"
            inputs |= {"steps": 4, "start_at_step": 0 if first else 2, "end_at_step": 2 if first else 10000}
        elif kind == "ImageFromBatch" and isinstance(inputs["batch_index"], list):
            inputs |= {"batch_index": 8, "length": 9}  # the video that is loaded is short
        elif kind == "ComfySwitchNode" and _is_lora(made, inputs.get("on_true")):
            inputs["switch"] = True
    for name, node in list(made.items()):
        source = node["inputs"].get(_SCALERS.get(node["class_type"], ""))
        if source is not None:
            _relink(made, [name, 0], source)
    for name in [name for name, node in made.items() if node["class_type"] in CHECKPOINTS]:
        made[f"clip of {name}"] = {"class_type": "SPTemplateCLIP", "inputs": {"width": tiny.text}}
        _relink(made, [name, 1], [f"clip of {name}", 0])
    return _with_what_they_need(made, [name for name, node in made.items() if node["class_type"] in SAMPLERS])


def with_lora(prompt: Graph, lora: str) -> Graph:
    """The same with a LoRA behind each loader: what comes of it if the network is another one."""
    made = {name: {**node, "inputs": dict(node["inputs"])} for name, node in prompt.items()}
    for name in [name for name, node in made.items() if node["class_type"] in NETWORK_FILES]:
        _relink(made, [name, 0], [f"lora of {name}", 0])
        inputs = {"model": [name, 0], "lora_name": lora, "strength_model": 1.0}
        made[f"lora of {name}"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    return made


def _relink(prompt: Graph, old: list[Any], new: Any) -> None:
    """Has every input take another output, or value."""
    for node in prompt.values():
        node["inputs"] = {key: new if value == old else value for key, value in node["inputs"].items()}


def _vae(channels: int, stride: int, frames: bool) -> dict[str, Any]:
    return {"class_type": "SPTemplateVAE", "inputs": {"channels": channels, "stride": stride, "frames": frames}}


def _is_for_a_tracker(prompt: Graph, loader: str) -> bool:
    readers = [node["class_type"] for node in prompt.values() if [loader, 0] in node["inputs"].values()]
    return bool(readers) and set(readers) == {_TRACKER}


def _is_lora(prompt: Graph, link: Any) -> bool:
    return isinstance(link, list) and prompt[link[0]]["class_type"].startswith("LoraLoader")


def _with_what_they_need(prompt: Graph, samplers: list[str]) -> Graph:
    """The samplers, all that they need, and what saves their latents."""
    wanted, found = list(samplers), {}
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = prompt[name]
            wanted += [value[0] for value in prompt[name]["inputs"].values() if isinstance(value, list) and value]
    for name in samplers:
        flat = {"class_type": "SPTestFlatLatent", "inputs": {"samples": [name, 0]}}
        saved = {"samples": [f"flat {name}", 0], "filename_prefix": "latents/test"}
        found |= {f"flat {name}": flat, f"saved {name}": {"class_type": "SaveLatent", "inputs": saved}}
    return found
