"""Recognises kinds of files by their first bytes, and lists the suffixes that a folder is searched for."""

import re
import struct
import zlib

#: Suffixes in lower case. DICOM files often have none; the data files of .mhd and .nhdr headers are not listed.
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mpg", ".mpeg", ".m2v", ".ts", ".mkv", ".webm", ".wmv", ".asf", ".gif"}
)
VOLUMES = frozenset({".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"})
ARRAYS = frozenset({".npy", ".npz", ".mat", ".h5", ".hdf5"})
DICOM = frozenset({".dcm", ".dicom", ".ima", ""})

HEAD_BYTES = 4104

#: Value representations of DICOM (PS3.5, 6.2).
VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_MAX_FIRST = 1 << 20  # bytes, longest element at the beginning of a file

_TS_PACKET = 188
_HDF5 = b"\x89HDF\r\n\x1a\n"
_USER_BLOCKS = 0, 512, 1024, 2048, 4096  # bytes before the signature; MATLAB writes 512
_PNG = b"\x89PNG\r\n\x1a\n"
_BITMAP_HEADERS = 12, 16, 40, 52, 56, 64, 108, 124  # bytes; text files may begin with BM, too
_QUICKTIME = b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"
_META_IMAGE = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=")


def kind_of(head: bytes) -> str:
    """The module of this package that reads a file, given its first `HEAD_BYTES` bytes (or all, if it is shorter).

    Returns:
      "images", "video", "volumes", "arrays", "dicom", or "" if the file cannot be read.
    """
    # The most specific signatures first: a preamble or user block may begin like a file of another kind.
    if head[128:132] == b"DICM":
        return "dicom"
    if any(head.startswith(_HDF5, block) for block in _USER_BLOCKS):
        return "arrays"
    if video_container(head):
        return "video"
    if head.startswith((_PNG, b"\xff\xd8\xff", b"II*\0", b"MM\0*")):
        return "images"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BITMAP_HEADERS:
        return "images"
    if head.startswith(b"\x1f\x8b"):
        return "volumes" if _is_nifti(_gunzip(head)) else ""
    if head.startswith(b"NRRD000") or _META_IMAGE.match(head) or _is_nifti(head):
        return "volumes"
    if head.startswith((b"\x93NUMPY", b"MATLAB 5.0 MAT-file")):
        return "arrays"
    if head.startswith(b"PK\3\4") and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy"):
        return "arrays"
    # DICOM without a preamble: the first elements must be valid and in order, in one of three encodings.
    return "dicom" if any(_begins(head, *how) for how in (("<", False), ("<", True), (">", False))) else ""


def _begins(head: bytes, order: str, implicit: bool) -> bool:
    position, last = 0, -1
    for count in range(3):
        if position + 12 > len(head):
            return count == 2
        group, element = struct.unpack_from(order + "HH", head, position)
        tag = group << 16 | element
        if tag <= last or group not in (0x0002, 0x0008) or element > 0x2000:
            return False
        (length,) = struct.unpack_from(order + "I", head, position + 4)
        if not implicit:
            vr = head[position + 4 : position + 6]
            if vr not in VRS:
                return False
            (length,) = struct.unpack_from(order + ("4xI" if vr in _LONG_VRS else "2xH"), head, position + 4)
            position += 4 if vr in _LONG_VRS else 0
        if length % 2 or length > _MAX_FIRST:
            return False
        position, last = position + 8 + length, tag
    return True


def video_container(head: bytes) -> str:
    """FFmpeg's name for the container of a video, given its first bytes; "" if it is none."""
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(_PNG):
        return "apng" if b"acTL" in head[: head.find(b"IDAT")] else ""
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
    return "asf" if head.startswith(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11") else ""


def _gunzip(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")
