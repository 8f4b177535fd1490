"""How models are indexed by tokens: one plan for each class, as data. How they run: `parallel/split`."""
