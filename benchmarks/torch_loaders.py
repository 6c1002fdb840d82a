"""Datasets for PyTorch's DataLoader: that of the published recipe, and carefully optimised ones."""

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image


def single_threaded(_: int) -> None:
    """For workers of a DataLoader, which run in parallel with one thread each."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _crop(width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop, as in RandomResizedCrop; the whole image after ten failed tries."""
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    return 0, 0, width, height


class Originals(torch.utils.data.Dataset):
    """The published recipe: RGB, nearest resize, rotation by 0 to 90 degrees, flips, random crop of 0.5 to 2, ImageNet.

    Each step is the Pillow call that the torchvision transform of the same name makes. float32 `[3, size, size]`.
    """

    def __init__(self, files: Sequence[str], size: int):
        self.files, self.size = files, size
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One view of a file."""
        size = (self.size, self.size)
        image = Image.open(self.files[index]).convert("RGB").resize(size, Image.Resampling.NEAREST)
        image = image.rotate(random.uniform(0, 90), Image.Resampling.NEAREST)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        left, top, width, height = _crop(self.size, self.size, (0.5, 2.0))
        image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(self.mean).div_(self.std)


class Records(torch.utils.data.Dataset):
    """Grey JPEG frames in ArrayRecord shards; crop, rotation and flips are one warp. uint8 `[1, size, size]`."""

    def __init__(self, paths: Sequence[str], size: int, crop: tuple[float, float], rotation: tuple[float, float]):
        self.size, self.crop, self.rotation = size, crop, rotation
        self.paths, self.readers = list(paths), dict[str, ArrayRecordReader]()
        counts = [ArrayRecordReader(path, "readahead_buffer_size:0").num_records() for path in paths]
        self.places = [(path, row) for path, count in zip(paths, counts, strict=True) for row in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One view of a frame."""
        path, row = self.places[index]
        if path not in self.readers:  # opened in the worker
            self.readers[path] = ArrayRecordReader(path, "readahead_buffer_size:0")
        encoded = np.frombuffer(image_of(self.readers[path].read([row])[0]), np.uint8)
        image: Any = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
        left, top, width, height = _crop(image.shape[1], image.shape[0], self.crop)
        angle = math.radians(random.uniform(*self.rotation))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        flips = np.array([random.choice((-1, 1)), random.choice((-1, 1))])
        matrix = turn * flips * (np.array([width, height]) / self.size)  # from the view to the image
        centre = np.array([left + width / 2, top + height / 2])
        shift = centre - matrix @ np.array([self.size / 2, self.size / 2])
        how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return torch.from_numpy(cv2.warpAffine(image, np.column_stack([matrix, shift]), (self.size,) * 2, flags=how))[
            None
        ]


class Images(torch.utils.data.Dataset):
    """Image files, decoded and resized whole or through a random view, with their labels.

    Args:
      files: paths.
      labels: class number of each file.
      size: (height, width) of the output.
      channels: 1 or 3.
      view: maps the decoded uint8 image to the view for training; None resizes the whole image.
    """

    def __init__(
        self,
        files: Sequence[str],
        labels: Sequence[int],
        size: tuple[int, int],
        channels: int,
        view: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.files, self.labels, self.size, self.channels, self.view = files, labels, size, channels, view

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """uint8 `[C, H, W]`, and the label."""
        flag = cv2.IMREAD_GRAYSCALE if self.channels == 1 else cv2.IMREAD_COLOR_RGB
        pixels: Any = cv2.imread(self.files[index], flag)
        if self.view is not None:
            pixels = self.view(pixels)
        else:
            pixels = cv2.resize(pixels, self.size[::-1], interpolation=cv2.INTER_AREA)
        pixels = pixels.reshape(*self.size, self.channels)
        return torch.from_numpy(pixels.transpose(2, 0, 1)), self.labels[index]


def image_of(example: bytes) -> bytes:
    """The bytes of the feature `image` in a serialised `tf.train.Example`."""
    for features in _fields(example):
        for entry in _fields(features):  # of the map from names to features
            name, value = _fields(entry)
            if name == b"image":
                (values,) = _fields(value)
                return next(_fields(values))
    raise ValueError("the record has no image")


def _fields(message: bytes) -> Iterator[bytes]:
    """Yields the fields of a protobuf message whose fields are all length-delimited."""
    stream = io.BytesIO(message)
    while stream.read(1):
        length = shift = 0
        while True:
            (byte,) = stream.read(1)
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        yield stream.read(length)
