"""Shared by all training loops: devices, state, update, checkpoints, forward passes, probes, logs and progress."""
