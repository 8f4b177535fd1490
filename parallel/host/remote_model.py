"""A model in the workers that runs on a diffusers module under an adapter, as the host calls it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ..cache.settings import CacheSettings
from ..compilation.settings import CompileSettings
from ..degrees import Degrees
from ..plan import SequencePlan
from .cached_sampling import CachedSampling
from .group import WorkerGroup
from .recipe import Inspected, Recipe
from .remote_transformer import RemoteTransformer
from .remote_weights import RemoteWeights
from .step_request import StepRequest


class RemoteModel(RemoteWeights, RemoteTransformer):
    """See `RemoteWeights` for its arguments and its weights, and `RemoteTransformer` for its calls."""

    def __init__(self, recipe: Recipe, inspected: Inspected | None = None, group: WorkerGroup | None = None):
        RemoteWeights.__init__(self, recipe, inspected, group)
        RemoteTransformer.__init__(self, self.name)

    def _forgotten(self) -> None:
        super()._forgotten()
        self._conditioning.clear()

    @property
    def heads(self) -> int:
        return int(self.inspected.model_config["num_attention_heads"])

    def check_request(self, request: StepRequest, degrees: Degrees) -> None:
        inputs = {"x": request.x, "timestep": request.timestep, **request.conditioning}
        tokens = self.inspected.adapter.check_inputs(self.inspected.model_config, inputs)
        SequencePlan((tokens,), 1, (1.0,) * degrees.sp)

    def output_shape(self, request: StepRequest) -> tuple[int, ...]:
        return self.inspected.adapter.output_shape(self.inspected.model_config, tuple(request.x.shape))

    def cache_message(self, cache: CachedSampling, sigma: float, request: StepRequest) -> dict[str, Any]:
        return cache.message(sigma, self.inspected.adapter.family, self.inspected.model_config, request.shapes)

    def check_cache(self, settings: CacheSettings) -> None:
        settings.rule(self.inspected.adapter.family, self.inspected.model_config)

    def check_compile(self, settings: CompileSettings) -> None:
        """Every family's blocks can be compiled, or run as they are."""

    def work(self) -> Hashable:
        return self.recipe.path, self.recipe.weight_dtype, self.recipe.compute_dtype, self._fp8
