"""Runs ComfyUI's own tiled VAE functions with every tile computed by the workers.

The functions run twice: first with a network that only records its inputs and returns tensors without data, which
yields the tiles in their order; then with a network that returns the workers' results for these tiles. So tiles, masks
and the order of sums are ComfyUI's by construction, for any VAE and any version.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import comfy.cli_args
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..parallel.comfyui import contract
from ..parallel.config import SequenceParallelConfig, resolve
from ..parallel.errors import ConfigError, UnsupportedError, WorkerOutOfMemoryError
from ..parallel.host import running
from ..parallel.host.remote_vae import RemoteVAE
from ..parallel.host.retry import Retry
from ..parallel.host.tiles import Tile
from ..parallel.vae.arguments import as_plain
from ..parallel.vae.devices import unequal
from ..parallel.vae.fingerprint import fingerprint
from .node_text import executing_node, tell, tell_fallback
from .residency import WorkersPatcher, progress_bar
from .settings import default_config


def run_tiled(node: str, vae: Any, config: SequenceParallelConfig | None, **inputs: Any) -> tuple[Any, ...]:
    """Runs ComfyUI's tiled node; the workers compute its tiles if that gives the same result.

    Args:
        node: `VAEDecodeTiled` or `VAEEncodeTiled`.
        vae: ComfyUI's VAE.
        config: the devices; None takes those of the workers that run already, else the setting Default devices.
        inputs: the node's other inputs.

    Raises:
        ConfigError: the configuration does not fit this machine.
        WorkerError: a worker failed.
    """
    native = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[node]()  # ComfyUI's, not this pack's
    function: Callable[..., tuple[Any, ...]] = getattr(native, native.FUNCTION)
    return function(vae=in_workers(vae, config), **inputs)


def in_workers(vae: Any, config: SequenceParallelConfig | None, **tiling: int) -> Any:
    """Returns a VAE that shares the weights of `vae` and whose tiles are computed by the workers.

    Args:
        vae: ComfyUI's VAE. A VAE of another class, or an audio VAE, is returned unchanged.
        config: see `run_tiled`.
        tiling: the tiled nodes' widgets, for `encode` and `decode`; without them these run natively.
    """
    contract.require("vae")
    reason = None
    if type(vae) not in (comfy.sd.VAE, VAEInWorkers):
        reason = f"this VAE is a {type(vae).__name__}, not ComfyUI's own"
    elif vae.latent_dim not in (2, 3) or vae.extra_1d_channel is not None:
        reason = "it is an audio VAE"
    if reason is not None:
        _tell_native(reason)
        return vae
    return VAEInWorkers(vae, config, tiling)


class VAEInWorkers(comfy.sd.VAE):
    """ComfyUI's VAE, whose tiles are computed by the workers; for any node that takes a VAE."""

    def __init__(self, vae: comfy.sd.VAE, config: SequenceParallelConfig | None, tiling: dict[str, int]):
        self.__dict__.update(vars(vae))
        self._config = config
        self._tiling = tiling

    def decode_tiled(self, samples: Tensor, *args: Any, **settings: Any) -> Tensor:
        return self._run("decode", lambda vae: comfy.sd.VAE.decode_tiled(vae, samples, *args, **settings))

    def encode_tiled(self, pixel_samples: Tensor, *args: Any, **settings: Any) -> Tensor:
        return self._run("encode", lambda vae: comfy.sd.VAE.encode_tiled(vae, pixel_samples, *args, **settings))

    def decode(self, samples_in: Tensor, *args: Any, **options: Any) -> Tensor:
        """Decodes like VAE Decode (Tiled) with `tiling`; a single tile, or with network options, like VAE Decode.

        Args:
            samples_in: (batch, channels, [frames,] height, width).
        """
        latent = samples_in[:, :, 0] if self.latent_dim == 2 and samples_in.ndim == 5 else samples_in
        if not self._tiling or args or options or self._is_one_tile(latent.shape[2:], self.upscale_ratio):
            decoded: Tensor = super().decode(samples_in, *args, **options)
            return decoded
        node = importlib.import_module("nodes").VAEDecodeTiled()
        (images,) = node.decode(vae=self, samples={"samples": latent}, **self._tiling)
        # The node concatenates the videos of a batch.
        return images.unflatten(0, (len(latent), -1)) if self.latent_dim == 3 else images

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Encodes like VAE Encode (Tiled) with `tiling`; a single tile like VAE Encode.

        Args:
            pixel_samples: ([batch,] frames or batch, height, width, channels).
        """
        size = pixel_samples.shape[-4:-1] if self.latent_dim == 3 and not self.not_video else pixel_samples.shape[-3:-1]
        if not self._tiling or self._is_one_tile(size, 1):
            encoded: Tensor = super().encode(pixel_samples)
            return encoded
        node = importlib.import_module("nodes").VAEEncodeTiled()
        latent: Tensor = node.encode(vae=self, pixels=pixel_samples, **self._tiling)[0]["samples"]
        return latent

    def _is_one_tile(self, size: Sequence[int], ratios: Any) -> bool:
        """Returns True if one tile covers ([frames,] height, width) `size`; `ratios` convert `size` to pixels."""
        ratios = ratios if isinstance(ratios, tuple | list) else [ratios] * len(size)
        pixels = [ratio(n) if callable(ratio) else n * ratio for n, ratio in zip(size, ratios, strict=True)]
        tile = [self._tiling["temporal_size"], self._tiling["tile_size"], self._tiling["tile_size"]]
        return all(n <= limit for n, limit in zip(pixels, tile[-len(pixels) :], strict=True))

    def _run(self, direction: str, function: Callable[[comfy.sd.VAE], Tensor]) -> Tensor:
        """Runs `function` of a VAE in the workers if that gives the same result, else natively; reports which."""
        began = time.perf_counter()
        try:
            config = _used_config(self._config)
            patcher = _patcher(self, config)
            if direction == "decode" and _adds_noise(self.first_stage_model):
                raise UnsupportedError("this VAE adds random noise to what it decodes; workers would draw other noise")
            retry = Retry(config)
            share_out = partial(_shared_out, function, self, patcher, direction)  # loads the VAE if necessary
            result, tiles = retry.run(share_out, lambda: None, f"the VAE's {direction}")
        except UnsupportedError as error:
            reason = str(error)
        else:
            devices = resolve(patcher.config).describe()
            group = patcher.remote.group
            remark = unequal(group.titles) if group is not None else ""
            took = time.perf_counter() - began
            tell(executing_node(), f"{tiles} tile{'s' * (tiles != 1)} on {devices} in {took:.1f} s{remark}")
            return result
        _tell_native(reason)  # outside `except`, where the exception no longer keeps objects alive
        return function(self)


def _tell_native(reason: str) -> None:
    tell_fallback(executing_node(), f"Computed natively, on one device: {reason}")


def _used_config(config: SequenceParallelConfig | None) -> SequenceParallelConfig:
    """Returns the configuration to use: `config`, or that of the running workers, or the default one.

    Raises:
        UnsupportedError: there is only one device, or the default configuration does not fit this machine.
        ConfigError: `config` does not fit this machine, or a setting has a value that is not allowed.
    """
    if config is None:
        groups = running.running()
        if groups:
            running_on = groups[-1].layout
            config = SequenceParallelConfig(devices=running_on.describe(), attention=running_on.attention)
        else:
            config = default_config()
            try:
                resolve(config)
            except ConfigError as error:
                raise UnsupportedError(str(error)) from error
    layout = resolve(config)
    if layout.world_size == 1:
        raise UnsupportedError(f"there is only one device, {layout.describe()}")
    return config


# --- the VAE in the workers -------------------------------------------------------------------------------------------


class ParallelVAE(nn.Module):
    """Stand-in for a VAE in the workers, for ComfyUI's memory management; ComfyUI's log shows the class name."""

    def __init__(self, remote: RemoteVAE):
        super().__init__()
        self.remote = remote


class VAEPatcher(WorkersPatcher):
    """Residency of a VAE's weights in the workers: ComfyUI unloads them on /free or when memory is short."""

    def __init__(self, remote: RemoteVAE, config: SequenceParallelConfig, size: int):
        layout = resolve(config)
        device = torch.device(layout.devices[0].name)
        super().__init__(ParallelVAE(remote), device, torch.device("cpu"), size)
        self.config = config

    @property
    def remote(self) -> RemoteVAE:
        remote: RemoteVAE = self.model.remote
        return remote

    @property
    def held(self) -> RemoteVAE:
        return self.remote

    def _load(self) -> None:
        self.remote.ensure_loaded(comfy.model_management.throw_exception_if_processing_interrupted)


_patchers: WeakKeyDictionary[nn.Module, VAEPatcher] = WeakKeyDictionary()


def _patcher(vae: Any, config: SequenceParallelConfig) -> VAEPatcher:
    """Returns the patcher of the VAE in the workers; later prompts reuse it.

    Raises:
        UnsupportedError: workers cannot compute this VAE's result.
    """
    device_type = resolve(config).device_type
    if vae.first_stage_model is None:
        raise UnsupportedError("the VAE is empty")
    if getattr(vae, "handles_tiling", False):  # ComfyUI 0.28 and later; none did before
        raise UnsupportedError(f"{type(vae.first_stage_model).__name__} tiles by itself")
    if vae.patcher.patches or vae.patcher.object_patches:
        raise UnsupportedError("the VAE has patches")
    if vae.device.type != device_type:
        raise UnsupportedError(f"ComfyUI runs this VAE on {vae.device}, the workers are on {device_type}")
    network = vae.first_stage_model
    if (patcher := _patchers.get(network)) is not None:
        if resolve(patcher.config).same_workers(resolve(config)):
            return patcher
        patcher.remote.release()  # its devices are no longer requested
    weak = ref(network)
    source = {
        "comfyui": str(Path(comfy.sd.__file__).parent.parent),
        "arguments": as_plain(vars(comfy.cli_args.args)),
        "dtype": str(vae.vae_dtype).removeprefix("torch."),
        "fingerprint": fingerprint(network),
        "metadata": _metadata(network),
    }

    def state() -> dict[str, Tensor]:
        alive = weak()
        assert alive is not None, "its finalizer has ended this VAE"
        return alive.state_dict()

    remote = RemoteVAE(config, source, state)
    patcher = _patchers[network] = VAEPatcher(remote, config, comfy.model_management.module_size(network))
    finalize(network, remote.release).atexit = False
    return patcher


def _metadata(network: nn.Module) -> dict[str, str]:
    """Returns the file's metadata from which, besides the tensors, ComfyUI makes the network: LTX-2's settings."""
    settings = getattr(network, "config", None)
    return {"config": json.dumps({"vae": settings})} if isinstance(settings, dict) else {}


def _adds_noise(network: nn.Module) -> bool:
    """Returns True if tiles depend on the order in which they are decoded.

    With these settings, LTX-Video's decoders since 0.9.1 draw random numbers for each tile.
    """
    names = ("timestep_conditioning", "inject_noise")
    return any(getattr(module, name, False) for module in network.modules() for name in names)


# --- two runs ---------------------------------------------------------------------------------------------------------


def _shared_out(function: Callable[[Any], Tensor], vae: Any, patcher: VAEPatcher, direction: str) -> tuple[Tensor, int]:
    """Computes the tiles in the workers; returns the result and the number of tiles."""
    poll = comfy.model_management.throw_exception_if_processing_interrupted
    tiles = [_tile(vae, direction, part) for part in _parts(function, vae, patcher, direction)]
    run = patcher.remote.start(direction, tiles, vae.vae_dtype, poll=poll, on_progress=progress_bar())
    group = patcher.remote.group
    assert group is not None
    try:
        with group.tasks(poll):
            return function(_stand_in(vae, patcher, _Collector(run.take))), len(tiles)
    except WorkerOutOfMemoryError as error:
        raise comfy.model_management.OOM_EXCEPTION(str(error)) from error
    finally:
        run.close()


def _parts(function: Callable[[Any], Tensor], vae: Any, patcher: VAEPatcher, direction: str) -> list[Tensor]:
    """Returns the input of each network call before ComfyUI scales or casts it: views of the function's input."""
    recorder = _Recorder(lambda shape: _out_shape(vae, direction, shape))
    shadow = _stand_in(vae, patcher, recorder)
    shadow.output_device = torch.device("meta")
    shadow.device = torch.device("cpu")
    shadow.process_input = recorder.before_scaling
    with _no_progress():
        function(shadow)
    return recorder.parts


def _stand_in(vae: Any, patcher: VAEPatcher, network: Any) -> Any:
    """Copies the VAE with another network: nothing is cast or moved for it, and memory is requested in the workers."""
    shadow = copy.copy(vae)
    shadow.first_stage_model = network
    shadow.patcher = patcher
    shadow.device = torch.device("meta")
    shadow.vae_dtype = torch.float32
    shadow.process_input = lambda pixels: pixels
    shadow.memory_used_decode = lambda shape, _: vae.memory_used_decode(shape, vae.vae_dtype)
    shadow.memory_used_encode = lambda shape, _: vae.memory_used_encode(shape, vae.vae_dtype)
    return shadow


class _Recorder:
    def __init__(self, out_shape: Callable[[Sequence[int]], list[int]]):
        self.parts: list[Tensor] = []
        self._out_shape = out_shape

    def before_scaling(self, pixels: Tensor) -> Tensor:
        self.parts.append(pixels)
        return pixels

    def decode(self, latent: Tensor) -> Tensor:
        self.parts.append(latent)
        return self._result(latent)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._result(pixels)  # recorded by `before_scaling`

    def _result(self, x: Tensor) -> Tensor:
        return torch.empty(self._out_shape(x.shape), device="meta")


class _Collector:
    def __init__(self, take: Callable[[], Tensor]):
        self._take = take

    def decode(self, _: Tensor) -> Tensor:
        return self._take()

    def encode(self, _: Tensor) -> Tensor:
        return self._take()


def _tile(vae: Any, direction: str, part: Tensor) -> Tile:
    def make() -> Tensor:
        x = vae.process_input(part) if direction == "encode" else part
        tensor: Tensor = x.to(vae.vae_dtype)
        return tensor

    # Twice as much as ComfyUI expects: memory is only allocated for what is written.
    return Tile(tuple(part.shape), 2 * math.prod(_out_shape(vae, direction, part.shape)), make)


def _out_shape(vae: Any, direction: str, shape: Sequence[int]) -> list[int]:
    """Estimates the network's output shape; enough for `tiled_scale_multidim`, which does not rely on it either."""
    decode = direction == "decode"
    ratios = vae.upscale_ratio if decode else vae.downscale_ratio
    ratios = ratios if isinstance(ratios, tuple | list) else [ratios] * (len(shape) - 2)
    sizes = [
        ratio(size) if callable(ratio) else size * ratio if decode else size / ratio
        for size, ratio in zip(shape[2:], ratios, strict=True)
    ]
    return [shape[0], vae.output_channels if decode else vae.latent_channels, *(math.ceil(size) for size in sizes)]


@contextmanager
def _no_progress() -> Any:
    """Hides ComfyUI's progress bars in the first run: they would be full before any tile is computed."""
    hook = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(None)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)
