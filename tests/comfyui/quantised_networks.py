"""Quantised files of ComfyUI's own networks: its own loader against the workers, in one process of ComfyUI's.

    python quantised_networks.py COMFYUI REPOSITORY FOLDER KNOBS FORMATS NETWORK …

KNOBS are JSON: {title: knobs of SP Config}, of which the first is one worker. FORMATS are JSON, too: names of a table
below, or null for all and for a file that is not quantised. Prints one line of JSON: {file:
{"sensitivity": …, "rounding": of the weights, "lora changes": what a LoRA changes, "fp8": layers that FP8 Quantize (SP)
would leave in fp8 or message, title: {"plain", "lora", "removed": relative differences of native results}}}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "int8_convrot": ("int8_tensorwise", {"per_channel": True, "convrot": True}, {"convrot": True}),
    "fp8": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "nvfp4": ("nvfp4", {"scale": "recalculate"}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "fp8mixed": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "fp8_scaled": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
}
"""Name → ComfyUI's format, how its layout quantises a weight, what `comfy_quant` says besides. In *fp8mixed* some
layers stay as they are; *fp8_scaled* is named as files were before `comfy_quant`."""
CONVROT_GROUP = 256
_IN_BLOCKS = re.compile(r"(blocks|layers)\.\d")
NUDGE = 3e-7
"""A relative change of the latent's values, as another order of sums makes."""
NUDGES = 3


@dataclass(frozen=True)
class File:
    """A file and how it is loaded."""

    case: Any
    patched: str
    """The weight that a LoRA changes."""
    path: Path
    dtype: str = "default"
    """As chosen in the loader."""


def prepare(comfyui: str, repository: str) -> Any:
    """Makes ComfyUI and the pack importable; returns the tiny networks' module."""
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[0] = comfyui
    importlib.import_module("comfy.options").enable_args_parsing()
    load("pack", f"{repository}/__init__.py", [repository])
    return load("split_models", f"{repository}/tests/comfyui/split_models.py")


def load(name: str, path: str, folders: list[str] | None = None) -> Any:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantised(network: Any, name: str, layers: list[str] | None = None) -> dict[str, Any]:
    """The network's tensors as a file has them: these layers, or by default linear layers of its blocks, in the
    format."""
    import torch
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    algorithm, options, told = FORMATS[name]
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    linear = layers or [
        layer
        for layer, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and _IN_BLOCKS.search(layer) and not module.in_features % CONVROT_GROUP
    ]
    for layer in linear[::2] if name == "fp8mixed" else linear:
        layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
        weight = tensors.pop(f"{layer}.weight")
        if "convrot" in told:
            group = next(size for size in (256, 64, 16) if not weight.shape[1] % size)
            options, told = ({**each, "convrot_groupsize": group} for each in (options, told))
        weight = QuantizedTensor.from_float(weight, layout, **options)
        tensors |= weight.state_dict(f"{layer}.weight")
        described = json.dumps({"format": algorithm, **told}).encode().ljust(128)  # what follows stays aligned
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(described), dtype=torch.uint8)
        if name == "fp8_scaled":
            del tensors[f"{layer}.comfy_quant"]
            tensors[f"{layer}.scale_weight"] = tensors.pop(f"{layer}.weight_scale")
    if name == "fp8_scaled":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return tensors


def run(models: Any, model: Any, case: Any, nudge: int = 0) -> Any:
    """One prediction by a MODEL's network, with a latent that is nudged under a seed other than 0."""
    import comfy.model_management

    def nudged(part: Any) -> Any:
        return part * (1 + NUDGE * models.random(*part.shape, seed=nudge)) if nudge else part

    comfy.model_management.load_models_gpu([model])
    (x, *rest), named = case.inputs(model.model.diffusion_model)
    x = [nudged(part) for part in x] if isinstance(x, list) else nudged(x)
    return models.flat(model.model.diffusion_model(x, *rest, transformer_options={}, **named)).float()


def sensitivity(models: Any, model: Any, case: Any, result: Any) -> float:
    """By how much results differ whose latents do by `NUDGE`."""
    return max(off(run(models, model, case, seed), result) for seed in range(1, 1 + NUDGES))


def off(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def main(
    comfyui: str,
    repository: str,
    folder: Path,
    knobs: dict[str, dict[str, Any]],
    formats: list[str] | None,
    names: list[str],
) -> None:
    models = prepare(comfyui, repository)
    import comfy.model_management
    import comfy.sd
    import torch
    from safetensors.torch import save_file

    load_native_model = importlib.import_module("pack.nodes.native_model").load_native_model
    config = importlib.import_module("pack.parallel.config").SequenceParallelConfig
    fp8_settings = importlib.import_module("pack.parallel.quantise.settings").FP8Settings
    errors = importlib.import_module("pack.parallel.errors")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as one worker has
    networks = {
        "h3": (models.CASES["MiniMax H3"], "blocks.0.attn.qkv_proj.weight"),
        "qwen": (models.CASES["Qwen-Image"], "transformer_blocks.0.attn.to_q.weight"),
        "z-image": (models.CASES["Z-Image"], "layers.0.attention.qkv.weight"),
    }
    files: dict[str, File] = {}
    for title in names:
        case, patched = networks[title]
        network = models.network_of(case.supported, case.config(4))
        for form in formats or FORMATS:
            path = folder / f"{title}_{form}.safetensors"
            save_file(quantised(network, form), path)
            files[f"{title} {form}"] = File(case, patched, path)
    case, patched = models.CASES["Krea 2"], "blocks.0.attn.wq.weight"
    network = models.network_of(case.supported, case.config(4))
    for dtype in () if formats else (torch.float32, torch.bfloat16):
        path = folder / f"{dtype}.safetensors"
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in network.state_dict().items()}, path)
        files["krea2 bfloat16" if dtype == torch.bfloat16 else "krea2 as fp8_e4m3fn"] = File(
            case, patched, path, "default" if dtype == torch.bfloat16 else "fp8_e4m3fn"
        )

    def patch(model: Any, patched: str) -> Any:
        """With a LoRA's change of one weight."""
        key = f"diffusion_model.{patched}"
        clone = model.clone()
        clone.add_patches({key: (0.01 * models.random(*shapes[patched]),)})
        return clone

    shapes: dict[str, Any] = {}
    """Of the patched weights, before they are quantised."""
    results: dict[str, dict[str, Any]] = {}
    native: dict[str, Any] = {}
    with_lora: dict[str, Any] = {}
    for name, file in files.items():
        options = {} if file.dtype == "default" else {"dtype": getattr(torch, f"float8_{file.dtype[4:]}")}
        model = comfy.sd.load_diffusion_model(str(file.path), model_options=options)
        native[name] = run(models, model, file.case)
        plain = models.network_of(file.case.supported, file.case.config(4))
        args, named = file.case.inputs(plain)
        alone = models.flat(plain(*args, transformer_options={}, **named))
        shapes[file.patched] = plain.state_dict()[file.patched].shape
        results[name] = {
            "sensitivity": sensitivity(models, model, file.case, native[name]),  # and that with the LoRA, below
            "rounding": off(native[name], alone),
        }
        patched = patch(model, file.patched)
        with_lora[name] = run(models, patched, file.case)
        moved = sensitivity(models, patched, file.case, with_lora[name])
        results[name]["sensitivity"] = max(results[name]["sensitivity"], moved)
        results[name]["lora changes"] = off(with_lora[name], native[name])
        comfy.model_management.unload_all_models()
    for number, (title, chosen) in enumerate(knobs.items()):
        for name, file in files.items():
            model = load_native_model(str(file.path), file.dtype, config(**chosen))
            told = results[name][title] = {"plain": off(run(models, model, file.case), native[name])}
            if not number:
                try:
                    results[name]["fp8"] = model.held.select_fp8(fp8_settings()).already
                except errors.UnsupportedError as error:
                    results[name]["fp8"] = str(error)
            told["lora"] = off(run(models, patch(model, file.patched), file.case), with_lora[name])
            told["removed"] = off(run(models, model, file.case), native[name])
            comfy.model_management.unload_all_models()
    print(json.dumps(results))


if __name__ == "__main__":
    torch = importlib.import_module("torch")
    _, path, root, written, knobs_told, formats_told, *names_told = sys.argv
    with torch.inference_mode():  # as ComfyUI runs prompts: comfy-kitchen's products depend on it
        main(path, root, Path(written), json.loads(knobs_told), json.loads(formats_told), names_told)
