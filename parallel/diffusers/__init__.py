"""Diffusers' own transformers, from its folders: for scripts, demo, benchmarks, and tests without ComfyUI."""
