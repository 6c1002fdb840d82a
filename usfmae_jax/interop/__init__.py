"""Weights in files: our own encoder directory, and other people's formats; knows models only."""
