"""One file per model family: how its checkpoint, its inputs and its blocks map onto sequence parallelism."""
