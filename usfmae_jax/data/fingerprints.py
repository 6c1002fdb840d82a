"""Recognises copies of an image: resized, recompressed, cropped, with text removed, brightened.

Two steps, since ultrasound frames of one kind look alike: a hash of 255 bits finds candidates among all pairs, and a
comparison of the candidates allows for a crop. Both use the local contrast of a small version of the image, once of the
whole image and once of the imaged area only, so that a copy without the scanner's user interface matches.

The bits are signs of low frequencies of a cosine transform, as in pHash [1]. Our additions: local normalisation, so
that neither gain nor attenuation with depth matters, and a black background that is ignored.
`benchmarks/near_duplicates.py` measures how well it works, and shows how `NEAR`, `ALIKE`, `SAME` and `STILL` were
chosen.

[1] Zauner. Implementation and benchmarking of perceptual image hash functions. Hagenberg, 2010.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np

#: Maximum hash distance of images that are compared; between unrelated images, half of the bits differ.
NEAR = 96
#: Minimum `similarity` of two images that are copies.
ALIKE = 0.6
#: `near_pairs` compares all rows with equal hashes up to this number of them, and stops after this number of pairs.
COPIES, MOST = 32, 1 << 24
#: Maximum hash distance of images that are the same without a comparison: only copied, resized or compressed.
#: Up to this distance `near_pairs` is fast.
SAME = 15
#: `change` below which a frame of a clip adds nothing to the previous one: about that of JPEG at quality 50.
STILL = 0.03

_SIDE = 64  # side of the small version
_DARK = 8  # pixels up to this grey level have less weight: 0 for the background, some for noise in shadows
_REACH = 25, 6.0  # width and sigma of the neighbourhood for local contrast, in pixels of the small version
_LEAST_CONTRAST = 0.5  # in square roots of grey levels; less is noise that must not be amplified
_MOST = 1.5  # limit of the local contrast: text and calipers exceed that of tissue
_PLAIN = 0.12  # mean square of the local contrast: less in black, uniform and gradient images, more in real ones
_SHALLOW = 0.75  # height of the imaged area that is used, as a fraction of its width
_BOX_SIDE = 96  # side of the version in which the imaged area is found
_BORDER = 8  # how far a crop may have moved the content, in pixels of the small version
_SIZES = sorted(  # height and width of a crop's content relative to the original's, the most likely first
    (
        (tall, wide)
        for tall, wide in itertools.product((0.94, 0.97, 1.0, 1.03, 1.06), repeat=2)
        if abs(tall - wide) < 0.05
    ),
    key=lambda size: size != (1, 1),
)
_HOPELESS = 0.3  # correlation at the most likely size below which other sizes do not help
_SEVERAL = -(1 << 62)  # not the number of any group
_BLOCK = 8, 4096  # pairs at a time: fits into the cache
_TOGETHER = 1 << 16  # pairs of hashes that share a band at a time, likewise


def _frequencies() -> np.ndarray:
    """The 255 lowest frequencies after the first 6, which most frames share -> bool [K, K]."""
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
    """How much a thumbnail differs: mean absolute difference over the mean absolute deviation of `last`; 0 = equal."""
    contrast = float(np.abs(last - last.mean()).mean())
    return float(np.abs(this - last).mean()) / max(contrast, 1.0)


def near_identical(last: np.ndarray, this: np.ndarray, limit: float = STILL) -> bool:
    """Whether a frame adds nothing to the last kept frame of the same clip.

    Args:
      last: `thumbnail` of the last frame that was kept, not of the previous one: slow motion adds up.
      this: `thumbnail` of the new frame.
      limit: threshold of `change`.
    """
    return change(last, this) < limit


def content_box(grey: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest bright area except text: uint8 `[H, W]`; the whole image if none."""
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
    """Local contrast of a whole image and of its imaged area, from which hashes and similarities are computed.

    If the imaged area is higher than three quarters of its width, only its upper part is used: copies often differ in
    how much depth they show.

    Args:
      pixels: uint8 `[H, W]` or `[H, W, C]`, C = 1 or 3 (RGB).

    Returns:
      float32 `[2, 64, 64]`, from -1.5 to 1.5; zeros for a view without structure, which must not match anything.
    """
    grey = _grey(pixels)
    left, top, right, bottom = content_box(grey)
    bottom = min(bottom, top + max(1, round(_SHALLOW * (right - left))))
    whole = _local_contrast(_shrink(grey))
    if (left, top, right, bottom) == (0, 0, grey.shape[1], grey.shape[0]):
        return np.stack([whole, whole])
    return np.stack([whole, _local_contrast(_shrink(grey[top:bottom, left:right]))])


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """A hash that is similar for copies: uint8 `[H, W]` or `[H, W, C]` -> uint64 `[8]`, see `hash_views`."""
    return hash_views(views(pixels))


def hash_views(seen: np.ndarray) -> np.ndarray:
    """The hash of `views`: float32 `[2, 64, 64]` -> uint64 `[8]`.

    Four words per view. The last of the 256 bits is set in every hash: four zero words mean a view without structure,
    and match nothing, not even each other.
    """
    signs = (_COSINES @ seen @ _COSINES.T)[:, _CHOSEN] > 0
    usable = np.array([view.any() for view in seen])
    bits = np.column_stack([signs & usable[:, None], usable])
    return np.packbits(bits).view(np.uint64)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of bits that differ, in the view where they are fewer; 255 if there is nothing to compare.

    uint64 `[N, 8]` and `[M, 8]` -> uint8 `[N, M]`.
    """
    result = np.full((len(a), len(b)), 255, np.uint8)
    for first in (0, 4):
        usable = b[:, first : first + 4].any(axis=1)
        found = np.zeros_like(result)  # at most 255: the last bit is equal in all usable hashes
        for word in range(first, first + 4):
            found += np.bitwise_count(a[:, word, None] ^ b[None, :, word])
        found[:, ~usable] = 255
        found[~a[:, first : first + 4].any(axis=1)] = 255
        np.minimum(result, found, out=result)
    return result


Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def near_pairs(
    a: np.ndarray,
    b: np.ndarray | None = None,
    radius: int = NEAR,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    done: Callable[[int], Any] = lambda rows: None,
    kinds: tuple[np.ndarray, np.ndarray] | None = None,
    most: int = MOST,
    warn: Callable[[str], Any] = lambda sentence: print(sentence, file=sys.stderr),
) -> Block:
    """Pairs within a hash distance; many copies of one image do not multiply time and memory.

    All are found, with two exceptions. Among more than `COPIES` rows with equal hashes only some represent the others,
    so that every row still has a pair with one of each kind and another group. And the search ends after `most` pairs.

    Every hash of `a` is compared with every hash of `b`; without `b` and with a radius below 16, only hashes that share
    a band of 16 bits are compared.

    Args:
      a: uint64 `[N, 8]`, from `perceptual_hash`.
      b: uint64 `[M, 8]`; None compares `a` with itself, each pair once.
      radius: maximum distance, below 255.
      groups: int `[N]` and `[M]`; pairs of the same group, such as frames of one clip, are left out.
      done: called with the number of rows of `a` that have been finished.
      kinds: int `[N]` and `[M]`: kinds of copies that the caller distinguishes, such as labels.
      most: maximum number of pairs.
      warn: called with a sentence if there are more.

    Returns:
      i, j int64 `[P]` and their distance uint8 `[P]`, sorted by i, then j.
    """
    size = len(a), len(a if b is None else b)
    if groups is None:
        groups = (np.arange(size[0]),) * 2 if b is None else (np.full(size[0], -1), np.zeros(size[1], int))
    kinds = kinds or (np.zeros(size[0], int), np.zeros(size[1], int))
    left = _Copies(a, groups[0], kinds[0])
    right = _Copies(a if b is None else b, groups[1], kinds[1])
    done(size[0] - len(left.codes))
    if b is not None or radius > 15:
        blocks = _all_pairs(left.codes, None if b is None else right.codes, radius, done)
    else:
        blocks = _banded_pairs(left.codes, radius, done)
    if b is None:
        equal = np.flatnonzero(left.codes.any(axis=1) & (left.counts > 1))
        blocks = itertools.chain([(equal, equal, np.zeros(len(equal), np.uint8))], blocks)
    found, total = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))], 0
    for u, v, distance in blocks:
        # Most similar images are frames of one clip, which are left out before they take memory.
        apart = (left.group[u] != right.group[v]) | (left.group[u] == _SEVERAL)
        sizes = left.pairs(u[apart], right, v[apart])
        fitting = total + np.cumsum(sizes) <= most
        i, j, at = left.expanded(u[apart][fitting], right, v[apart][fitting], same=b is None)
        keep = groups[0][i] != groups[1][j]
        found.append((i[keep], j[keep], distance[apart][fitting][at[keep]]))
        total += len(found[-1][0])
        if not fitting.all():
            warn(f"more than {most:,} pairs of pictures are nearly equal: the rest of them is not compared")
            break
    i, j, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((j, i))
    return i[order], j[order], distance[order]


def equal_pairs(codes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j of rows with equal codes and different groups, as in `near_pairs`: int `[N]` each -> int64 `[P]`."""
    rows = _Copies(codes, groups, np.zeros(len(codes), int))
    every = np.arange(len(rows.codes))
    i, j, _ = rows.expanded(every, rows, every, same=True)
    return i[groups[i] != groups[j]], j[groups[i] != groups[j]]


class _Copies:
    """Rows by their hash.

    Attributes:
      codes: uint64 `[U, 8]`, the unique hashes.
      counts: int `[U]`, number of rows with each hash.
      group: int `[U]`, the group of these rows, or `_SEVERAL`.
    """

    def __init__(self, rows: np.ndarray, groups: np.ndarray, kinds: np.ndarray):
        self.codes, code, self.counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
        code = code.reshape(-1)
        order = np.argsort(code, kind="stable")
        starts = np.cumsum(self.counts) - self.counts
        first = groups[order[starts]] if len(rows) else np.empty(0, int)
        mixed = np.zeros(len(self.codes), bool)
        mixed[code[groups != first[code]]] = True
        self.group = np.where(mixed, _SEVERAL, first)
        self._stands = np.zeros(len(rows), bool)  # rows that represent all others with the same hash
        self._stands[order[np.arange(len(rows)) - starts[code[order]] < COPIES]] = True
        self._stands[_first_of_kinds(code, groups, kinds)] = True
        self._all = order, starts, self.counts
        self._some, self._rest = (self._members(code, order[chosen]) for chosen in self._split(order))

    def _split(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._stands[order], ~self._stands[order]

    def _members(self, code: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.bincount(code[rows], minlength=len(self.codes))
        return rows, np.cumsum(counts) - counts, counts

    def pairs(self, u: np.ndarray, other: "_Copies", v: np.ndarray) -> np.ndarray:
        """The number of pairs of rows that `expanded` makes of each pair of hashes."""
        return self._some[2][u] * other.counts[v] + self._rest[2][u] * other._some[2][v]

    def expanded(self, u: np.ndarray, other: "_Copies", v: np.ndarray, same: bool) -> Block:
        """The rows of pairs of hashes: i, j and the position of their pair; i < j if both are the `same` rows."""
        i, j, at = _product(self._some, u, other._all, v)
        rest = _product(self._rest, u, other._some, v)
        if same:  # within one hash, the second product repeats the first
            once = u[rest[2]] != v[rest[2]]
            rest = rest[0][once], rest[1][once], rest[2][once]
            once = (u[at] != v[at]) | (i < j) | ((i != j) & ~self._stands[j])
            i, j, at = i[once], j[once], at[once]
        i, j, at = (np.concatenate(both) for both in zip((i, j, at), rest, strict=True))
        return (np.minimum(i, j), np.maximum(i, j), at) if same else (i, j, at)


def _first_of_kinds(code: np.ndarray, groups: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """For each hash, the first row of up to `COPIES` kinds, and the first of each kind in another group."""
    if not len(code):
        return np.empty(0, np.int64)
    order = np.lexsort((kinds, code))  # stable: rows of a kind stay in order
    new_code = np.diff(code[order], prepend=-1) != 0
    new = new_code | (np.diff(kinds[order], prepend=kinds[order[0]]) != 0)
    section = np.cumsum(new) - 1
    number = section - section[np.maximum.accumulate(np.where(new_code, np.arange(len(order)), 0))]
    first = order[new]
    another = np.flatnonzero(groups[order] != groups[first[section]])
    _, at = np.unique(section[another], return_index=True)
    few = number < COPIES
    return np.concatenate([order[new & few], order[another[at][few[another[at]]]]])


def _product(some: Block, u: np.ndarray, others: Block, v: np.ndarray) -> Block:
    """All rows of hash u[k] with all of v[k]: i, j and k. Arguments are rows by hash, and starts and counts by hash."""
    sizes = some[2][u] * others[2][v]
    at = np.repeat(np.arange(len(u)), sizes)
    within = np.arange(len(at)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    row, column = np.divmod(within, others[2][v][at])
    return some[0][some[1][u][at] + row], others[0][others[1][v][at] + column], at


def _all_pairs(a: np.ndarray, b: np.ndarray | None, radius: int, done: Callable[[int], Any]) -> Iterator[Block]:
    columns = np.asfortranarray(a if b is None else b)  # each word contiguous over all hashes
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
    """Hashes that differ in at most 15 bits share one of 16 bands; each pair is yielded once, for the first band."""
    views = a[:, :4], a[:, 4:]
    for number, view in enumerate(views):
        usable = np.flatnonzero(view.any(axis=1))
        words = np.ascontiguousarray(view[usable])
        for first, band in enumerate(words.view(np.uint16).T):
            order = np.argsort(band, kind="stable")
            band, place = band[order], np.arange(len(order))
            behind = np.searchsorted(band, band, "right") - 1 - place  # how many later rows have the same band
            ends = np.cumsum(behind)
            for start, stop in itertools.pairwise(_cuts(ends)):
                some = behind[start:stop]
                at = np.repeat(place[start:stop], some)
                step = np.arange(len(at)) - np.repeat(np.cumsum(some) - some, some)
                one, other = order[at], order[at + 1 + step]
                bits = words.take(one, axis=0) ^ words.take(other, axis=0)  # many times faster than indexing
                distance = _count(bits)
                new = distance <= radius
                for earlier in bits.view(np.uint16).T[:first]:
                    new &= earlier != 0
                i, j, distance = usable[one[new]], usable[other[new]], distance[new]
                another = views[1 - number]
                both = another[i].any(axis=1) & another[j].any(axis=1)
                theirs = _count(another[i] ^ another[j])
                if number:  # leave out pairs that the first view has found
                    once = ~(both & (theirs <= radius))
                    yield i[once], j[once], distance[once]
                else:
                    yield i, j, np.where(both, np.minimum(distance, theirs), distance)
    done(len(a))


def _count(bits: np.ndarray) -> np.ndarray:
    """Number of set bits: uint64 `[N, 4]` -> uint8 `[N]`; the last bit never differs between usable hashes."""
    count = np.bitwise_count(bits)
    return count[:, 0] + count[:, 1] + count[:, 2] + count[:, 3]  # several times faster than a sum


def _cuts(ends: np.ndarray) -> list[int]:
    """Where to cut rows, whose cumulative pair counts are `ends`, into blocks of about `_TOGETHER` pairs."""
    if not len(ends):
        return []
    marks = np.searchsorted(ends, np.arange(_TOGETHER, ends[-1], _TOGETHER), "right")
    return np.unique([0, *marks, len(ends)]).tolist()


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two images at the best match: `views` of both -> correlation from 0 to 1.

    The centre of one is searched for in the other at several sizes, which allows for a crop of up to 5% per side.
    Copies have at least `ALIKE`; 0 if there is nothing to compare.
    """
    best = 0.0
    pairs = [(one, other) for one, other in zip(a, b, strict=True) if _searchable(one) and other.any()]
    for tall, wide in _SIZES:
        best = max([best, *(_search(one, other, tall, wide) for one, other in pairs)])
        if best < _HOPELESS:
            break  # after the first size; this ends no copies and most others
    return best


def _searchable(view: np.ndarray) -> bool:
    return bool(np.square(view[_BORDER:-_BORDER, _BORDER:-_BORDER]).mean() > _PLAIN / 2)


def _search(one: np.ndarray, other: np.ndarray, tall: float, wide: float) -> float:
    """The best correlation of the centre of `one`, resized, with any position in `other`."""
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
    """Square roots of grey levels minus their local mean, over their local deviation: uint8 -> float32, same shape."""
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
