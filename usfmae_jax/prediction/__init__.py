"""Prediction with trained models: files in; numbers, masks and overlays out."""
