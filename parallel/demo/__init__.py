"""Demo of the engine without ComfyUI, without a download and without a GPU."""
