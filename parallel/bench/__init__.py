"""Benchmarks of the attention exchange, a whole step, one rank's exact share of a larger world, and the start."""
