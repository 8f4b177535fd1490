"""Test-only nodes: conditioning without a text encoder, and no text encoder."""

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


class SPTestNoClip:
    """No text encoder, for nodes that want one and do without."""

    CATEGORY = "testing"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        return (None,)


NODE_CLASS_MAPPINGS = {"SPTestConditioning": SPTestConditioning, "SPTestNoClip": SPTestNoClip}
NODE_DISPLAY_NAME_MAPPINGS = {"SPTestConditioning": "Test Conditioning", "SPTestNoClip": "Test No CLIP"}
