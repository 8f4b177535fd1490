"""Sequence-parallel inference engine for diffusion transformers.

A model is a library's own class, ComfyUI's or diffusers', unmodified. Only the subpackages `comfyui` and `diffusers`
import these libraries, so the engine runs, and is tested, without ComfyUI. The data flow:

    host (recipe → group → remote model)  →  wire (messages, shared tensors)
        →  worker (loop → models, steps, tiles, benchmarks → split network)
            →  comfyui | diffusers (the network of a file)  →  plans (one for each class)
            →  split (hooks cut, route, join)  →  attention (exchange, kernel)

"Sequence parallel" covers Ulysses, ring and their hybrid; diffusers calls it context parallel.
"""

__version__ = "0.1.0"
