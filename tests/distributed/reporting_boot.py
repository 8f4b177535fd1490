"""Stands in for `worker/boot.py`: a worker that says what has become of the packages that diffusers imports, when it is
asked to forget a cache."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

ENTERED = time.monotonic()
BOOT = Path(__file__).parents[2] / "parallel" / "worker" / "boot.py"


def facts(network: Any) -> dict[str, Any]:
    """Of this process, in which `network`, one of diffusers, has been loaded."""
    hidden = sorted(name for name, module in sys.modules.items() if module is None)
    import peft
    import transformers

    network.add_adapter(peft.LoraConfig(r=1, target_modules=["to_q"]))
    return {
        "hidden": hidden,
        "transformers": transformers.__version__,
        "pretrained": transformers.PreTrainedModel.__mro__[-1] is object,
        "collects": gc.isenabled(),
        "frozen": gc.get_freeze_count(),
        "lora": [name for name, _ in network.named_parameters() if "lora_A" in name],
    }


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("boot", BOOT)
    assert spec is not None and spec.loader is not None
    boot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boot)
    boot.import_engine()
    models = importlib.import_module(f"{boot.ENGINE}.worker.models").Models

    def told(self: Any, message: Any) -> dict[str, Any]:
        return facts(self.of(message.model)._network)

    models._forget_cache = told
    importlib.import_module(f"{boot.ENGINE}.worker.loop").main(json.loads(sys.argv[1]), ENTERED)
