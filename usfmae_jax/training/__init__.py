"""Training: the loops and what every loop shares."""
