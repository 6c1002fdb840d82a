"""Pictures of what the model sees and predicts."""

import cv2
import numpy as np

COLUMNS = ("input", "masked", "reconstruction", "pasted")


def reconstruction_grid(images: np.ndarray, predicted: np.ndarray, hidden: np.ndarray, side: int = 192) -> np.ndarray:
    """One row per image: input, what the encoder saw, what came back, and that pasted into what was seen.

    Args:
      images: uint8 `[B, H, W, C]`.
      predicted: uint8 `[B, H, W, C]`, every patch as predicted.
      hidden: bool `[B, H, W]`, True where a patch was hidden.
      side: the longer side of an image as it is shown, in pixels.

    Returns:
      uint8 RGB `[rows, columns, 3]`, with a caption above each column.
    """
    covered = hidden[..., None]
    masked = np.where(covered, np.uint8(128), images)
    pasted = np.where(covered, predicted, images)
    height, width = images.shape[1:3]
    scale = side / max(height, width)
    size = (round(width * scale), round(height * scale))

    def tile(image: np.ndarray) -> np.ndarray:
        rgb = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        return np.pad(
            cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC),
            ((2, 2), (2, 2), (0, 0)),
        )

    rows = [np.hstack([tile(column[i]) for column in (images, masked, predicted, pasted)]) for i in range(len(images))]
    caption = np.zeros((22, rows[0].shape[1], 3), np.uint8)
    for number, name in enumerate(COLUMNS):
        place = (number * (size[0] + 4) + 4, 16)
        cv2.putText(caption, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (230, 230, 230), 1, cv2.LINE_AA)
    return np.vstack([caption, *rows])


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of a uint8 RGB picture."""
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
