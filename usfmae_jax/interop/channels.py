"""Patch kernels for another number of channels, such that grey images keep their features."""

import dataclasses

import numpy as np

from usfmae_jax.errors import InputError
from usfmae_jax.interop.settings import Settings


def change(params: dict[str, np.ndarray], settings: Settings, channels: int) -> tuple[dict[str, np.ndarray], Settings]:
    """Averages three channels to one, or repeats one three times.

    An image that shows the same grey in all channels gets the tokens that it got before: the average is weighted by
    the channels' normalisation and multiplied by their number, a repeated kernel is divided by it. The decoder
    predicts the average of the channels, or the same for all.

    Args:
      params: by our names, see `model.Model`.
      settings: of the model; 1 or 3 channels.
      channels: 1 or 3, the other of the two.

    Returns:
      the parameters and settings of the changed model.

    Raises:
      InputError: the model has another number of channels than 1 and 3, or another is asked for.
    """
    old = settings.architecture["channels"]
    if {old, channels} != {1, 3}:
        raise InputError(f"--channels={channels}: patch kernels of {old} channels can be changed from 1 to 3 or back")
    mean, std = (np.asarray(settings.preprocessing[name], np.float64) for name in ("mean", "std"))
    kernel = params["encoder.patch_embed.kernel"]
    by_channel = kernel.reshape(-1, old, kernel.shape[1]).astype(np.float64)  # [P*P, C, D]
    new_mean, new_std = (
        (mean.mean(keepdims=True), std.mean(keepdims=True)) if channels == 1 else (mean[[0] * 3], std[[0] * 3])
    )
    bias = params["encoder.patch_embed.bias"].astype(np.float64)
    if channels == 1:
        # (grey - mean_c) / std_c is linear in (grey - new_mean) / new_std: slope into the kernel, rest into the bias.
        bias = bias + (by_channel * ((new_mean - mean) / std)[None, :, None]).sum(axis=(0, 1))
        changed = (by_channel * (new_std / std)[None, :, None]).sum(axis=1, keepdims=True)
    else:
        changed = np.repeat(by_channel / 3, 3, axis=1)
    params = params | {
        "encoder.patch_embed.kernel": changed.reshape(-1, kernel.shape[1]).astype(np.float32),
        "encoder.patch_embed.bias": bias.astype(np.float32),
    }
    for name in ("decoder.pred.kernel", "decoder.pred.bias"):
        if name in params:
            value = params[name].reshape(*params[name].shape[:-1], -1, old)
            value = value.mean(axis=-1, keepdims=True) if channels == 1 else np.repeat(value, 3, axis=-1)
            params[name] = np.ascontiguousarray(value.reshape(*params[name].shape[:-1], -1), np.float32)
    return params, dataclasses.replace(
        settings,
        architecture=settings.architecture | {"channels": channels},
        preprocessing=settings.preprocessing
        | {"channels": channels, "mean": new_mean.tolist(), "std": new_std.tolist()},
    )
