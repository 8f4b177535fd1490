"""Attention over a sequence that is spread over ranks: exchange (who sends what) apart from kernel (what is computed)."""
