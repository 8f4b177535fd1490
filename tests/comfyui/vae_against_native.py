"""Native tiled VAE nodes against the parallel ones, in one process of ComfyUI's; prints a line of JSON for each case.

Started by `test_vae.py` with ComfyUI's Python: `vae_against_native.py <ComfyUI> <repository> <cases as JSON>`.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import sys
from typing import Any


def _prepare(comfyui: str) -> None:
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[0] = comfyui
    options = importlib.import_module("comfy.options")
    options.enable_args_parsing()


def _import(name: str, path: str, package: bool = False) -> Any:
    folders = {"submodule_search_locations": [path]} if package else {}
    spec = importlib.util.spec_from_file_location(name, f"{path}/__init__.py" if package else path, **folders)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(comfyui: str, repository: str, cases: list[dict[str, Any]]) -> None:
    import torch

    networks = _import("vae_networks", f"{repository}/tests/comfyui/test_pack/vae_networks.py")
    _import("pack", repository, package=True)
    parallel_vae = importlib.import_module("pack.nodes.parallel_vae")
    config = importlib.import_module("pack.parallel.config").SequenceParallelConfig
    torch.set_num_threads(1)
    told: list[str] = []
    parallel_vae.tell = parallel_vae.tell_fallback = lambda node_id, text: told.append(text)
    vaes: dict[str, Any] = {}
    native: dict[int, Any] = {}
    results: list[dict[str, Any]] = [{} for _ in cases]
    order: list[str] = []
    for case in cases:
        order += [devices for devices in case["devices"] if devices not in order]
    # Device by device: other devices are other workers, and each of them imports ComfyUI.
    for devices, (i, case) in itertools.product(order, enumerate(cases)):
        repetitions = case["devices"].count(devices)
        if not repetitions:
            continue
        wanted = f"{case['kind']} {case.get('changed')}"
        if wanted not in vaes:
            vae = patcher = None
            _forget(vaes, parallel_vae)
            vaes[wanted] = networks.make_vae(case["kind"])
        vae = vaes[wanted]
        for name, value in case.get("changed", {}).items():
            setattr(vae.first_stage_model, name, value)
        given = torch.randn(case["shape"], generator=torch.Generator().manual_seed(1))
        given = {"samples": {"samples": given}} if "Decode" in case["node"] else {"pixels": given.sigmoid()}
        through, plain, inputs = case["through"], case["node"].removesuffix("Tiled"), case["inputs"]
        with torch.inference_mode():
            if i not in native:
                one_tile = through == "any node, one tile"
                native[i] = _run(plain, vae, given) if one_tile else _run(case["node"], vae, given | inputs)
            told.clear()
            for _ in range(repetitions):
                if through == "parallel node":
                    actual = _tensor(
                        parallel_vae.run_tiled(case["node"], vae, config(devices=devices), **given, **inputs)
                    )
                else:
                    actual = _run(plain, parallel_vae.in_workers(vae, config(devices=devices), **inputs), given)
        patcher = parallel_vae._patchers.get(vae.first_stage_model)
        run = patcher.remote.last_run if patcher is not None else None
        results[i][devices] = {
            "equal": torch.equal(actual, native[i]),
            "told": " and ".join(told),
            "bytes_back": run.bytes_back if run is not None else 0,
        }
    for expected, found in zip((native[i] for i in range(len(cases))), results, strict=True):
        finite = bool(expected.isfinite().all()) and expected.std().item() > 1e-3
        print(json.dumps({"nbytes": expected.nbytes, "finite": finite, "results": found}), flush=True)
    vae = patcher = run = None
    _forget(vaes, parallel_vae)
    importlib.import_module("pack.parallel.host.running").stop_all()


def _forget(vaes: dict[str, Any], parallel_vae: Any) -> None:
    """As when ComfyUI drops a VAE: nothing here may keep it, or the workers would keep its weights."""
    vaes.clear()
    importlib.import_module("comfy.model_management").unload_all_models()
    gc.collect()
    assert not parallel_vae._patchers, "a VAE that nobody has is still alive"


def _run(node: str, vae: Any, inputs: dict[str, Any]) -> Any:
    """What a node of ComfyUI's own gives."""
    native = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[node]()
    return _tensor(getattr(native, native.FUNCTION)(vae=vae, **inputs))


def _tensor(result: tuple[Any, ...]) -> Any:
    return result[0]["samples"] if isinstance(result[0], dict) else result[0]


if __name__ == "__main__":
    path, root, table = sys.argv[1:4]
    _prepare(path)
    main(path, root, json.loads(table))
