"""Learning from labels: every fold, seed and label fraction is trained and tested."""
