"""Configurations: `FILE.py[:variant]`."""
