"""Writes GGUF files of the tiny models, with a Python that has the library gguf:

python -m tests.comfyui.gguf_files FOLDER [FILE …]
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

_PREFIX = "model.diffusion_model."
_KINDS = (Type.Q8_0, Type.Q5_0, Type.Q4_K, Type.F16, Type.BF16)
"""They take turns among the matrices of the blocks."""
ARCHITECTURES = {"tiny_flux": "flux", "tiny_wan": "wan"}


def write(source: Path, kinds: tuple[Type, ...], target: Path) -> None:
    """Quantises a safetensors file: its matrices as `kinds` in turns, all else F32."""
    writer = gguf.GGUFWriter(target, ARCHITECTURES[source.stem])
    matrices = 0
    for name, values in sorted(load_file(source).items()):
        name = name.removeprefix(_PREFIX)
        if values.ndim > 4:  # ggml's most
            writer.add_array(f"comfy.gguf.orig_shape.{name}", values.shape)
            values = values.reshape(values.shape[0], -1)
        kind = Type.F32
        if values.ndim == 2 and "blocks" in name and values.shape[1] % 256 == 0:
            kind = kinds[matrices % len(kinds)]
            matrices += 1
        writer.add_tensor(name, _quantised(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantised(values: np.ndarray, kind: Type) -> np.ndarray:
    if kind is not Type.Q4_K:
        return gguf.quants.quantize(values, kind)
    # The library reads this kind, and does not write it: other values of the same size do as well.
    blocks = values.size // 256
    random = np.random.RandomState(blocks)
    data = random.randint(0, 256, (blocks, 144)).astype(np.uint8)
    scales = np.full((blocks, 2), [values.std() / 150, values.std() / 20], np.float16)
    data[:, :4] = scales.view(np.uint8)
    return data.reshape(values.shape[0], -1)


def main(folder: Path) -> None:
    """Beside each safetensors file one with all kinds, and one of FLUX in F16."""
    for name in ARCHITECTURES:
        write(folder / f"{name}.safetensors", _KINDS, folder / f"{name}.gguf")
    write(folder / "tiny_flux.safetensors", (Type.F16,), folder / "tiny_flux_f16.gguf")
    content = (folder / "tiny_flux.gguf").read_bytes()
    (folder / "truncated.gguf").write_bytes(content[: len(content) // 2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
