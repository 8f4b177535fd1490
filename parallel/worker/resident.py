"""A model whose weights are on this worker's device."""

from __future__ import annotations

import logging
import re
import time
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
from ..quantise.selection import Selection, select
from ..quantise.settings import DYNAMIC
from . import comparison
from .fp8_linear import E4M3, FP8Linear, become_fp8, is_rowwise, quantised
from .homes import Home, MakeHome, Replicated, own
from .libraries import model_class
from .ranks import SoloContext
from .scaled_linear import CastLinear, ScaledLinear

log = logging.getLogger("sequence_parallel.worker")

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes in total; may raise StepCancelled."""


AddUp = Callable[[Tensor], Tensor]
"""Sum of a tensor over the ranks that share a sequence. Collective."""
_UNTOUCHED = 2.0**20
"""Where a rank has written nothing."""


class ResidentModel:
    """Weights of one recipe, loaded, and the conditioning that its prompts have sent.

    Args:
        recipe: `path`, `weight_dtype` (storage) and `compute_dtype`, see `host.recipe.Recipe`.
        device: where the weights go.
        progress: called after each tensor.
        home: where they go there.
        fp8: `scheme` and `skip` of `quantise.settings.FP8Choice`, if linear layers are to be quantised.

    Attributes:
        libraries_s: seconds that importing the family's class took.

    Raises:
        CheckpointError: the file does not fit the family's model.
        UnsupportedError: the family is not supported, or its class cannot be imported.
        ConfigError: `skip` has a pattern that means no layer.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        device: torch.device,
        progress: Progress,
        home: MakeHome = Replicated,
        fp8: Mapping[str, Any] | None = None,
    ):
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
        self._tensors = NativeTensors(self._source, self.adapter, self.config)
        self.scheme: str | None = None if fp8 is None else fp8["scheme"]
        self._selection = Selection({}, 0, 0, 0, 0) if fp8 is None else self._select(fp8)
        began = time.perf_counter()
        module = model_class(self.adapter)
        self.libraries_s = time.perf_counter() - began
        with torch.device("meta"):  # no memory until a weight is read
            self.model = module(**self.config)
        self.model.eval().requires_grad_(False)
        self._keep_dtypes()
        self.home: Home = home(self.model, device)
        try:
            self._load(progress)
        except BaseException:
            self.home.close()
            raise
        self._conditioning: dict[str, Tensor] = {}
        self._prepared: dict[tuple[Any, ...], Any] = {}
        self._caches: dict[int, BlockCache] = {}
        self._compilers: dict[CompileSettings, CompiledBlocks] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of weights on the device, between steps."""
        return self.home.nbytes

    @property
    def fp8_report(self) -> dict[str, int] | None:
        """What has been quantised: the counts of `quantise.settings.FP8Report`, and what a copy saves in bytes."""
        return None if self.scheme is None else self._selection.counts

    def set_parameter(self, name: str, part: Tensor, scale: float | None) -> None:
        """Sets this rank's share of a parameter of the diffusers model to a copy of `part` × `scale`.

        It is rounded to the dtype in which it is kept. With a scale `part` is fp8, and stays so if it is the weight of
        a linear layer. What is to be quantised is quantised here, whether it comes from the file or from a LoRA.
        """
        if name in self._selection.weights:
            self._set_quantised(name, part, scale)
            return
        mine, rows = self.home.share(name)
        part = part[rows]
        module = self.model.get_submodule(name.rpartition(".")[0])
        if scale is not None:
            if mine.dtype in FP8 and isinstance(module, ScaledLinear):
                module.scale = scale
                mine.copy_(part)
                return
            part = part.float().mul_(scale)
        if name not in self.adapter.full_precision:
            part = part.to(self._storage)  # ComfyUI rounds weights to this first; so do we, to get its results
        mine.copy_(part)

    def _set_quantised(self, name: str, part: Tensor, scale: float | None) -> None:
        """This rank's share of a weight that is quantised, and of its scales."""
        assert self.scheme is not None
        weight, rows = self.home.share(name)
        scales, scale_rows = self.home.share(_scale_of(name))
        if is_rowwise(self.scheme):
            part, rows, scale_rows = part[rows], slice(None), slice(None)
        if scale is None:
            part, scale = part.to(self._storage), 1.0 if self._storage in FP8 else None
        values, found = quantised(self.scheme, part.to(self.device), scale)
        weight.copy_(values[rows])
        scales.copy_(found[scale_rows])

    def close(self) -> None:
        """Before it goes."""
        self.home.close()

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
        with self.home.in_use(context.traffic):
            self.adapter.step(self.model, x[rows], timestep, self._prepared[wanted], out[rows], context)

    def self_check(self, context: StepContext, solo: SoloContext, degrees: Degrees, add_up: AddUp) -> None:
        """Runs a small uneven step on all ranks and again on this rank alone, and compares.

        Args:
            add_up: sums over the ranks that share the sequence, so that they all come to the same verdict.

        Raises:
            UnsupportedError: they differ, so the family's split is wrong with these library versions; on all ranks of
                the sequence alike.
        """
        inputs = self.adapter.example(self.config, degrees.sp, self.compute_dtype)
        split, alone = self._run(inputs, context), self._run(inputs, solo)
        mine = split != _UNTOUCHED
        sums = [comparison.products(split[mine], alone[mine])]
        exact = self.compute_dtype == torch.float32
        # Tensor-wise scales are those of each rank's tokens (0.03 from that), and 8-bit attention's of each chunk.
        coarse = self.scheme in DYNAMIC or solo.kernel.name == "sage"
        if not exact and not coarse:
            again = self._run(inputs | {"x": comparison.moved(inputs["x"], self.compute_dtype)}, solo)
            sums.append(comparison.products(again[mine], alone[mine]))
        difference, *noise = [comparison.difference(each) for each in add_up(torch.stack(sums))]
        if coarse:
            allowed = comparison.Allowed(comparison.CAP, comparison.CAP)
        elif exact:
            allowed = comparison.Allowed(comparison.EXACT, comparison.EXACT)
        else:
            allowed = comparison.Allowed.of_noise(noise[0].norm, self.compute_dtype)
        log.info("self-check of %s, split as %s: %s; %s", self.adapter.family, degrees, difference, allowed)
        if not difference.within(allowed):
            raise UnsupportedError(
                f"{self.adapter.family} failed its self-check: split as {degrees}, the prediction differs"
                f" by {difference} (relative; allowed {allowed.norm:.2g} and {allowed.slope:.2g}) from one rank's."
                f" Please report this with your versions of torch ({torch.__version__}) and diffusers."
            )

    def _select(self, fp8: Mapping[str, Any]) -> Selection:
        return select(
            self._source,
            self.adapter,
            self._tensors,
            scheme=fp8["scheme"],
            skip=fp8["skip"],
            storage=self._storage,
            compute=self.compute_dtype,
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
        result, reference = self._run(inputs, compiled), self._run(inputs, uncompiled)
        mine = result != _UNTOUCHED
        difference = comparison.difference(comparison.products(result[mine], reference[mine]))
        exact = self.compute_dtype == torch.float32 and self.scheme not in DYNAMIC
        if not blocks.failure and not difference.norm <= (comparison.EXACT if exact else comparison.CAP):
            blocks.give_up(f"compiled, a small step differs by {difference.norm:.2g} (relative) from one that is not")

    def _run(self, inputs: Mapping[str, Tensor], context: StepContext) -> Tensor:
        """One step; what this rank does not write stays `_UNTOUCHED`."""
        conditioning = dict(inputs)
        x, timestep = conditioning.pop("x"), conditioning.pop("timestep").to(self.device)
        prepared = self.adapter.prepare({name: tensor.to(self.device) for name, tensor in conditioning.items()})
        out = torch.full(self.adapter.output_shape(self.config, tuple(x.shape)), _UNTOUCHED, dtype=x.dtype)
        with self.home.in_use():
            self.adapter.step(self.model, x, timestep, prepared, out, context)
        return out

    def _keep_dtypes(self) -> None:
        """Gives each parameter, still without data, the dtype in which it is kept.

        fp8 storage keeps linear layers so; what else there is keeps the rounded values in the compute dtype, and so
        does what the family reads without calling the layer. Of a scaled-fp8 file the scaled layers stay in fp8.
        """
        scaled: dict[str, torch.dtype] = {}
        for name in self._source.scales:
            info = self._source.tensors[name]
            scaled |= {piece.name: info.dtype for piece in self.adapter.pieces(name, info.shape, self.config)}
        for path, module in self.model.named_modules():
            if type(module) is nn.Linear:
                if self.scheme is not None and f"{path}.weight" in self._selection.weights:
                    become_fp8(module, self.scheme)
                    scaled |= {f"{path}.weight": E4M3, f"{path}.scale": torch.float32}
                elif f"{path}.weight" in scaled:
                    module.__class__ = ScaledLinear
                elif self._storage in FP8 and not any(re.search(p, path) for p in self.adapter.read_directly):
                    module.__class__ = CastLinear
            for name, parameter in list(module.named_parameters(path, recurse=False)):
                dtype = self._storage if isinstance(module, CastLinear) else self.compute_dtype
                if isinstance(module, ScaledLinear | FP8Linear):
                    dtype = scaled.get(name, dtype)
                if name in self.adapter.full_precision:
                    dtype = torch.float32
                own(self.model, name, torch.empty_like(parameter, dtype=dtype))

    def _load(self, progress: Progress) -> None:
        """Fills the model's parameters from the file, one tensor at a time."""
        source = self._source
        made = {_scale_of(name) for name in self._selection.weights}
        expected = {name: p for name, p in self.model.named_parameters() if name not in made}
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


def _scale_of(weight: str) -> str:
    """Name of the parameter that scales a quantised weight."""
    return f"{weight.removesuffix('weight')}scale"


def _is_superfluous(model: Any, name: str) -> bool:
    """Whether diffusers itself ignores this tensor of its folders: an old release wrote it, no model needs it."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _nbytes(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count * info.dtype.itemsize
