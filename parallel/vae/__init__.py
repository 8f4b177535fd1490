"""Tiles of a VAE on all ranks: who computes which tile, and the way of a tile to a worker and back."""
