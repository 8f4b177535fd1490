"""Figures for the attention exchange and for a whole step, and one rank's exact share of a larger world."""
