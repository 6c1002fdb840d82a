"""Masked-autoencoder foundation models for ultrasound, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from usfmae_jax.loading import load_encoder as load_encoder

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_encoder":  # imported only when asked for: --help of a command must answer at once
        from usfmae_jax.loading import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
