"""Recognises a picture that was copied: resized, compressed again, cropped, cleaned of text, made brighter.

Two steps, since ultrasound frames of one kind look alike: a hash of 255 bits that finds candidates among all pairs,
and a comparison of the candidates that allows for a crop. Both look at the local contrast of a small version of the
picture, once of all of it and once of the imaged area alone, so that a copy without the scanner's surround matches.

The bits are signs of low frequencies of a cosine transform, as in pHash [1]. What is ours: local normalisation, so that
neither gain nor the fall-off with depth counts, and black surround that has no say. `benchmarks/near_duplicates.py`
measures how well it works, and shows what `NEAR`, `ALIKE`, `SAME` and `STILL` were chosen by.

[1] Zauner. Implementation and benchmarking of perceptual image hash functions. Hagenberg, 2010.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np

#: Largest hash distance at which two pictures are worth comparing; half of the bits differ between unrelated ones.
NEAR = 96
#: `similarity` from which on two pictures are the same but for the treatment.
ALIKE = 0.6
#: Hash distance at which two pictures are the same without a second look: copied, resized or compressed, no more.
#: Up to here `near_pairs` is quick.
SAME = 15
#: `change` below which a frame of a clip tells nothing that the one before it did not: what JPEG of quality 50 does.
STILL = 0.03

_SIDE = 64  # of the small version
_DARK = 8  # grey levels up to which a pixel counts less: black surround has none, noise in shadows has some
_REACH = 25, 6.0  # pixels of the small version: width and sigma of the neighbourhood that contrast is local to
_LEAST_CONTRAST = 0.5  # of square roots of grey levels; less is noise that must not be amplified
_MOST = 1.5  # text and calipers stand out by more than tissue does
_PLAIN = 0.12  # mean square of the local contrast: black, uniform and gradient pictures have less, real ones more
_SHALLOW = 0.75  # height of the imaged area that counts, in units of its width
_BOX_SIDE = 96  # of the version that the imaged area is found on
_BORDER = 8  # pixels of the small version by which a crop may have moved the picture
_SIZES = sorted(  # height and width of a crop's content against the original's, the likeliest first
    (
        (tall, wide)
        for tall, wide in itertools.product((0.94, 0.97, 1.0, 1.03, 1.06), repeat=2)
        if abs(tall - wide) < 0.05
    ),
    key=lambda size: size != (1, 1),
)
_HOPELESS = 0.3  # correlation at the likeliest size below which other sizes do not help
_BLOCK = 8, 4096  # pairs at a time: fits the cache


def _frequencies() -> np.ndarray:
    """The 255 lowest frequencies but for the first 6, which most frames share -> bool [K, K]."""
    u, v = np.mgrid[:20, :20]
    order = np.argsort((u * u + v * v).ravel(), kind="stable")
    chosen = np.zeros(u.size, bool)
    chosen[order[6 : 6 + 255]] = True
    return chosen.reshape(u.shape)


_CHOSEN = _frequencies()
_COSINES = np.cos(np.pi * np.outer(np.arange(len(_CHOSEN)), np.arange(_SIDE) + 0.5) / _SIDE).astype(np.float32)


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """A small grey version: uint8 or uint16 `[H, W]` or `[H, W, C]` -> float32 `[64, 64]`."""
    return _shrink(_grey(pixels)).astype(np.float32)


def change(last: np.ndarray, this: np.ndarray) -> float:
    """How much of a thumbnail is new: mean absolute difference over the mean deviation of `last`; 0 = nothing."""
    contrast = float(np.abs(last - last.mean()).mean())
    return float(np.abs(this - last).mean()) / max(contrast, 1.0)


def near_identical(last: np.ndarray, this: np.ndarray, limit: float = STILL) -> bool:
    """Whether a frame adds nothing to the last one that was kept of the same clip.

    Args:
      last: `thumbnail` of the last frame that was kept, not of the one before: slow motion adds up.
      this: `thumbnail` of the frame in question.
      limit: of `change`.
    """
    return change(last, this) < limit


def content_box(grey: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest bright area, text apart: uint8 `[H, W]`; all of it if there is none."""
    height, width = grey.shape
    scale = _BOX_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    bright = (cv2.resize(grey, size, interpolation=cv2.INTER_AREA) > 6).astype(np.uint8)
    opened = cv2.morphologyEx(bright, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))  # text is thinner
    count, _, areas, _ = cv2.connectedComponentsWithStats(opened)
    if count < 2:
        return 0, 0, width, height
    left, top, wide, high, _ = areas[1 + np.argmax(areas[1:, cv2.CC_STAT_AREA])]
    right, bottom = np.ceil((left + wide) / scale), np.ceil((top + high) / scale)
    return int(left / scale), int(top / scale), min(width, int(right)), min(height, int(bottom))


def views(pixels: np.ndarray) -> np.ndarray:
    """Local contrast of all of a picture and of its imaged area: what hashes and comparisons look at.

    Of the imaged area only the upper part counts, where it is higher than three quarters of its width: copies often
    differ in how much of the depth they show.

    Args:
      pixels: uint8 `[H, W]` or `[H, W, C]`, C = 1 or 3 (RGB).

    Returns:
      float32 `[2, 64, 64]`, from -1.5 to 1.5; zeros for a view without structure, which must not resemble anything.
    """
    grey = _grey(pixels)
    left, top, right, bottom = content_box(grey)
    bottom = min(bottom, top + max(1, round(_SHALLOW * (right - left))))
    whole = _local_contrast(_shrink(grey))
    if (left, top, right, bottom) == (0, 0, grey.shape[1], grey.shape[0]):
        return np.stack([whole, whole])
    return np.stack([whole, _local_contrast(_shrink(grey[top:bottom, left:right]))])


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """A hash that copies of a picture nearly share: uint8 `[H, W]` or `[H, W, C]` -> uint64 `[8]`, see `hash_views`."""
    return hash_views(views(pixels))


def hash_views(seen: np.ndarray) -> np.ndarray:
    """The hash of `views`: float32 `[2, 64, 64]` -> uint64 `[8]`.

    Four words for each view. The last of 256 bits says that there is a hash: four
    zero words belong to a view without structure, and match nothing, not even each other.
    """
    signs = (_COSINES @ seen @ _COSINES.T)[:, _CHOSEN] > 0
    usable = np.array([view.any() for view in seen])
    bits = np.column_stack([signs & usable[:, None], usable])
    return np.packbits(bits).view(np.uint64)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits that differ, of whichever view differs less; 255 where there is nothing to compare.

    uint64 `[N, 8]` and `[M, 8]` -> uint8 `[N, M]`.
    """
    result = np.full((len(a), len(b)), 255, np.uint8)
    for first in (0, 4):
        usable = b[:, first : first + 4].any(axis=1)
        found = np.zeros_like(result)  # at most 255: the last bit is the same in all usable hashes
        for word in range(first, first + 4):
            found += np.bitwise_count(a[:, word, None] ^ b[None, :, word])
        found[:, ~usable] = 255
        found[~a[:, first : first + 4].any(axis=1)] = 255
        np.minimum(result, found, out=result)
    return result


def near_pairs(
    a: np.ndarray,
    b: np.ndarray | None = None,
    radius: int = NEAR,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    done: Callable[[int], Any] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs within a hash distance, none missed, in little memory.

    Every hash is compared with every other, but for one case: hashes among themselves and a radius below 16, where only
    those are compared that share 16 bits in a row.

    Args:
      a: uint64 `[N, 8]`, from `perceptual_hash`.
      b: uint64 `[M, 8]`; None compares `a` with itself, each pair once.
      radius: largest distance, below 255.
      groups: int `[N]` and `[M]`; pairs of the same group are left out, as frames of one clip are.
      done: called with numbers of rows of `a` as they are finished.

    Returns:
      i, j int64 `[P]` and their distance uint8 `[P]`, ordered by i, then j.
    """
    blocks = _all_pairs(a, b, radius, done) if b is not None or radius > 15 else _banded_pairs(a, radius, done)
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))]
    for i, j, distance in blocks:
        keep = slice(None) if groups is None else groups[0][i] != groups[1][j]
        found.append((i[keep], j[keep], distance[keep]))
    i, j, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((distance, j, i))
    i, j, distance = i[order], j[order], distance[order]
    once = (np.diff(i, prepend=-1) != 0) | (np.diff(j, prepend=-1) != 0)
    return i[once], j[once], distance[once]


Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def _all_pairs(a: np.ndarray, b: np.ndarray | None, radius: int, done: Callable[[int], Any]) -> Iterator[Block]:
    columns = np.asfortranarray(a if b is None else b)  # words of one kind side by side
    rows, width = _BLOCK
    for top in range(0, len(a), rows):
        for left in range(0 if b is not None else top, len(columns), width):
            distance = distances(a[top : top + rows], columns[left : left + width])
            i, j = np.nonzero(distance <= radius)
            value = distance[i, j]
            i, j = i + top, j + left
            keep = slice(None) if b is not None else i < j
            if len(i):
                yield i[keep], j[keep], value[keep]
        done(min(rows, len(a) - top))


def _banded_pairs(a: np.ndarray, radius: int, done: Callable[[int], Any]) -> Iterator[Block]:
    """Of 16 bands of bits, hashes that differ in at most 15 bits share one."""
    for first in (0, 4):
        usable = np.flatnonzero(a[:, first : first + 4].any(axis=1))
        words = np.ascontiguousarray(a[usable, first : first + 4])
        for band in words.view(np.uint16).T:
            order = np.argsort(band, kind="stable")
            band, at, step = band[order], np.arange(len(order)), 1
            while len(at):  # neighbours, then neighbours but one, as far as bands are equal
                at = at[at + step < len(order)]
                at = at[band[at] == band[at + step]]
                one, other = order[at], order[at + step]
                distance = np.bitwise_count(words[one] ^ words[other]).sum(axis=1, dtype=np.uint8)
                near = distance <= radius
                yield usable[one[near]], usable[other[near]], distance[near]
                step += 1
    done(len(a))


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """How alike two pictures are, where they are most: `views` of both -> correlation from 0 to 1.

    The middle of one is searched for in the other at several sizes, which undoes a crop of up to 5% a side. `ALIKE` is
    where copies begin; 0 if there is nothing to compare.
    """
    best = 0.0
    pairs = [(one, other) for one, other in zip(a, b, strict=True) if _searchable(one) and other.any()]
    for tall, wide in _SIZES:
        best = max([best, *(_search(one, other, tall, wide) for one, other in pairs)])
        if best < _HOPELESS:
            break  # after the first size, which is none of the copies and most of the rest
    return best


def _searchable(view: np.ndarray) -> bool:
    return bool(np.square(view[_BORDER:-_BORDER, _BORDER:-_BORDER]).mean() > _PLAIN / 2)


def _search(one: np.ndarray, other: np.ndarray, tall: float, wide: float) -> float:
    """The best correlation of the middle of `one`, resized, with a place of `other`."""
    middle = one[_BORDER:-_BORDER, _BORDER:-_BORDER]
    size = round(middle.shape[1] * wide), round(middle.shape[0] * tall)
    middle = cv2.resize(middle, size, interpolation=cv2.INTER_AREA)
    return float(cv2.matchTemplate(other, middle, cv2.TM_CCOEFF_NORMED).max())


def _grey(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels
    return pixels[:, :, 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _shrink(grey: np.ndarray) -> np.ndarray:
    return cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def _local_contrast(small: np.ndarray) -> np.ndarray:
    """Square roots of grey levels, less their local mean, over their local deviation: uint8 -> float32, same shape."""
    root = np.sqrt(small, dtype=np.float32)
    weight = np.minimum(small * np.float32(1 / _DARK), 1)
    total = _blur(weight) + np.float32(1e-3)
    detail = (root - _blur(root * weight) / total) * weight
    deviation = np.sqrt(_blur(detail * detail) / total + _LEAST_CONTRAST)
    result = np.clip(detail / deviation, -_MOST, _MOST)
    return result if np.square(result).mean() > _PLAIN else np.zeros_like(result)


def _blur(values: np.ndarray) -> np.ndarray:
    width, sigma = _REACH
    return cv2.GaussianBlur(values, (width, width), sigma)
