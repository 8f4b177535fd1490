"""Writes linear.safetensors: what torchao makes of one linear layer under each of the FP8 schemes, on the CPU.

    pip install --no-deps torchao==0.18.0 && python tests/golden/torchao/make_golden.py

Beside torch 2.13. torchao refuses the dynamic schemes without a GPU; its arithmetic runs on the CPU all the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torchao
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quant_api,
    quantize_,
)

quant_api._check_hardware_support = lambda granularities: None
CONFIGS = {
    "weight_only": Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False),
    "dynamic_rowwise": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
    "dynamic_tensorwise": Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor(), set_inductor_config=False),
}


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).bfloat16() for s in ((2, 7, 64), (48, 64), (48,)))
    x[0, 3] *= 100  # tokens of unequal size, which tell the schemes apart
    tensors: dict[str, Tensor] = {"x": x, "weight": weight, "bias": bias}
    for scheme, config in CONFIGS.items():
        layer = nn.Linear(64, 48, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
            quantize_(layer, config)
            tensors |= {
                f"{scheme}.out": layer(x),
                f"{scheme}.data": layer.weight.qdata,
                f"{scheme}.scale": layer.weight.scale,
            }
    versions = {"made_by": f"torchao {torchao.__version__}, torch {torch.__version__}"}
    save_file({n: t.contiguous() for n, t in tensors.items()}, Path(__file__).with_name("linear.safetensors"), versions)


if __name__ == "__main__":
    main()
