"""Attention over a sequence that is spread over ranks: the exchange (who sends what) apart from the kernel."""
