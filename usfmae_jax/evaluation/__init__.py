"""Evaluation: numbers from predictions or features; nothing here knows of training."""
