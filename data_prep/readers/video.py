"""Clips to frames: MP4, MOV, AVI, MPEG, Matroska, WMV, GIF and animated PNG, decoded by FFmpeg (PyAV) in one thread.

A clip is upright: a rotation by quarter turns that the file asks for is done, as players do it. Pixels stay as they
are, square or not. All frames of a clip are grey, or all are colour (`clips.as_frames`).

A damaged clip gives its sound frames first, and then an UnreadableError that says how many these were, so that the
file is named with its reason. Seen are errors of the decoder, packets that are cut off, fewer frames than MP4 and MOV
list (the decoder passes over some damage), an AVI that is shorter than it says, and a GIF without its end. MPEG
streams, Matroska and WMV list nothing: what is cut off there between two frames is taken for a shorter clip. A number
of frames in the header that differs from the list of them is a warning.
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
_UNKNOWN = 0, 0x7FFFFFFF, 0xFFFFFFFF  # sizes in an AVI that was written as a stream
_ERRORS = (av.FFmpegError, ValueError, IndexError, MemoryError)


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the frames of a clip, one at a time.

    To spread `max_frames` evenly, the frames are first counted: a pass over the file that decodes nothing.

    Raises:
      UnreadableError: not a video, no video in it, too large, damaged or cut off.
    """
    kind, cut = _container(path)
    warnings: list[str] = []
    # With its protocol and as a path, not as an open file: names are not taken for addresses, and it is twice as fast.
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
    return kind, kind == "avi" and said not in _UNKNOWN and said + 8 > size + 1  # a byte of padding may be missing


def _decode(url: str, kind: str, cut: bool, options: Options, warnings: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    number = 0
    try:
        count = _count(url, kind) if options.max_frames or (cut and kind == "gif") else 0
        wanted = set(chosen(count, options)) if options.max_frames else set()  # all at the stride if empty
        # The picture that a cut-off GIF ends in is painted to its end without a word.
        lost = count - 1 if cut and kind == "gif" else -1
        with _opened(url, kind) as clip:
            stream = clip.streams.video[0]
            listed = len(stream.index_entries)
            if stream.frames and listed > 1 and stream.frames != listed and not cut:
                warnings.append(WRONG_COUNT)
            left_out = 0  # by the container itself, whose edit list begins or ends inside the clip
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
            # AVI lists the frames that were dropped in recording, too; the others none, or those that are there.
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
    """The container, checked and ready to decode."""
    # Told what to expect: left to guess, FFmpeg would also open play lists, which name other files and hosts.
    options = {"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "file"}
    clip = av.open(url, format=kind, metadata_errors="ignore", options=options)
    try:
        if not clip.streams.video:
            raise UnreadableError("no video in it")
        decoder = clip.streams.video[0].codec_context
        if decoder is None:
            raise UnreadableError("coded in a way that is not known")
        if not (decoder.width and decoder.height):  # so it is, too, where there are more than `max_pixels`
            raise UnreadableError(f"declares no size, or more than {MAX_PIXELS // 1_000_000} million pixels")
        check_size(decoder.width, decoder.height)
        decoder.thread_type, decoder.thread_count = "NONE", 1  # the parallelism is over files
        # Errors are raised, not painted over; and what grows in the middle of a clip is refused before it is allocated.
        decoder.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
        if kind == "gif":
            decoder.options |= {"trans_color": "0"}  # black behind what is transparent, not white
    except BaseException:
        clip.close()
        raise
    return clip


def _pixels(picture: Any) -> np.ndarray:
    check_size(picture.width, picture.height)
    pixels = picture.to_ndarray(format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(pixels, round(picture.rotation / 90)))
