"""Reads clips as frames: MP4, MOV, AVI, MPEG, Matroska, WMV, GIF and animated PNG, with FFmpeg (PyAV) in one thread.

Rotations by quarter turns that the file requests are applied, as players do. Pixels are not resampled, even if they are
not square. The frames of a clip are either all grey or all in colour (`clips.as_frames`).

A damaged clip yields its intact frames, then an UnreadableError that states how many they were, so that the file is
reported with the reason. Detected are decoder errors, truncated packets, fewer frames than MP4 and MOV list (the
decoder skips some damage silently), an AVI shorter than it declares, and a GIF without its end. MPEG streams, Matroska
and WMV have no list of frames: one truncated between two frames passes for a shorter clip. If the number of frames in
the header differs from the list of frames, there is a warning.
"""

import os
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

from data_prep.readers.base import Frame, Options, UnreadableError, open_file
from data_prep.readers.clips import MAX_PIXELS, WRONG_COUNT, as_frames, check_size, chosen
from data_prep.readers.kinds import HEAD_BYTES, video_container

_TAIL = 64  # bytes
_UNKNOWN = 0, 0x7FFFFFFF, 0xFFFFFFFF  # sizes declared in an AVI that was written as a stream
_ERRORS = (av.FFmpegError, ValueError, IndexError, MemoryError)


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the frames of a clip, one at a time.

    To spread `max_frames` evenly, the frames are first counted in a pass over the file without decoding.

    Raises:
      UnreadableError: not a video, no video stream, too large, damaged or truncated.
    """
    kind, cut = _container(path)
    warnings: list[str] = []
    # A path with an explicit protocol, so that names are not mistaken for URLs; twice as fast as an open file.
    url = f"file:{os.path.abspath(os.fspath(path))}"
    yield from as_frames(_decode(url, kind, cut, options, warnings), warnings=warnings)


def _container(path: str | os.PathLike[str]) -> tuple[str, bool]:
    """FFmpeg's name for the container, and whether its end seems to be missing."""
    with open_file(path) as file:
        head = file.read(HEAD_BYTES)
        kind, size = video_container(head), os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    if not kind:
        raise UnreadableError("not a kind of video that is known")
    if kind == "gif":
        return kind, not tail.rstrip(b"\0\r\n ").endswith(b";")
    said = int.from_bytes(head[4:8], "little")
    return kind, kind == "avi" and said not in _UNKNOWN and said + 8 > size + 1  # a padding byte may be missing


def _decode(url: str, kind: str, cut: bool, options: Options, warnings: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    number = 0
    try:
        count = _count(url, kind) if options.max_frames or (cut and kind == "gif") else 0
        wanted = set(chosen(count, options)) if options.max_frames else set()  # all at the stride if empty
        # The picture in which a truncated GIF ends is completed silently.
        lost = count - 1 if cut and kind == "gif" else -1
        with _opened(url, kind) as clip:
            stream = clip.streams.video[0]
            listed = len(stream.index_entries)
            if stream.frames and listed > 1 and stream.frames != listed and not cut:
                warnings.append(WRONG_COUNT)
            left_out = 0  # frames discarded by the container itself, whose edit list begins or ends within the clip
            for packet in clip.demux(stream):
                left_out += packet.is_discard
                for picture in packet.decode():
                    if picture.is_corrupt or number == lost:
                        raise UnreadableError(_damage(number))
                    if number in wanted or not (wanted or number % options.stride):
                        yield number, _pixels(picture)
                    number += 1
                if wanted and number > max(wanted):
                    return
            if cut and (number < stream.frames or not stream.frames):
                raise UnreadableError(_damage(number))
            # AVI also lists frames that were dropped in recording; other containers list none, or those present.
            if kind != "avi" and number + left_out < (listed if kind == "mov" else stream.frames):
                raise UnreadableError(_damage(number))
    except _ERRORS as error:
        raise UnreadableError(_damage(number)) from error
    if not number:
        raise UnreadableError("no frames in it")


def _damage(number: int) -> str:
    return f"damaged or cut off after {number} frames" if number else "cannot be decoded"


def _count(url: str, kind: str) -> int:
    with _opened(url, kind) as clip:
        return sum(packet.size > 0 for packet in clip.demux(clip.streams.video[0]))


def _opened(url: str, kind: str) -> Any:
    """Opens the container, checked and ready to decode."""
    # The format is given: if left to guess, FFmpeg would also open playlists, which refer to other files and hosts.
    options = {"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "file"}
    clip = av.open(url, format=kind, metadata_errors="ignore", options=options)
    try:
        if not clip.streams.video:
            raise UnreadableError("no video in it")
        decoder = clip.streams.video[0].codec_context
        if decoder is None:
            raise UnreadableError("coded in a way that is not known")
        if not (decoder.width and decoder.height):  # also 0 if there are more than `max_pixels`
            raise UnreadableError(f"declares no size, or more than {MAX_PIXELS // 1_000_000} million pixels")
        check_size(decoder.width, decoder.height)
        decoder.thread_type, decoder.thread_count = "NONE", 1  # files are processed in parallel
        # Errors are raised rather than concealed, and frames that grow within a clip are refused before allocation.
        decoder.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
        if kind == "gif":
            decoder.options |= {"trans_color": "0"}  # black behind transparent pixels, not white
    except BaseException:
        clip.close()
        raise
    return clip


def _pixels(picture: Any) -> np.ndarray:
    check_size(picture.width, picture.height)
    pixels = picture.to_ndarray(format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(pixels, round(picture.rotation / 90)))
