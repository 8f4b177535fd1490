"""How models are indexed by tokens: one plan for each class, as data. How they run: `parallel/split`."""

from typing import Literal

Library = Literal["comfyui", "diffusers"]
"""Whose classes there are plans for."""
