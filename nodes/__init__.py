"""What a user sees: one file per node. The only half of the pack that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .first_block_cache import SPFirstBlockCache
from .load_diffusion_model import SPLoadDiffusionModel
from .sampler import SPSampler
from .sp_config import SPConfigNode
from .tea_cache import SPTeaCache
from .vae_decode import SPVAEDecode
from .vae_encode import SPVAEEncode


class SequenceParallelExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SPConfigNode,
            SPLoadDiffusionModel,
            SPFirstBlockCache,
            SPTeaCache,
            SPSampler,
            SPVAEDecode,
            SPVAEEncode,
        ]


async def comfy_entrypoint() -> SequenceParallelExtension:
    return SequenceParallelExtension()
