"""The parallel VAE Decode beside ComfyUI's VAE Decode (Tiled), in turn, in one process of ComfyUI's.

    cd <ComfyUI> && python <pack>/tests/benchmarks/comfyui_vae.py [--cpu] [--devices cpu,cpu] [--rounds 7]

Random weights: a VAE's time does not depend on them. One thread in every process; prints JSON.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).absolute().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true", help="ComfyUI on the CPU")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--kind", default="wan_2_1")
    parser.add_argument("--latent", default="1,16,2,32,32", help="shape; its defaults make 16 equal tiles")
    parser.add_argument("--tile-size", type=int, default=64)
    parser.add_argument("--overlap", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    sys.argv = [sys.argv[0], *(["--cpu"] if args.cpu else [])]
    sys.path[0] = str(Path.cwd())
    importlib.import_module("comfy.options").enable_args_parsing()
    import torch

    torch.set_num_threads(1)
    networks = _import("vae_networks", REPOSITORY / "tests/comfyui/test_pack/vae_networks.py")
    _import("pack", REPOSITORY / "__init__.py", [str(REPOSITORY)])
    parallel_vae = importlib.import_module("pack.nodes.parallel_vae")
    parallel_vae.tell = lambda *_: None
    config = importlib.import_module("pack.parallel.config").SequenceParallelConfig(devices=args.devices)
    native = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["VAEDecodeTiled"]()
    rounds = importlib.import_module("pack.parallel.measure").QuietRounds

    vae = networks.make_vae(args.kind)
    latent = torch.randn([int(n) for n in args.latent.split(",")], generator=torch.Generator().manual_seed(1))
    inputs = {"samples": {"samples": latent}, "tile_size": args.tile_size, "overlap": args.overlap}
    inputs |= {"temporal_size": 4096, "temporal_overlap": 4}

    def run_native() -> Any:
        return _measured(lambda: native.decode(vae=vae, **inputs)[0])

    def run_parallel() -> Any:
        return _measured(lambda: parallel_vae.run_tiled("VAEDecodeTiled", vae, config, **inputs)[0])

    with torch.inference_mode():
        expected, equal = run_native()[0], torch.equal(run_parallel()[0], run_native()[0])
        remote = parallel_vae._patchers[vae.first_stage_model].remote
        pids = [*remote.group.pids, int(Path("/proc/self").resolve().name)]
        quiet = rounds(pids)
        measured = [[result[1:] for result, _ in quiet.run([run_native, run_parallel])] for _ in range(args.rounds)]
    (alone, alone_peak), (together, together_peak) = (
        [median(values) for values in zip(*runs, strict=True)] for runs in zip(*measured, strict=True)
    )
    run = remote.last_run
    print(
        json.dumps(
            {
                "kind": args.kind,
                "devices": args.devices,
                "tiles": run.tiles,
                "native_s": round(alone, 3),
                "parallel_s": round(together, 3),
                "speedup": round(alone / together, 3),
                "equal": equal,
                "bytes_of_the_video": expected.nbytes,
                "bytes_to_workers": run.bytes_sent,
                "bytes_back": run.bytes_back,
                "host_peak_mib": {"native": round(alone_peak), "parallel": round(together_peak)},
                "rank_mib": [round(n / 2**20) for n in run.rank_bytes],
            }
        )
    )
    importlib.import_module("pack.parallel.host.running").stop_all()


def _measured(run: Any) -> tuple[Any, float, float]:
    """Result, seconds, and the most memory that this process had meanwhile, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return result, seconds, peak


def _import(name: str, path: Path, folders: list[str] | None = None) -> Any:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
