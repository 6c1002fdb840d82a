"""Kinds of files, told apart by their first bytes, and the suffixes that a folder is searched for."""

import re
import zlib

#: In lower case. DICOM files often have no suffix; the data files of .mhd and .nhdr headers are not listed.
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mpg", ".mpeg", ".m2v", ".ts", ".mkv", ".webm", ".wmv", ".asf", ".gif"}
)
VOLUMES = frozenset({".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"})
ARRAYS = frozenset({".npy", ".npz", ".mat", ".h5", ".hdf5"})
DICOM = frozenset({".dcm", ".dicom", ".ima", ""})

HEAD_BYTES = 1024

_TS_PACKET = 188
_HDF5 = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK = 512  # of HDF5 that MATLAB writes
_QUICKTIME = b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"
_META_IMAGE = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=")


def kind_of(head: bytes) -> str:
    """The module of this package that reads a file which begins so: its first `HEAD_BYTES` bytes, or all of it.

    Returns:
      "images", "video", "volumes", "arrays", "dicom", or "" for what cannot be read.
    """
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM")):
        return "images"
    if head.startswith(b"\x1f\x8b"):
        head = _gunzip(head)
        return "volumes" if _is_nifti(head) else ""
    if head.startswith(b"NRRD000") or _META_IMAGE.match(head) or _is_nifti(head):
        return "volumes"
    if head.startswith((b"\x93NUMPY", b"MATLAB 5.0 MAT-file", _HDF5)) or head[_USER_BLOCK:].startswith(_HDF5):
        return "arrays"
    if head.startswith(b"PK\3\4") and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy"):
        return "arrays"
    if video_container(head):
        return "video"
    from data_prep.readers import dicom

    return "dicom" if dicom.is_dicom(head) else ""


def video_container(head: bytes) -> str:
    """FFmpeg's name for the container of a video that begins so, or ""."""
    if head[4:8] in _QUICKTIME:
        return "mov"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(b"\0\0\1\xba"):
        return "mpeg"
    if head.startswith(b"\0\0\1\xb3"):
        return "mpegvideo"
    if head[::_TS_PACKET][:3] == b"GGG":
        return "mpegts"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"):
        return "asf"
    return "gif" if head.startswith((b"GIF87a", b"GIF89a")) else ""


def _gunzip(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")
