"""Sequence-parallel inference engine for diffusion transformers.

The engine knows nothing of ComfyUI: it runs, and is tested, on its own. The way of the data:

    host (recipe → group → remote model)  →  wire (messages, shared tensors)
        →  worker (loop → resident model)  →  adapters (one family each)  →  attention (exchange, kernel)

"Sequence parallel" is the name of the whole family (Ulysses, ring, hybrid); diffusers calls it context parallel.
"""

__version__ = "0.1.0"
