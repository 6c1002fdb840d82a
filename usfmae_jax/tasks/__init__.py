"""What is learnt with labels: one file for each task."""
