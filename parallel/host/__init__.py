"""Host side of the engine, in the user's process: recipes (what to run), groups of workers, and calls to them."""
