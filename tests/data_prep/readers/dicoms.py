"""Small DICOM files for tests, in every encoding that is read."""

import pathlib
import struct

import cv2
import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

NATIVE = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big-endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
}
LOSSLESS = {"rle": uid.RLELossless, "jpeg-ls": uid.JPEGLSLossless, "jpeg 2000": uid.JPEG2000Lossless}
JPEG, EXTENDED_JPEG, LOSSLESS_JPEG = uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLosslessSV1


def dataset(pixels, syntax=uid.ExplicitVRLittleEndian, *, frames=1, stored=None, planar=0, pixel_vr="", **elements):
    """An ultrasound image or clip without compression.

    Args:
      pixels: `[H, W]`, `[H, W, 3]`, or with the frames before, of 8 or 16 bits.
      syntax: one of `NATIVE`.
      frames: how many of them.
      stored: bits that count.
      planar: 1 for one colour plane after the other.
      pixel_vr: OB or OW, by default as the standard has it.
      **elements: by keyword, added or replaced; None removes.
    """
    samples = 3 if pixels.ndim == 3 + (frames > 1) else 1
    bits = 8 * pixels.itemsize
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = uid.UltrasoundImageStorage
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = "1.2.3.4"
    made.Modality = "US"
    made.Rows, made.Columns = pixels.shape[frames > 1 :][:2]
    made.SamplesPerPixel = samples
    made.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        made.PlanarConfiguration = planar
    if frames > 1:
        made.NumberOfFrames = frames
    made.BitsAllocated, made.BitsStored = bits, stored or bits
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    if planar:
        pixels = np.moveaxis(pixels, -1, -3)
    big = syntax == uid.ExplicitVRBigEndian
    data = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    data += b"\0" * (len(data) % 2)
    pixel_vr = pixel_vr or ("OW" if bits == 16 or syntax.is_implicit_VR else "OB")
    if big and bits == 8 and pixel_vr == "OW":
        data = np.frombuffer(data, "<u2").astype(">u2").tobytes()
    made.add_new("PixelData", pixel_vr, data)
    return change(made, **elements)


def change(made, **elements):
    for keyword, value in elements.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    return made


def compressed(pixels, syntax, **options):
    """As `dataset`, compressed without loss by pydicom and its plugins."""
    made = dataset(pixels, **options)
    made.compress(syntax, generate_instance_uid=False)
    return made


def encapsulated(pixels, syntax, streams, *, fragments=1, table=True, **options):
    """As `dataset`, with frames that are compressed already."""
    made = dataset(pixels, frames=len(streams), **options)
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = encapsulate(streams, fragments_per_frame=fragments, has_bot=table)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return made


def save(path, made, preamble=True, meta=True):
    """Writes a data set with the encoding of its transfer syntax; returns the path."""
    if preamble and meta:
        made.save_as(path, enforce_file_format=True)
        return path
    if meta:
        save(path, made)
        path.write_bytes(path.read_bytes()[132:])
        return path
    syntax, made.file_meta = made.file_meta.TransferSyntaxUID, FileMetaDataset()
    made.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return path


def write(folder, pixels, syntax=uid.ExplicitVRLittleEndian, **options):
    return save(pathlib.Path(folder) / "image", dataset(pixels, syntax, **options))


def region(box, spatial=1, kind=1, delta=0.0123456):
    """An item of the sequence of ultrasound regions; `box` as DICOM has it, the last pixel included."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = spatial, kind, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0, item.RegionLocationMaxX1, item.RegionLocationMaxY1 = box
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX, item.PhysicalDeltaY = delta, -delta
    return item


def with_palette(made, palette, first=0, bits=16, packed=False):
    """Turns a grey data set into palette colour; `palette` is integer `[N, 3]`, `packed` puts two entries in a word."""
    made.PhotometricInterpretation = "PALETTE COLOR"
    order = "<" if made.file_meta.TransferSyntaxUID.is_little_endian else ">"
    for colour, entries in zip(("Red", "Green", "Blue"), np.asarray(palette).T, strict=True):
        words = entries.astype(np.uint8).view("<u2") if packed else entries
        change(
            made,
            **{
                f"{colour}PaletteColorLookupTableDescriptor": [len(palette) & 0xFFFF, first, bits],
                f"{colour}PaletteColorLookupTableData": words.astype(order + "u2").tobytes(),
            },
        )
    return made


def jpeg(pixels, quality=95, sampling=cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444, jfif=True):
    """Baseline JPEG of grey or RGB pixels."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    data = cv2.imencode(".jpg", bgr, options)[1].tobytes()
    assert data[2:4] == b"\xff\xe0"
    return data if jfif else data[:2] + data[20:]


def lossless_jpeg(pixels, precision=8):
    """JPEG lossless of grey or colour pixels: the difference to the left neighbour (ITU-T T.81, annex H)."""
    values = pixels.astype(np.int64)
    left = np.empty_like(values)
    left[:, 1:], left[1:, 0], left[0, 0] = values[:, :-1], values[:-1, 0], 1 << (precision - 1)
    bits = []
    for difference in ((values - left + 0x8000) % 0x10000 - 0x8000).ravel().tolist():
        size = abs(difference).bit_length()
        bits.append(f"{size:05b}")  # its Huffman code, all of five bits
        if 0 < size < 16:
            bits.append(f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    components = range(1, 1 + (pixels.shape[2] if pixels.ndim == 3 else 1))
    frame = struct.pack(">BHHB", precision, *pixels.shape[:2], len(components))
    frame += b"".join(bytes([number, 0x11, 0]) for number in components)
    codes = b"\0" + bytes([0, 0, 0, 0, 17, *[0] * 11, *range(17)])
    order = bytes([len(components)]) + b"".join(bytes([number, 0]) for number in components) + b"\x01\x00\x00"
    parts = ((0xC3, frame), (0xC4, codes), (0xDA, order))
    headers = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(body)) + body for marker, body in parts)
    return b"\xff\xd8" + headers + scan + b"\xff\xd9"
