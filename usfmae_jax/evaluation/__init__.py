"""Evaluation: metrics from predictions or features; independent of training."""
