"""Compares patched weights with those of ComfyUI's own loader, bit by bit; run with ComfyUI's Python, not by pytest.

    python patched_weights.py COMFYUI REPOSITORY FOLDER [all]

FOLDER is empty. With `all`, nine models, otherwise one in every layout. Prints JSON: case → counts of the patched
tensors, of the scaled ones among them, and of those that differ.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

COMFYUI, REPOSITORY, FOLDER = (Path(argument) for argument in sys.argv[1:4])
ALL_MODELS = sys.argv[4:] == ["all"]
HERE = sys.path[0]  # last: it has a `server`, as ComfyUI
sys.path[:] = [
    str(COMFYUI),
    *sys.path[1:],
    HERE,
    f"{HERE}/test_pack",
]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import tiny_detection  # noqa: E402
import torch  # noqa: E402

sys.path[0] = str(REPOSITORY)  # not for longer: both have `tests` and `nodes`
from tests.comfyui import model_files, write_models  # noqa: E402
from tests.comfyui.lora_files import write_lora_files  # noqa: E402

sys.path[0] = str(COMFYUI)

# The pack as ComfyUI has it: a package whose name is not its folder's.
PACK = types.ModuleType("sequence_parallel_pack")
PACK.__path__ = [str(REPOSITORY)]
sys.modules[PACK.__name__] = PACK
config: Any = import_module(f"{PACK.__name__}.parallel.config")
native_model: Any = import_module(f"{PACK.__name__}.nodes.native_model")
plain_tensors: Any = import_module(f"{PACK.__name__}.parallel.wire.plain").plain_tensors

LORAS = {
    model_files.TINY: "hunyuan_native", model_files.HUNYUAN_15: "hv15_native", model_files.WAN: "wan_native",
    model_files.FLUX: "flux_diffusers", model_files.FLUX2: "flux2_native", model_files.COGVIDEOX: "cogvideox_native",
    model_files.MOCHI: "mochi_native", model_files.LTXV_CAUSAL: "ltxv_diffusers",
    model_files.QWEN_IMAGE: "qwen_diffusers",
}  # fmt: skip
STRENGTH = 0.8


def patched(path: Path, tensors: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors as ComfyUI's own model has them, and as they are sent to the workers."""
    own, _ = comfy.sd.load_lora_for_models(comfy.sd.load_diffusion_model(str(path)), None, tensors, STRENGTH, 0)
    own.patch_model(torch.device("cpu"))
    shell = native_model.load_native_model(str(path), "default", config.SequenceParallelConfig(devices="cpu,cpu"))
    shell, _ = comfy.sd.load_lora_for_models(shell, None, tensors, STRENGTH, 0)
    assert shell.patches.keys() == own.patches.keys()
    names, make = shell._replacement()
    return [(comfy.utils.get_attr(own.model, f"diffusion_model.{name}"), make(name)) for name in names]


def same(own: torch.Tensor, sent: torch.Tensor) -> bool:
    ours, theirs = plain_tensors(sent), plain_tensors(own.data)
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(map(flat, ours), map(flat, theirs), strict=True)
    )


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1)


def main() -> None:
    tiny_detection.apply()
    write_lora_files(FOLDER)
    results = {}
    for name, lora in LORAS.items():
        if not ALL_MODELS and name != model_files.TINY:
            continue
        file = replace(write_models.files()[name], prefix="")
        patches = comfy.utils.load_torch_file(str(FOLDER / f"{lora}.safetensors"))
        layouts = write_models.SCALED_LAYOUTS if name == model_files.TINY else ("comfy_quant",)
        kinds = [(layout, torch.float8_e4m3fn) for layout in layouts]
        for layout, dtype in [*kinds, ("comfy_quant", torch.float8_e5m2)]:
            path = FOLDER / f"{layout}_{dtype}_{name}"
            write_models.write(path, replace(file, scaled=layout, scaled_dtype=dtype))
            pairs = patched(path, patches)
            results[f"{name} {layout} {dtype}"] = [
                len(pairs), sum(len(plain_tensors(sent)) > 1 for _, sent in pairs), sum(not same(*p) for p in pairs)
            ]  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
