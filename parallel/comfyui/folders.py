"""Diffusers folders of models whose class ComfyUI has, but for which it has no conversion.

This is CogVideoX, whose version 1.5 is published in no other form. Its tensors are the same under other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..headers import read_json

_COGVIDEOX = "CogVideoXTransformer3DModel"
_NAMES = [
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.to_([qkv])\.", r".\1."),
    (r"\.attn1\.norm_([qk])\.", r".norm_\1."),
    (r"\.attn1\.to_out\.0\.", ".attn_out."),
    (r"\.ff\.net\.0\.proj\.", ".ff_proj."),
    (r"\.ff\.net\.2\.", ".ff_out."),
    (r"^(time|ofs)_embedding\.linear_(\d)\.", r"\1_embedding_linear_\2."),
]
"""Patterns of diffusers' names, and the replacements that give ComfyUI's."""
_SIZES = (
    "sample_width", "sample_height", "sample_frames", "max_text_seq_length", "temporal_compression_ratio",
    "spatial_interpolation_scale", "temporal_interpolation_scale", "use_rotary_positional_embeddings",
    "use_learned_positional_embeddings",
)  # fmt: skip
"""Entries of `config.json` that cannot be derived from a file's tensors; both classes use these names."""


def in_comfyuis_names(path: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Renames a folder's tensors to ComfyUI's names.

    Returns:
        The tensors, and the configuration that cannot be derived from them; None for a folder of another class.
    """
    try:
        config = read_json(Path(path) / "config.json")
    except ValueError:
        return None
    if not isinstance(config, dict) or config.get("_class_name") != _COGVIDEOX:
        return None
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed, {name: config[name] for name in _SIZES if name in config}
