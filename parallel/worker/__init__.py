"""The worker process that owns one device: its boot, message loop, resident models and steps."""
