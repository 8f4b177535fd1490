"""Compiled blocks: the user's settings, and the compilation in a worker."""
