"""Front door of the engine: `python -m parallel demo|doctor|bench|families|plan|contract`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

from .doctor import examine, load_torch
from .errors import ConfigError, EngineError
from .host import group_log
from .versions import OLDEST_PYTHON, require


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m parallel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    common.add_argument("--devices", default="auto", help="as in SP Config, e.g. cuda:0,cuda:1 or cpu,cpu")
    common.add_argument("--verbose", action="store_true", help="show what the workers print")

    demo = commands.add_parser("demo", parents=[common], help="sample a tiny random HunyuanVideo, split and alone")
    demo.add_argument("--steps", type=int, default=6, help="denoising steps (default 6)")
    demo.add_argument("--output", default="output/demo.webp", help="animated file to write")
    commands.add_parser("families", parents=[common], help="list the models, and what works with each")
    doctor = commands.add_parser("doctor", parents=[common], help="check this machine and start the workers once")
    doctor.add_argument("--report", action="store_true", help="print a report to paste into an issue instead")

    bench = commands.add_parser("bench", parents=[common], help="time the exchange, a tiny model's step, or the start")
    bench.add_argument("what", choices=("attention", "step", "start"))
    for name, default, text in (
        ("tokens", 8192, "tokens of the latent"),
        ("text", 64, "tokens of the text"),
        ("heads", 2, "attention heads"),
        ("batch", 1, "samples"),
        ("pipeline", 1, "chunks of heads that overlap exchange and kernel (attention only)"),
        ("rounds", 0, "timed rounds; 0 is 15, or 3 of start"),
        ("ulysses-degree", 0, "0 chooses"),
        ("ring-degree", 0, "0 chooses"),
        ("share-of", 0, "measure one rank of a world of this size on one device, without peers (attention only)"),
        ("rank", 0, "which rank, with --share-of"),
    ):
        bench.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    bench.add_argument("--slow", default="", help="how many times slower each rank is made, e.g. 1,2 (default: not)")
    bench.add_argument("--layers", default="8+8", help="dual- and single-stream blocks (step only, default 8+8)")
    bench.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))

    plan = commands.add_parser("plan", parents=[common], help="draft a split plan of a class of ComfyUI's")
    plan.add_argument("network", help="a network's class in ComfyUI, e.g. Flux, or a safetensors file")
    plan.add_argument("--config", default="", help="arguments of its constructor: JSON, or a file of it")
    several: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=JSON"}
    plan.add_argument("--input", **several, help="of its forward; [1,16,10,14] is a tensor's shape")
    plan.add_argument("--larger", **several, help="what an input is with a larger latent")

    contract = commands.add_parser("contract", parents=[common], help="what a ComfyUI lacks that the pack relies on")
    contract.add_argument("paths", nargs="+", metavar="PATH", help="ComfyUI's folder, or files of it; none is run")

    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        require("Python", platform.python_version(), OLDEST_PYTHON)
        result, text, status = _run(options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"ok": False, "error": str(error)}))
        return 1
    print(text)
    if options.json:
        print(json.dumps(result))
    return status


def _run(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    if options.command == "doctor":
        return _doctor(options)
    if options.command == "contract":
        from .comfyui.contract_command import hold

        return hold(options.paths)
    load_torch()
    if options.command in ("demo", "bench"):
        group_log.keep_in(_state_folder())
    if options.command in ("demo", "bench") and options.devices == "auto":
        import torch

        options.devices = "auto" if torch.cuda.is_available() else "cpu,cpu"  # one CPU worker would split nothing
    if options.command == "demo":
        from .demo.run import run_demo

        return (*run_demo(devices=options.devices, steps=options.steps, output=options.output), 0)
    if options.command == "bench":
        return (*_bench(options), 0)
    if options.command == "families":
        from .families import as_markdown, families

        return {"families": families()}, as_markdown().rstrip(), 0
    from .drafts import draft

    return (*draft(options.network, options.config, options.input, options.larger), 0)


def _doctor(options: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    own, comfyuis = _state_folder(), _comfyuis_folder()
    group_log.keep_in(own)
    result, text = examine(options.devices)
    if options.report:
        from .report import compose

        folders = [folder for folder in (own, comfyuis) if folder is not None]
        config = {"devices": options.devices}
        text = compose(front={}, config=config, title="Checks", state=result, log_folders=folders)
        result["report"] = text
    return result, text, 0 if result["ok"] else 1


def _state_folder() -> Path | None:
    """Returns the folder of the logs without ComfyUI (https://specifications.freedesktop.org/basedir-spec), or None for
    users without a home."""
    stated = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        return (stated if stated.is_absolute() else Path.home() / ".local" / "state") / "sequence-parallel"
    except RuntimeError:
        return None


def _comfyuis_folder() -> Path | None:
    """Returns the usual log folder of the ComfyUI whose custom_nodes hold this pack, or None if there is none."""
    for comfyui in Path(__file__).parents[3:4]:
        if (comfyui / "folder_paths.py").exists():
            return comfyui / "user" / "__sequence_parallel"
    return None


def _bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch

    if options.what == "start":
        from .bench.start import bench_start

        return bench_start(options.devices, options.rounds or 3)
    from .bench.run import Workload, bench_attention, bench_step

    try:
        dual, single = (int(part) for part in options.layers.split("+"))
    except ValueError:
        raise ConfigError(f"layers is {options.layers!r}; give dual+single, e.g. 8+8") from None
    try:
        slow = tuple(int(part) for part in options.slow.split(",") if part)
    except ValueError:
        raise ConfigError(f"slow is {options.slow!r}; give a whole number for each rank, e.g. 1,2") from None
    names = ("devices", "tokens", "text", "heads", "batch", "pipeline", "ulysses_degree", "ring_degree")
    workload = Workload(
        **{name: getattr(options, name) for name in names},
        rounds=options.rounds or 15,
        layers=(dual, single),
        slow=slow,
        dtype=getattr(torch, options.dtype),
    )
    if options.what == "step":
        return bench_step(workload)
    if options.share_of:
        from .bench.share import bench_share

        return bench_share(workload, options.share_of, options.rank)
    return bench_attention(workload)


if __name__ == "__main__":
    sys.exit(main())
