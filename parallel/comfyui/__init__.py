"""What imports ComfyUI: its models, built by its own code. For the nodes in ComfyUI's process, and the workers."""
