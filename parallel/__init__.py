"""Sequence-parallel inference engine for diffusion transformers.

A model is a library's own class, ComfyUI's or diffusers', unmodified. Only `comfyui` and `diffusers` import the one and
the other, so the engine runs, and is tested, without ComfyUI. The way of the data:

    host (recipe → group → remote model)  →  wire (messages, shared tensors)
        →  worker (loop → models, steps, tiles, benchmarks → split network)
            →  comfyui | diffusers (the network of a file)  →  plans (one for each class)
            →  split (hooks cut, route, join)  →  attention (exchange, kernel)

"Sequence parallel" is what Ulysses, ring and their hybrid are called together; diffusers calls it context parallel.
"""

__version__ = "0.1.0"
