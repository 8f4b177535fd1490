"""Test-only nodes: conditioning without a text encoder, latents without a VAE."""

import torch


class SPTestConditioning:
    """Random conditioning, always the same for the same inputs, in the form HunyuanVideo's text encoder gives."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "tokens": ("INT", {"default": 8, "min": 1, "max": 4096, "tooltip": "length with padding"}),
                "valid_tokens": ("INT", {"default": 8, "min": 1, "max": 4096}),
                "width": ("INT", {"default": 64, "min": 1, "max": 16384}),
                "pooled_width": ("INT", {"default": 768, "min": 1, "max": 16384}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "tooltip": "-1: none"}),
            }
        }

    def make(self, seed: int, tokens: int, valid_tokens: int, width: int, pooled_width: int, guidance: float) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        cond = torch.randn(1, tokens, width, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled_width, generator=generator)}
        if valid_tokens < tokens:
            extra["attention_mask"] = (torch.arange(tokens) < valid_tokens).long().unsqueeze(0)
        if guidance >= 0:
            extra["guidance"] = guidance
        return ([[cond, extra]],)


class SPTestLatent:
    """A random picture's latent, always the same for the same inputs."""

    CATEGORY = "testing"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        size = ("INT", {"default": 64, "min": 8, "max": 4096, "step": 8, "tooltip": "in pixels"})
        return {"required": {"seed": ("INT", {"default": 0}), "width": size, "height": size}}

    def make(self, seed: int, width: int, height: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        return ({"samples": torch.randn(1, 16, height // 8, width // 8, generator=generator)},)


class SPTestVAE:
    """A VAE that makes noise of every video, the same for the same seed and size."""

    CATEGORY = "testing"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"seed": ("INT", {"default": 0})}}

    def __init__(self) -> None:
        self.seed = 0

    def make(self, seed: int) -> tuple:
        self.seed = seed
        return (self,)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """[T, H, W, 3] → [1, 16, (T − 1) // 4 + 1, H / 8, W / 8]."""
        count, height, width, _ = frames.shape
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(1, 16, (count - 1) // 4 + 1, height // 8, width // 8, generator=generator)


NODE_CLASS_MAPPINGS = {
    "SPTestConditioning": SPTestConditioning,
    "SPTestLatent": SPTestLatent,
    "SPTestVAE": SPTestVAE,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SPTestConditioning": "Test Conditioning",
    "SPTestLatent": "Test Latent",
    "SPTestVAE": "Test VAE",
}
