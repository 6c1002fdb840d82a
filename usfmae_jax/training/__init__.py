"""What every loop shares: devices, state, update, checkpoints, forward passes, probes, and what a person sees."""
