"""Masked-autoencoder foundation models for ultrasound, in JAX."""

__version__ = "0.1.0"
