"""Data on the models of both libraries, by the library's name."""

from __future__ import annotations

from collections.abc import Mapping

from ..split.chain import Chain
from . import Library, comfyui, diffusers

CHAINS: Mapping[Library, Mapping[str, Chain]] = {"comfyui": comfyui.CHAINS, "diffusers": diffusers.CHAINS}
"""Maps libraries, then classes, to the blocks that caches between steps may skip."""
