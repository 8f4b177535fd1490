"""The process that owns one device: boot, loop over the host's messages, resident models, one step."""
