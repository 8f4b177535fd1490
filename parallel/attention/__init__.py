"""Attention over a sequence split across ranks; the exchange (who sends what) is separate from the kernel."""
