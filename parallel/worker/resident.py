"""A model whose weights are on this worker's device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import registry
from ..adapters.base import Adapter, StepContext
from ..adapters.native import NativeTensors
from ..cache.blocks import BlockCache, block_cache
from ..checkpoints.quantised import FP8
from ..checkpoints.source import Stored, TensorInfo, open_source
from ..compilation.blocks import CompiledBlocks
from ..compilation.settings import CompileSettings
from ..degrees import Degrees
from ..errors import CheckpointError, UnsupportedError
from .ranks import SoloContext
from .scaled_linear import ScaledLinear

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes in total; may raise StepCancelled."""


class ResidentModel:
    """Weights of one recipe, loaded, and the conditioning that its prompts have sent.

    Args:
        recipe: `path`, `weight_dtype` (storage) and `compute_dtype`, see `host.recipe.Recipe`.
        device: where the weights go.
        progress: called after each tensor.

    Raises:
        CheckpointError: the file does not fit the family's model.
        UnsupportedError: the family is not supported.
    """

    def __init__(self, recipe: Mapping[str, Any], device: torch.device, progress: Progress):
        self._source = open_source(recipe["path"])
        self.adapter: Adapter = registry.adapter_for(self._source)
        self.config = self.adapter.model_config(self._source)
        self.device = device
        self.compute_dtype: torch.dtype = getattr(torch, recipe["compute_dtype"])
        self._storage: torch.dtype = getattr(torch, recipe["weight_dtype"])
        if (
            self._source.scales
        ):  # what is large is in fp8 already, and the rest of such a file was left out of it on purpose
            self._storage = self.compute_dtype
        model_class = self.adapter.model_class()
        with torch.device("meta"):  # no memory until a weight is read
            self.model = model_class(**self.config)
        if self._storage in FP8:
            _keep_fp8(self.model, self._storage, self.compute_dtype, self.adapter.read_directly)
        self._load(progress)
        self.model.eval().requires_grad_(False)
        self._tensors = NativeTensors(self._source, self.adapter, self.config)
        self._conditioning: dict[str, Tensor] = {}
        self._prepared: dict[tuple[Any, ...], Any] = {}
        self._caches: dict[int, BlockCache] = {}
        self._compilers: dict[CompileSettings, CompiledBlocks] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of weights on the device."""
        return sum(p.nbytes for p in self.model.parameters())

    def set_parameter(self, name: str, part: Tensor, scale: float | None) -> None:
        """Sets a parameter of the diffusers model to a copy of `part` × `scale`, in the dtype in which it is kept.

        With a scale `part` is fp8, and stays so if it is the weight of a linear layer.
        """
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if scale is not None:
            if leaf == "weight" and type(module) in (nn.Linear, ScaledLinear):
                ScaledLinear.keep(module, part.to(self.device, copy=True), scale)
                return
            part = part.float().mul_(scale)
        if name in self.adapter.full_precision:
            value = part.to(self.device, torch.float32, copy=True)
        else:
            # ComfyUI rounds weights to the storage dtype first; so do we, to get its results.
            value = part.to(self.device, self._storage, copy=True)
            if self.model.get_parameter(name).dtype not in FP8:
                value = value.to(self.compute_dtype)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def cache(self, sampling: int, rule: Mapping[str, Any]) -> BlockCache:
        """What the sampling of this number remembers, with the rule of its first step."""
        if sampling not in self._caches:
            self._caches[sampling] = block_cache(rule, self.device)
        return self._caches[sampling]

    def forget_cache(self, sampling: int | None = None) -> None:
        """Frees what a sampling remembers, or what all of them do."""
        if sampling is None:
            self._caches.clear()
        else:
            self._caches.pop(sampling, None)

    def compiled(self, settings: CompileSettings, sign_of_life: Callable[[], None]) -> CompiledBlocks:
        """The compiler of this model's blocks, kept as long as the model: MODELs that share it can want different ones.

        See `CompiledBlocks` for the arguments.
        """
        if settings not in self._compilers:
            self._compilers[settings] = CompiledBlocks(settings, sign_of_life)
        return self._compilers[settings]

    def put_weight(self, name: str, stored: Stored) -> None:
        """Replaces the checkpoint's tensor `name` (of `NativeTensors`) by a copy of another one of its shape."""
        for piece in self._tensors.pieces(name):
            self.set_parameter(piece.name, piece.take(stored.tensor), stored.scale)

    def restore_weights(self, names: Iterable[str]) -> None:
        """Undoes `put_weight`.

        Raises:
            CheckpointError: the file changed or is damaged.
        """
        with self._source.reader() as read:
            for name in names:
                self.put_weight(name, self._tensors.read(name, read))

    def put_conditioning(self, key: str, tensor: Tensor) -> None:
        """Keeps a copy on the device; floating-point tensors in the compute dtype."""
        dtype = self.compute_dtype if tensor.is_floating_point() else tensor.dtype
        self._conditioning[key] = tensor.to(self.device, dtype, copy=True)

    def drop_conditioning(self, keys: list[str]) -> None:
        for key in keys:
            self._conditioning.pop(key, None)
        if keys:
            self._prepared.clear()

    def step(
        self, x: Tensor, timestep: Tensor, keys: Mapping[str, str], rows: slice, out: Tensor, context: StepContext
    ) -> None:
        """Runs the network on this rank's part of some samples, see `Adapter.step`.

        Args:
            keys: input name → key of its conditioning.
            rows: the samples, of those in x, timestep, the conditioning and out.
        """
        wanted = (rows.start, rows.stop, *sorted(keys.items()))
        if wanted not in self._prepared:
            tensors = {name: self._conditioning[key] for name, key in keys.items()}
            mine = {name: t[rows] if len(t) == len(x) else t for name, t in tensors.items()}
            self._prepared[wanted] = self.adapter.prepare(mine)
        timestep = timestep[rows].to(self.device)
        self.adapter.step(self.model, x[rows], timestep, self._prepared[wanted], out[rows], context)

    def self_check(self, context: StepContext, solo: SoloContext, degrees: Degrees) -> None:
        """Runs a small uneven step on all ranks and again on this rank alone, and compares this rank's part.

        Raises:
            UnsupportedError: they differ, so the family's split is wrong with these library versions.
        """
        inputs = self.adapter.example(self.config, degrees.sp, self.compute_dtype)
        difference = self._difference(inputs, context, solo)
        allowed = self._allowed_difference
        if not difference <= allowed:
            raise UnsupportedError(
                f"{self.adapter.family} failed its self-check: split as {degrees}, the prediction differs"
                f" by {difference:.2g} (relative; allowed {allowed:g}) from one rank's. Please report this with your"
                f" versions of torch ({torch.__version__}) and diffusers."
            )

    def check_compiled(
        self, blocks: CompiledBlocks, compiled: StepContext, uncompiled: StepContext, degrees: Degrees
    ) -> None:
        """Runs a small step on all ranks with compiled blocks and again without; where this rank's part differs, this
        rank leaves its blocks uncompiled.

        The step has several tokens on each rank, so that its graphs fit the sizes of real ones: with dynamic sizes they
        are compiled here, and for good. It has one timestep per sample, as most have; one per frame is another graph.
        """
        compiled.compiler = blocks
        inputs = self.adapter.example(self.config, 4 * degrees.sp, self.compute_dtype)
        if inputs["timestep"].ndim > 1:
            inputs["timestep"] = inputs["timestep"][:, 0]
        difference = self._difference(inputs, compiled, uncompiled)
        if not blocks.failure and not difference <= self._allowed_difference:
            blocks.give_up(f"compiled, a small step differs by {difference:.2g} (relative) from one that is not")

    @property
    def _allowed_difference(self) -> float:
        """Relative, of two ways to compute a step."""
        return 1e-4 if self.compute_dtype == torch.float32 else 0.05

    def _difference(self, inputs: dict[str, Tensor], first: StepContext, second: StepContext) -> float:
        """Largest relative difference between two runs of one step, over what `first` writes on this rank."""
        x, timestep = inputs.pop("x"), inputs.pop("timestep").to(self.device)
        prepared = self.adapter.prepare({name: tensor.to(self.device) for name, tensor in inputs.items()})
        untouched = 2.0**20
        out = torch.full(self.adapter.output_shape(self.config, tuple(x.shape)), untouched, dtype=x.dtype)
        reference = out.clone()
        self.adapter.step(self.model, x, timestep, prepared, out, first)
        self.adapter.step(self.model, x, timestep, prepared, reference, second)
        mine = out != untouched
        if not mine.any():
            return 0.0
        largest = reference[reference != untouched].abs().max()
        return float((out - reference)[mine].abs().max() / largest)

    def _load(self, progress: Progress) -> None:
        """Fills the model's parameters from the file, one tensor at a time."""
        source = self._source
        expected = dict(self.model.named_parameters())
        missing = set(expected)
        total = sum(_nbytes(info) for info in source.tensors.values())
        done = 0
        with source.reader() as read:
            for name, info in source.tensors.items():
                if source.is_diffusers and _is_superfluous(self.model, name):
                    continue
                pieces = self.adapter.pieces(name, info.shape, self.config) if not source.is_diffusers else None
                tensor, scale = read.stored(name)
                for target, part in [(name, tensor)] if pieces is None else [(p.name, p.take(tensor)) for p in pieces]:
                    if target not in expected:
                        raise CheckpointError(f"{source.path}: tensor {name!r} has no place in {self.adapter.family}")
                    if part.shape != expected[target].shape:
                        raise CheckpointError(
                            f"{source.path}: tensor {name!r} gives {target} the shape {list(part.shape)},"
                            f" but {self.adapter.family} needs {list(expected[target].shape)}"
                        )
                    self.set_parameter(target, part, scale)
                    missing.discard(target)
                read.release(tensor)
                done += _nbytes(info)
                progress(done, total)
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise CheckpointError(f"{source.path} lacks {len(missing)} tensors of {self.adapter.family}, e.g. {some}")


def _is_superfluous(model: Any, name: str) -> bool:
    """Whether diffusers itself ignores this tensor of its folders: an old release wrote it, no model needs it."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _keep_fp8(model: nn.Module, storage: torch.dtype, compute: torch.dtype, but: tuple[str, ...]) -> None:
    """Keeps the large weights in fp8, but for those of modules named so, and casts each for the time of its use.

    Called before there are any: no weight is ever held in more bits than it keeps.
    """
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, storage, compute, skip_modules_pattern=but)


def _nbytes(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count * info.dtype.itemsize
