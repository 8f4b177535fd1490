"""Tiles of a VAE on all ranks: their assignment to ranks, and the data that lets a worker rebuild the host's VAE."""
