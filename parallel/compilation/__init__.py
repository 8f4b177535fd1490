"""Compiled blocks: what a user asks for, and how a worker does it."""
