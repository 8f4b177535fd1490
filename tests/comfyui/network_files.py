"""Tiny files of ComfyUI's own networks in its own layout, written with its Python:

python -m tests.comfyui.network_files COMFYUI FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.comfyui.installation import REPOSITORY, Installation

H3 = "tiny_minimax_h3.safetensors"
LTX23 = "tiny_ltx_2.3.safetensors"
KREA2 = "tiny_krea_2.safetensors"
Z_IMAGE = "tiny_z_image.safetensors"
WAN_VACE = "tiny_wan_vace.safetensors"
LORA = "krea_2_lora.safetensors"


def write_network_files(installation: Installation, models: Path) -> None:
    """Fills a ComfyUI models folder."""
    command = [str(installation.python), "-m", "tests.comfyui.network_files", str(installation.path), str(models)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def _write(comfyui: str, models: Path) -> None:
    from parallel.comfyui.start import prepare

    prepare(comfyui, {"cpu": True})
    from tests.comfyui import split_models

    networks: dict[str, tuple[str, dict[str, Any]]] = {
        H3: ("MiniMaxH3", split_models.minimax_h3(4)),
        LTX23: ("LTXAV", split_models.ltx23(4)),
        KREA2: ("Krea2", split_models.krea2(4)),
        Z_IMAGE: ("Lumina2", split_models.lumina(3)),
        WAN_VACE: ("WAN21_Vace", split_models.wan_vace(3)),
    }
    for name, (supported, config) in networks.items():
        network = split_models.network_of(supported, config)
        metadata = {"config": json.dumps({"transformer": config})} if supported == "LTXAV" else None
        tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(tensors, models / "diffusion_models" / name, metadata)
    layers = {"diffusion_model.blocks.0.attn.wq": (512, 512), "diffusion_model.blocks.2.mlp.up": (1408, 512)}
    lora = {}
    for layer, (rows, columns) in layers.items():
        lora[f"{layer}.lora_A.weight"] = 0.1 * split_models.random(4, columns)
        lora[f"{layer}.lora_B.weight"] = 0.1 * split_models.random(rows, 4)
    save_file(lora, models / "loras" / LORA)


if __name__ == "__main__":
    _write(sys.argv[1], Path(sys.argv[2]))
