"""Stands in for `worker/boot.py`: a worker whose `echo` says what has become of the packages that diffusers imports."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

ENTERED = time.monotonic()
BOOT = Path(__file__).parents[2] / "parallel" / "worker" / "boot.py"


def facts(model: Any) -> dict[str, Any]:
    """Of this process, in which `model` (a diffusers model) has been loaded."""
    hidden = sorted(name for name, module in sys.modules.items() if module is None)
    import peft
    import transformers

    model.add_adapter(peft.LoraConfig(r=1, target_modules=["to_q"]))
    return {
        "hidden": hidden,
        "transformers": transformers.__version__,
        "pretrained": transformers.PreTrainedModel.__mro__[-1] is object,
        "lora": [name for name, _ in model.named_parameters() if "lora_A" in name],
    }


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("boot", BOOT)
    assert spec is not None and spec.loader is not None
    boot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boot)
    boot.import_engine()
    loop = importlib.import_module(f"{boot.ENGINE}.worker.loop")

    class Reporting(loop.Worker):
        def _echo(self, message: dict[str, Any]) -> dict[str, Any]:
            (resident,) = self._models.values()
            return facts(resident.model)

    loop.Worker = Reporting
    loop.main(json.loads(sys.argv[1]), ENTERED)
