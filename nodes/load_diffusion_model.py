"""Load Diffusion Model (SP): ComfyUI's own loader, with the network in the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..parallel.comfyui import gguf
from ..parallel.config import SequenceParallelConfig
from ..parallel.errors import ConfigError
from ..parallel.headers import read_json
from .gguf_pack import pack_folder
from .native_model import WEIGHT_DTYPES, load_native_model
from .settings import default_config, default_devices
from .sp_config import SPConfig

_FOLDER, _CONFIG = "diffusion_models", "config.json"
_GGUF = "unet_gguf"
"""ComfyUI-GGUF's name of its list of the same folders."""


class SPLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPLoadDiffusionModel",
            display_name="Load Diffusion Model (SP)",
            category="sequence parallel",
            description=(
                "Loads a diffusion model whose every step runs on all devices of SP Config at once. Use it in place"
                " of Load Diffusion Model; the rest of the graph stays as it is. Weights are read at the first"
                " sampling, by worker processes that stay for the next prompt."
            ),
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=_choices(),
                    tooltip="A safetensors file in models/diffusion_models, a .gguf file there if the pack"
                    " ComfyUI-GGUF is installed, or a diffusers transformer folder of a kind that ComfyUI converts. See"
                    " help.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="As in Load Diffusion Model. fp8_e4m3fn and fp8_e5m2 halve the weights' memory; quantised"
                    " files keep their own format, and GGUF files take default only.",
                    advanced=True,
                ),
                SPConfig.Input(
                    "sp_config",
                    optional=True,
                    tooltip="Devices and degrees. Without it: every GPU, or those of the setting Default devices.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, unet_name: str, weight_dtype: str, sp_config: SequenceParallelConfig | None = None
    ) -> io.NodeOutput:
        model = load_native_model(_full_path(unet_name), weight_dtype, sp_config or default_config())
        return io.NodeOutput(model)

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool:
        """Refuses a name that is not in the list. None is a name that comes from a link and is not known yet.

        Raises:
            UnsupportedError: a GGUF file, without the pack ComfyUI-GGUF; ComfyUI shows the message.
            ConfigError: any other such name; ComfyUI shows the message.
        """
        if unet_name is None or unet_name in _choices():
            return True
        if unet_name.endswith(gguf.SUFFIX) and not pack_folder():
            raise gguf.refusal(unet_name)
        raise ConfigError(f"unet_name is {unet_name!r}, which models/{_FOLDER} does not have")

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Returns the default devices: if the setting changes, so does the MODEL, though no input has changed."""
        return default_devices(inputs)


def _choices() -> list[str]:
    """Lists single files, diffusers folders (not the files inside them), and GGUF files as their pack lists them."""
    folders = sorted({name for root in folder_paths.get_folder_paths(_FOLDER) for name in _diffusers_folders(root)})
    files = folder_paths.get_filename_list(_FOLDER)
    parts = {name for name in files if _is_part(name) and Path(name).parent.as_posix() in folders}
    quantised = folder_paths.get_filename_list(_GGUF) if pack_folder() else []
    return [name for name in files if name not in parts] + folders + quantised


_found: dict[str, tuple[dict[str, float], list[str]]] = {}
"""Maps a models folder to its sub-folders' modification times and the diffusers transformers in it."""


def _diffusers_folders(root: str) -> list[str]:
    """Lists the sub-folders that hold a diffusers transformer; follows links.

    Searches again only if a folder has changed: ComfyUI calls this whenever it describes or validates the node.
    """
    try:
        if root in _found and all(Path(name).stat().st_mtime == time for name, time in _found[root][0].items()):
            return _found[root][1]
    except OSError:
        pass  # a folder has been removed
    files, changed = folder_paths.recursive_search(root, excluded_dir_names=[".git"])
    folders = [Path(name).parent.as_posix() for name in files if Path(name).parts[1:] and Path(name).name == _CONFIG]
    _found[root] = changed, [name for name in folders if _is_transformer(Path(root) / name)]
    return _found[root][1]


def _is_transformer(folder: Path) -> bool:
    try:
        config = read_json(folder / _CONFIG)
    except ValueError:
        return False
    return isinstance(config, dict) and "Transformer" in str(config.get("_class_name"))


def _is_part(name: str) -> bool:
    """Returns True if the file is named like the weights in diffusers' folders, whole or in shards."""
    return Path(name).name.startswith("diffusion_pytorch_model")


def _full_path(unet_name: str) -> str:
    if unet_name.endswith(gguf.SUFFIX):
        return folder_paths.get_full_path_or_raise(_GGUF, unet_name)
    for root in folder_paths.get_folder_paths(_FOLDER):
        path = Path(root) / unet_name
        if (path / _CONFIG).is_file():
            return str(path)
        folder = Path(unet_name).parent.as_posix()
        if path.is_file() and _is_part(unet_name) and folder in _diffusers_folders(root):
            raise ConfigError(f"unet_name is {unet_name!r}, a part of a diffusers folder; choose {folder!r}")
    return folder_paths.get_full_path_or_raise(_FOLDER, unet_name)
