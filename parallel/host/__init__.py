"""The side of the engine that lives in the user's process: what to run (recipe), who runs it (group), and the calls."""
