"""Small files of every kind, made here: of known content for the tests, and to be mutated by the fuzzer."""

import gzip
import pathlib
import struct
import zlib

import cv2
import numpy as np

VIDEOS = {  # name: container, codec, pixel format
    "clip.mp4": ("mp4", "mpeg4", "yuv420p"),
    "clip.mov": ("mov", "mjpeg", "yuvj420p"),
    "clip.avi": ("avi", "mjpeg", "yuvj420p"),
    "clip.mpg": ("mpeg", "mpeg2video", "yuv420p"),
    "clip.ts": ("mpegts", "mpeg2video", "yuv420p"),
    "clip.m2v": ("mpeg2video", "mpeg2video", "yuv420p"),
    "clip.mkv": ("matroska", "mpeg4", "yuv420p"),
    "clip.wmv": ("asf", "wmv2", "yuv420p"),
    "clip.gif": ("gif", "gif", "gray"),
}


def scene(frames=6, height=48, width=64, seed=0):
    """uint8 `[N, H, W]`: speckle that moves down and to the right by one pixel a frame, bright at the top left."""
    noise = np.random.default_rng(seed).integers(0, 256, (height + frames, width + frames), dtype=np.uint8)
    noise = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 10, 190, cv2.NORM_MINMAX)
    clip = np.stack([noise[frames - i : frames - i + height, frames - i : frames - i + width] for i in range(frames)])
    clip[:, : height // 4, : width // 4] = 240
    return clip


def write_video(path, frames, kind=None, rotation=0, index_first=False):
    """Encodes uint8 `[N, H, W]` or RGB `[N, H, W, 3]`, at a quality that keeps grey levels within a few."""
    import av

    container, codec, pixel_format = kind or VIDEOS[f"clip{pathlib.Path(path).suffix}"]
    with av.open(str(path), "w", format=container, options={"movflags": "faststart"} if index_first else {}) as clip:
        stream = clip.add_stream(codec, rate=25, options={"qmin": "1", "qmax": "2"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            rgb = frame if frame.ndim == 3 else np.dstack([frame] * 3)
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
        clip.mux(stream.encode())
    return path


def write_meta_image(path, volume, data_file="LOCAL", packed=False, channels=1, **fields):
    """`[Z, Y, X]` or `[Z, Y, X, C]` as .mha, or as .mhd beside which the data file is written."""
    types = {"u1": "MET_UCHAR", "i2": "MET_SHORT", "u2": "MET_USHORT", "f4": "MET_FLOAT", "f8": "MET_DOUBLE"}
    sizes = volume.shape[: volume.ndim - (channels > 1)][::-1]
    header = {
        "ObjectType": "Image",
        "NDims": len(sizes),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": volume.dtype.byteorder == ">",
        "CompressedData": packed,
        "DimSize": " ".join(map(str, sizes)),
        "ElementNumberOfChannels": channels,
        "ElementType": types[volume.dtype.str[1:]],
        **fields,
        "ElementDataFile": data_file,
    }
    text = "".join(f"{key} = {value}\n" for key, value in header.items()).encode()
    data = zlib.compress(volume.tobytes()) if packed else volume.tobytes()
    path = pathlib.Path(path)
    path.write_bytes(text + (data if data_file == "LOCAL" else b""))
    if data_file != "LOCAL":
        (path.parent / data_file).write_bytes(data)
    return path


def write_nifti(path, volume, order="<", dims=None, kind=None, slope=1.0):
    """`[Z, Y, X]` as .nii or .nii.gz, by hand: the bytes of version 1."""
    kinds = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "u2": 512}
    dims = dims or volume.shape[::-1]
    head = bytearray(352)
    struct.pack_into(order + "i", head, 0, 348)
    struct.pack_into(f"{order}{1 + len(dims)}h", head, 40, len(dims), *dims)
    struct.pack_into(order + "hh", head, 70, kind or kinds[volume.dtype.str[1:]], 8 * volume.dtype.itemsize)
    struct.pack_into(order + "3f", head, 108, 352.0, slope, 0.0)
    head[344:348] = b"n+1\0"
    data = bytes(head) + volume.astype(volume.dtype.newbyteorder(order)).tobytes()
    path = pathlib.Path(path)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_nrrd(path, volume, encoding="raw", data_file="", **fields):
    """`[Z, Y, X]` as .nrrd, or as .nhdr beside which the data file is written."""
    types = {"u1": "uint8", "i2": "short", "u2": "unsigned short", "f4": "float", "f8": "double"}
    header = {
        "type": types[volume.dtype.str[1:]],
        "dimension": volume.ndim,
        "sizes": " ".join(map(str, volume.shape[::-1])),
        "encoding": encoding,
        "endian": "little",
        **fields,
        **({"data file": data_file} if data_file else {}),
    }
    text = "NRRD0004\n# made for a test\n" + "".join(f"{key}: {value}\n" for key, value in header.items())
    data = gzip.compress(volume.tobytes(), mtime=0) if encoding == "gzip" else volume.tobytes()
    path = pathlib.Path(path)
    path.write_bytes(text.encode() + b"note:=nothing\n\n" + (b"" if data_file else data))
    if data_file:
        (path.parent / data_file).write_bytes(data)
    return path


def write_all(folder):
    """One small file or more of every kind that can be read, DICOM aside; returns their paths."""
    import h5py
    import scipy.io

    folder = pathlib.Path(folder)
    clip = scene()
    paths = [write_video(folder / name, clip) for name in VIDEOS]
    for suffix in (".png", ".jpg", ".tif", ".bmp"):
        cv2.imwrite(str(folder / f"still{suffix}"), clip[0])
    cv2.imwritemulti(str(folder / "pages.tif"), list(clip[:3]))
    deep = (clip.astype(np.uint16) * 100)[:4, ::2, ::2]
    write_nifti(folder / "v.nii", deep)
    write_nifti(folder / "v.nii.gz", clip)
    write_meta_image(folder / "v.mha", deep)
    write_meta_image(folder / "z.mha", clip, packed=True)
    write_meta_image(folder / "h.mhd", clip, "h.raw")
    write_nrrd(folder / "v.nrrd", deep)
    write_nrrd(folder / "z.nrrd", deep.astype(np.float32), "gzip")
    np.save(folder / "a.npy", clip)
    np.save(folder / "f.npy", np.asfortranarray(deep))
    np.savez(folder / "a.npz", image=clip, label=3)
    np.savez_compressed(folder / "z.npz", image=deep)
    scipy.io.savemat(folder / "a.mat", {"image": clip.transpose(1, 2, 0)})
    scipy.io.savemat(folder / "z.mat", {"image": deep.transpose(1, 2, 0), "note": "text"}, do_compression=True)
    for name, how in {"a.h5": {}, "z.hdf5": {"compression": "gzip", "shuffle": True, "fletcher32": True}}.items():
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("image", data=clip, **how)
            file.create_dataset("number", data=np.arange(6))
    others = sorted(path for path in folder.iterdir() if path not in paths and path.suffix != ".raw")
    return paths + others
