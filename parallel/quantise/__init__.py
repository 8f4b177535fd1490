"""FP8 weights: the user's settings, the selection of layers, and the report of the result."""
