"""comfy-kitchen's schemes of FP8 Quantize (SP), against ComfyUI's own loading of files that are quantised so.

    python scheme_networks.py COMFYUI REPOSITORY FOLDER KNOBS NETWORK…

As `quantised_networks.py`, whose networks' files are plain here. Prints {"network scheme": {"rounding", "sensitivity",
"lora changes", "layers", "restored", "saved": bytes by which the workers' weights are less than said, title: {"plain",
"lora"}}}: relative differences of ComfyUI's results for files with the same layers quantised, under "lora" those of
patched weights.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from quantised_networks import load, off, prepare, quantised, run, sensitivity

SCHEMES = ("int8_convrot", "mxfp8", "nvfp4")
PATCHED = {"MiniMax H3": "blocks.0.attn.qkv_proj.weight", "Z-Image": "layers.0.attention.qkv.weight"}
"""Network → the weight that a LoRA changes."""


def main(comfyui: str, repository: str, folder: Path, knobs: dict[str, dict[str, Any]], titles: list[str]) -> None:
    models = prepare(comfyui, repository)
    import comfy.model_management
    import comfy.sd
    from safetensors.torch import save_file

    load_native_model = importlib.import_module("pack.nodes.native_model").load_native_model
    config = importlib.import_module("pack.parallel.config").SequenceParallelConfig
    settings_of = importlib.import_module("pack.parallel.quantise.settings").FP8Settings
    attach_fp8 = importlib.import_module("pack.nodes.attached_fp8").attach_fp8
    align = load("aligned", f"{repository}/tests/aligned.py").align
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def save(tensors: dict[str, Any], file: Path) -> None:
        save_file(tensors, file)
        align(file)

    patches = {title: PATCHED[title] for title in titles}
    plain = {title: folder / f"{title}.safetensors" for title in patches}
    changes: dict[str, Any] = {}
    native: dict[tuple[str, str], dict[str, Any]] = {}
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for title, patched in patches.items():
        case = models.CASES[title]
        network = models.network_of(case.supported, case.config(4))
        tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        changes[title] = 0.01 * models.random(*tensors[patched].shape)
        save(tensors, plain[title])
        exact = run(models, comfy.sd.load_diffusion_model(str(plain[title])), case)
        held = load_native_model(str(plain[title]), "default", config(devices="cpu")).held
        for scheme in SCHEMES:
            layers = [name.removesuffix(".weight") for name in held.select_fp8(settings_of(scheme=scheme)).weights]
            found = native[title, scheme] = {}
            for state, change in {"plain": 0, "lora": changes[title]}.items():
                network.load_state_dict(tensors | {patched: tensors[patched] + change})
                file = folder / f"{title} {scheme} {state}.safetensors"
                save(quantised(network, scheme, layers), file)
                model = comfy.sd.load_diffusion_model(str(file))
                found[state] = run(models, model, case)
            results[title, scheme] = {
                "rounding": off(found["plain"], exact),
                "sensitivity": sensitivity(models, model, case, found["lora"]),
                "lora changes": off(found["lora"], found["plain"]),
                "layers": len(layers),
            }
    for knob, chosen in knobs.items():
        for (title, scheme), told in results.items():
            case, settings, expected = models.CASES[title], settings_of(scheme=scheme), native[title, scheme]
            model = load_native_model(str(plain[title]), "default", config(**chosen)).clone()
            attach_fp8(model, settings, "1")
            with_lora = model.clone()
            with_lora.add_patches({f"diffusion_model.{patches[title]}": (changes[title],)})
            told[knob] = {
                "plain": off(run(models, model, case), expected["plain"]),
                "lora": off(run(models, with_lora, case), expected["lora"]),
            }
            if knob == "one":
                held, report = model.held, model.held.fp8_report
                said = held.recipe.nbytes - held.select_fp8(settings).saved
                told |= {"restored": report.restored, "saved": said - report.bytes_after}
            comfy.model_management.unload_all_models()
    print(json.dumps({" ".join(name): told for name, told in results.items()}))


if __name__ == "__main__":
    torch = importlib.import_module("torch")
    with torch.inference_mode():
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5:])
