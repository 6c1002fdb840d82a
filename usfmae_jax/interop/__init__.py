"""Weights in files: our own format and those of others; depends on models only."""
