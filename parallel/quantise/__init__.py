"""FP8 weights: what a user asks for, which layers that means, and what became of them."""
