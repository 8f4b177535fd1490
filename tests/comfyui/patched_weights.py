"""Compares patched weights with those of ComfyUI's own loader, bit by bit; run with ComfyUI's Python, not by pytest.

    python patched_weights.py COMFYUI REPOSITORY FOLDER

FOLDER is empty. Prints JSON: case → counts of the patched tensors, of the scaled ones among them, and of those that
differ.
"""

from __future__ import annotations

import json
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

COMFYUI, REPOSITORY, FOLDER = (Path(argument) for argument in sys.argv[1:])
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
from lora_files import write_lora_files  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

# The pack as ComfyUI has it: a package whose name is not its folder's.
PACK = types.ModuleType("sequence_parallel_pack")
PACK.__path__ = [str(REPOSITORY)]
sys.modules[PACK.__name__] = PACK
checkpoint: Any = import_module(f"{PACK.__name__}.parallel.demo.checkpoint")
config: Any = import_module(f"{PACK.__name__}.parallel.config")
native_model: Any = import_module(f"{PACK.__name__}.nodes.native_model")
lora: Any = import_module(f"{PACK.__name__}.nodes.lora")

LORAS = {
    "hunyuan_video": "hunyuan_native", "hunyuan_video_15": "hv15_native", "wan": "wan_native",
    "flux": "flux_diffusers", "flux2": "flux2_native", "cogvideox": "cogvideox_native",
    "mochi": "mochi_native", "ltxv": "ltxv_diffusers", "qwen_image": "qwen_diffusers",
}  # fmt: skip
STRENGTH = 0.8


def patched(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, Any]]:
    """Name → the tensor as ComfyUI's own model has it, and as it is sent to the workers."""
    own, _ = comfy.sd.load_lora_for_models(comfy.sd.load_diffusion_model(str(path)), None, tensors, STRENGTH, 0)
    own.patch_model(torch.device("cpu"))
    shell = native_model.load_native_model(str(path), "default", config.SequenceParallelConfig(devices="cpu,cpu"))
    shell, _ = comfy.sd.load_lora_for_models(shell, None, tensors, STRENGTH, 0)
    assert shell.patches.keys() == own.patches.keys()
    found = {}
    with shell.remote.inspected.source.reader() as read:
        for key in shell.patches:
            stored = read.stored(shell._checkpoint_name(key))
            sent = lora.patched_weight(shell.patches, key, stored, shell.load_device)
            found[key] = comfy.utils.get_attr(own.model, key), sent
    return found


def same(own: Any, sent: Any) -> bool:
    if sent.scale is None:
        return torch.equal(own, sent.tensor)
    state = own.state_dict("weight")
    equal = torch.equal(state["weight"].view(torch.uint8), sent.tensor.view(torch.uint8))
    return equal and state["weight_scale"].item() == sent.scale


def main() -> None:
    tiny_detection.apply()
    write_lora_files(FOLDER)
    results = {}
    for family, write in checkpoint.WRITERS.items():
        write(FOLDER / "whole.safetensors")
        whole = comfy.utils.load_torch_file(str(FOLDER / "whole.safetensors"))
        patches = comfy.utils.load_torch_file(str(FOLDER / f"{LORAS[family]}.safetensors"))
        kinds = [(layout, torch.float8_e4m3fn) for layout in checkpoint.SCALED_LAYOUTS]
        for layout, dtype in [*kinds, ("comfy_quant", torch.float8_e5m2)]:
            tensors, metadata = checkpoint.scaled_fp8(whole, layout, dtype)
            path = FOLDER / f"{family}_{layout}_{dtype}.safetensors"
            save_file(tensors, path, metadata)
            pairs = patched(path, patches).values()
            results[f"{family} {layout} {dtype}"] = [
                len(pairs), sum(sent.scale is not None for _, sent in pairs), sum(not same(*pair) for pair in pairs)
            ]  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
