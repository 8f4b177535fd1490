"""Compares Sampler (SP) with KSampler on ComfyUI's own MODEL; run with ComfyUI's Python, not by pytest.

    python sampler_against_native.py COMFYUI REPOSITORY FOLDER [every]

FOLDER is empty; "every" adds ComfyUI's other samplers. Prints JSON: case → `difference` (max|a−b| / max|b|) of the
latent, `told` to the user, `messages` to the workers, whether the `last_step_shown` is the last one, and
`shown_difference`, of the denoised latents that were shown. Under "previews": what ComfyUI's own callback gets, see
`previews`.
"""

from __future__ import annotations

import json
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

COMFYUI, REPOSITORY, FOLDER = (Path(argument) for argument in sys.argv[1:4])
EVERY = "every" in sys.argv[4:]
sys.path[:] = [str(COMFYUI), *sys.path[1:], sys.path[0]]  # this folder last: it has a `server`, as ComfyUI

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import latent_preview  # noqa: E402
import torch  # noqa: E402
import utils  # noqa: E402, F401  # as main.py does: up to ComfyUI 0.25 `nodes` puts another `utils` in its way

import nodes  # noqa: E402

sys.path[0] = str(REPOSITORY)  # not for longer: both have `tests` and `nodes`
from tests.comfyui import model_files, write_models  # noqa: E402

sys.path[0] = str(COMFYUI)

# The pack as ComfyUI has it: a package whose name is not its folder's.
PACK = types.ModuleType("sequence_parallel_pack")
PACK.__path__ = [str(REPOSITORY)]
sys.modules[PACK.__name__] = PACK
config: Any = import_module(f"{PACK.__name__}.parallel.config")
running: Any = import_module(f"{PACK.__name__}.parallel.host.running")
native_model: Any = import_module(f"{PACK.__name__}.nodes.native_model")
in_workers: Any = import_module(f"{PACK.__name__}.nodes.in_workers")
previews_module: Any = import_module(f"{PACK.__name__}.nodes.previews")
settings: Any = import_module(f"{PACK.__name__}.nodes.settings")

torch.set_num_threads(1)
NATIVE_CALLBACK = latent_preview.prepare_callback

MUST = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm")
MASKED = {"mask": True, "denoise": 0.6}
PLAIN = {"family": "hunyuan_video", "steps": 4}
WAN = {"family": "wan", "steps": 3}
MODELS = {
    "hunyuan_video": model_files.TINY,
    "flux": model_files.FLUX,
    "wan": model_files.WAN,
    "wan_i2v": model_files.WAN_22_I2V,
    "wan_22_5b": model_files.WAN_22_5B,
}

SAMPLERS = comfy.samplers.SAMPLER_NAMES if EVERY else [*MUST, "dpm_adaptive"]
CASES: dict[str, dict[str, Any]] = {name: PLAIN | {"sampler": name} for name in SAMPLERS}
CASES |= {f"{name}_masked": PLAIN | MASKED | {"sampler": name} for name in MUST}
CASES |= {
    "cfg": PLAIN | {"cfg": 4.0, "scheduler": "beta"},
    "cfg_unequal": PLAIN | {"cfg": 4.0, "negative": 5, "batch": 2},
    "cfg_unequal_masked": PLAIN | MASKED | {"cfg": 4.0, "negative": 5, "sampler": "dpmpp_2m_sde"},
    "padded": PLAIN | {"valid": 5, "cfg": 3.0, "negative": 6},
    "odd": PLAIN | {"size": (3, 10, 6), "cfg": 3.0},
    "prompt_mask": PLAIN | {"extra": {"strength": 0.7}, "prompt_mask": True},
    "prompt_times": PLAIN | {"cfg": 3.0, "times": (0.0, 0.5)},
    "one_step": PLAIN | {"steps": 1, "sampler": "dpmpp_2m_sde"},
    "flux": {"family": "flux", "steps": 3, "size": (7, 9), "batch": 2},
    "flux_masked_cfg": {"family": "flux", "steps": 3, "size": (8, 6), "cfg": 4.0, **MASKED},
    "wan": WAN | {"cfg": 4.0, "sampler": "uni_pc", "size": (3, 7, 9)},
    "wan_i2v": WAN | {"model": "wan_i2v", "image": 16, "cfg": 4.0, "sampler": "dpmpp_2m"},
    "wan_22_5b_first_frame": WAN | {"model": "wan_22_5b", "channels": 48, "mask": "frame", "cfg": 4.0},
    "area": PLAIN | {"family": "flux", "size": (8, 8), "extra": {"area": (4, 8, 0, 0)}},
}


def text(seed: int, tokens: int, width: int, valid: int = 0, **extra: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    told = {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 6.0, **extra}
    if valid:
        told["attention_mask"] = (torch.arange(tokens) < valid).long()[None]
    return [torch.randn(1, tokens, width, generator=generator), told]


_swapped: dict[str, Any] = {}


def swapped(path: str) -> Any:
    """The pack's MODEL; one of them is loaded at a time."""
    if path not in _swapped:
        for model in _swapped.values():
            model.detach()
        _swapped.clear()
        layout = config.SequenceParallelConfig(devices="cpu,cpu")
        _swapped[path] = native_model.load_native_model(path, "default", layout)
    return _swapped[path]


def run(case: dict[str, Any], models: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    family = case["family"]
    width = 4096 if family == "wan" else 64
    size = case.get("size", (2, 6, 8) if family != "flux" else (6, 8))
    generator = torch.Generator().manual_seed(4)
    shape = (case.get("batch", 1), case.get("channels", 16), *size)
    latent: dict[str, Any] = {"samples": torch.zeros(shape)}
    if mask := case.get("mask"):
        latent["samples"] = torch.randn(shape, generator=generator)
        latent["noise_mask"] = (torch.rand(1, 1, *size[-2:], generator=generator) > 0.4).float()
        if mask == "frame":
            latent["noise_mask"] = torch.ones(1, 1, *size)
            latent["noise_mask"][:, :, 0] = 0
    elif case.get("denoise", 1) < 1:
        latent["samples"] = torch.randn(shape, generator=generator)
    images = {}
    if case.get("image"):
        images = {
            "concat_latent_image": torch.randn(1, 16, *size, generator=generator),
            "concat_mask": torch.rand(1, 1, *size, generator=generator).round(),
        }
    positive = [text(1, 8, width, case.get("valid", 0), **images)]
    negative = [text(2, case.get("negative", 8), width, **images)]
    if extra := case.get("extra"):
        more = dict(extra)
        if case.get("prompt_mask"):
            more["mask"] = torch.rand(1, *size[-2:], generator=generator)
        positive.append(text(3, 8, width, **more))
    if times := case.get("times"):
        positive[0][1] |= {"start_percent": times[0], "end_percent": times[1]}
        positive.append(text(3, 8, width, start_percent=times[1], end_percent=1.0))

    shown: list[Any] = []

    def callback_for(model: Any, steps: int, x0_output_dict: Any = None) -> Any:
        return lambda step, x0, x, total: shown.append((step, x0.clone(), total))

    latent_preview.prepare_callback = callback_for
    arguments = (3, case["steps"], case.get("cfg", 1.0), case.get("sampler", "euler"), case.get("scheduler", "simple"))

    def sample(model: Any) -> tuple[Any, list[Any]]:
        shown.clear()
        torch.manual_seed(0)
        (made,) = nodes.common_ksampler(
            model, *arguments, positive, negative, dict(latent), denoise=case.get("denoise", 1.0)
        )
        return made["samples"], list(shown)

    key = case.get("model", family)
    expected, expected_shown = sample(models[key][0])
    ours = in_workers.InWorkers()
    actual, actual_shown = sample(ours.attach(swapped(models[key][1])))
    return {
        "difference": float((actual - expected).abs().max() / expected.abs().max()),
        "told": ours.told,
        "messages": 0 if ours.report is None else ours.report.messages,
        "last_step_shown": actual_shown[-1][0] == expected_shown[-1][0],
        "shown_difference": max(
            float((a - e[1]).abs().max() / e[1].abs().max())
            for step, a, _ in actual_shown
            for e in expected_shown
            if e[0] == step
        ),
    }


def previews(model: Any) -> dict[str, Any]:
    """ComfyUI's preview method and the setting's seconds → how often latents came back, how many previews were shown,
    and the last step that the progress bar has seen."""
    text = [[torch.zeros(1, 8, 64), {"pooled_output": torch.zeros(1, 768)}]]
    latent_preview.prepare_callback = NATIVE_CALLBACK
    seen: list[tuple[int, bool]] = []
    comfy.utils.set_progress_bar_global_hook(lambda done, total, image, node_id: seen.append((done, image is not None)))
    told: dict[str, Any] = {}
    for method, seconds in (("none", 0.0), ("latent2rgb", 0.0), ("latent2rgb", 1000.0)):
        seen.clear()
        latent_preview.set_preview_method(method)
        previews_module.settings.read = lambda seconds=seconds: settings.Settings(preview_interval_seconds=seconds)
        ours = in_workers.InWorkers()
        latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
        nodes.common_ksampler(ours.attach(model), 3, 6, 1.0, "euler", "simple", text, text, latent)
        told[f"{method}, {seconds:g} s"] = [ours.report.previews, sum(image for _, image in seen), seen[-1][0]]
    other = previews_module.Audience(lambda *_: None)
    told["another node's callback"] = [other.wants_latents, other.interval_s]
    return told


def main() -> None:
    models: dict[str, tuple[Any, Any]] = {}
    for name, file in MODELS.items():
        path = FOLDER / file
        write_models.write(path, write_models.files()[file])
        models[name] = comfy.sd.load_diffusion_model(str(path)), str(path)
    results: dict[str, Any] = {name: run(case, models) for name, case in CASES.items()}
    results["previews"] = previews(swapped(models["hunyuan_video"][1]))
    running.stop_all()
    print(json.dumps(results))


main()
