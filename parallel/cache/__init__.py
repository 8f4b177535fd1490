"""Skipping blocks whose effect has hardly changed since an earlier step: First Block Cache and TeaCache."""
