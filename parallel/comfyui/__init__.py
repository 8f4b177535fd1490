"""Code that imports ComfyUI, whose models are built by its own code. For the nodes in ComfyUI's process, and the
workers."""
