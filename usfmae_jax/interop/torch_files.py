"""PyTorch files (`.pt`, `.pth`, `.bin`), read without running anything that they hold."""

import argparse
import re
import warnings
import zipfile
from typing import Any

import numpy as np

from usfmae_jax.errors import InputError
from usfmae_jax.interop.tensors import Tensor, Tensors

#: Where training scripts keep the parameters in a checkpoint.
NESTED = ("model", "state_dict", "model_state_dict")


def open_torch(path: str) -> Tensors:
    """The floating-point tensors of a PyTorch file's state dict, nested under `model` or not.

    Raises:
      InputError: PyTorch is missing, the file is damaged, holds code, or holds no tensors by name.
    """
    loaded = _load(path)
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in NESTED if isinstance(loaded.get(key), dict)), loaded)
    tensors = _tensors(loaded) if isinstance(loaded, dict) else {}
    if not tensors:
        raise InputError(f"{path} holds no tensors by name; save it with torch.save(model.state_dict(), FILE)")
    return tensors


def _load(path: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch: pip install 'usfmae_jax[interop]', or convert it to safetensors elsewhere"
        ) from error
    try:
        # Of all classes only the one that holds a training script's arguments is let through: it runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of pickles; what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"{path} holds code ({code[1]}) beside tensors, which is not run; where it was made, save the "
                "tensors alone: torch.save(model.state_dict(), FILE)"
            ) from error
        inner = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = inner[1] if inner else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} is no whole PyTorch file of tensors ({reason[:200]}); download it again, or save it anew where it "
            "was made: torch.save(model.state_dict(), FILE)"
        ) from error


def _tensors(state: dict[Any, Any]) -> Tensors:
    import torch

    def tensor(value: Any) -> Tensor:
        return Tensor(tuple(value.shape), lambda: np.asarray(value.detach().to(torch.float32).numpy()))

    return {
        name: tensor(value)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and value.is_floating_point()
    }
