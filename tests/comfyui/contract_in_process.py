"""The contract in a process of ComfyUI's, and what newer versions of ComfyUI bring, imitated.

    python contract_in_process.py COMFYUI REPOSITORY FOLDER

Prints one line of JSON: {"check": CPU seconds of the check at start, "imports": of ComfyUI's own imports, "found":
differences, "unlisted": methods of ComfyUI's that the pack overrides and the contract does not list, "renamed":
differences when a function is gone, "refused": why a LoRA that chooses an attention is, "older", "newer": {"log":
lines, "choices": of modules in a worker's network} of a file that chooses one, with a ComfyUI that does not know such
choices and with one that does, "fast_disk": of a clone}.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

QUANTISED = Path(__file__).with_name("quantised_networks.py")
KEY = "blocks.0.attn.comfy_attention.config"
CHOICE = {"attention": "comfy_kitchen_int8"}


def main(comfyui: str, repository: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("quantised_networks", QUANTISED)
    assert spec is not None and spec.loader is not None
    quantised = sys.modules["quantised_networks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quantised)
    models = quantised.prepare(comfyui, repository)
    for module in ("execution", "latent_preview", "nodes", "server", "comfy_extras.nodes_easycache"):
        importlib.import_module(module)
    import comfy.ldm.krea2.model
    import comfy.model_patcher
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    contract = importlib.import_module("pack.parallel.comfyui.contract")
    loaded = contract.Loaded()
    began = time.process_time()
    told: dict[str, Any] = {"found": contract.differences(loaded), "imports": began}
    told["check"] = time.process_time() - began
    listed = {symbol.title for part in contract.PARTS.values() for symbol in contract.symbols(part)}
    assert all(loaded.find(s.module, s.names) for part in contract.PARTS.values() for s in contract.symbols(part))
    shell = importlib.import_module("pack.nodes.shell_patcher").SequenceParallelPatcher
    vae = importlib.import_module("pack.nodes.parallel_vae").VAEInWorkers
    told["unlisted"] = [
        name
        for ours, base in ((shell, comfy.model_patcher.ModelPatcher), (vae, comfy.sd.VAE))
        for kind in ours.__mro__
        if kind.__module__.startswith("pack")
        for name in vars(kind)
        if not name.startswith("_")
        and hasattr(base, name)
        and f"{base.__module__}.{base.__name__}.{name}" not in listed
    ]
    gone = comfy.utils.load_torch_file
    del comfy.utils.load_torch_file
    told["renamed"] = contract.describe(contract.differences(loaded))
    comfy.utils.load_torch_file = gone

    case = models.CASES["Krea 2"]
    tensors = {
        key: value.contiguous() for key, value in models.network_of(case.supported, case.config(4)).state_dict().items()
    }
    tensors[KEY] = torch.tensor(list(json.dumps(CHOICE).encode()), dtype=torch.uint8)
    path = folder / "chooses.safetensors"
    save_file(tensors, path)
    load_native_model = importlib.import_module("pack.nodes.native_model").load_native_model
    config = importlib.import_module("pack.parallel.config").SequenceParallelConfig(devices="cpu")
    network_file = importlib.import_module("pack.parallel.comfyui.network").NetworkFile
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sequence_parallel").addHandler(handler)

    def loads() -> tuple[Any, dict[str, Any]]:
        lines.clear()
        model = load_native_model(str(path), "default", config)
        network, _ = network_file(str(path), None, torch.device("cpu")).network()
        found = {n: m.config for n, m in network.named_modules() if n.endswith("comfy_attention") and m.config}
        return model, {"log": list(lines), "choices": found}

    model, told["older"] = loads()
    try:
        model.add_patches({f"diffusion_model.{KEY}": ("config", (CHOICE,))})
    except RuntimeError as error:
        told["refused"] = str(error)

    class Choice(torch.nn.Module):
        """As newer ComfyUI's: a module without parameters, which reads its file's tensor."""

        config: Any = None

        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            if (read := state.get(f"{prefix}config")) is not None:
                self.config = json.loads(read.numpy().tobytes())
                del state[f"{prefix}config"]

    make = comfy.ldm.krea2.model.Attention.__init__

    def newer(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.comfy_attention = Choice()

    comfy.ldm.krea2.model.Attention.__init__ = newer
    _, told["newer"] = loads()

    patcher = comfy.model_patcher.ModelPatcher
    made = patcher.__init__

    def newer_patcher(self, model, load_device, offload_device, size=0, weight_inplace_update=False, fast_disk=False):
        made(self, model, load_device, offload_device, size, weight_inplace_update)
        self.fast_disk = fast_disk

    patcher.__init__ = newer_patcher
    devices = model.load_device, model.offload_device
    told["fast_disk"] = type(model)(model.model, *devices, 1, weight_inplace_update=False, fast_disk=True).fast_disk
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
