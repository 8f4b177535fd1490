"""Plans: data that describe, for each class of model, how it is indexed by tokens. `parallel/split` runs them."""

from typing import Literal

Library = Literal["comfyui", "diffusers"]
"""Library whose classes have plans."""
