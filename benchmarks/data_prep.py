"""How fast files become records: every reader, cleaning and the whole build, compared with plain library loops.

    python -m benchmarks.data_prep [--frames=96] [--rounds=5]

Simulated frames of about 512 x 700 pixels are first written in each format. One thread, so that the figures are
images/s/core; the methods take turns. "Read" is files to pixels, compared with what a script would use (Pillow,
pydicom, PyAV, SimpleITK, h5py). "Stored" is all of our work up to a record, including two hashes for duplicates;
"cleaned" also finds the sector and annotations. The plain loop resizes and encodes what it reads, with Pillow. Memory
is the peak of a new process that reads a clip or volume of ten times as many frames, less the peak for two frames.
"""

import argparse
import functools
import io
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np
from PIL import Image

from data_prep import phantom
from data_prep.find.files import Item
from data_prep.readers import Options, read_frames
from data_prep.work import Storage, process

_SIZE = 512
_LONG = 10  # times as many frames, for memory


def _simulate(count: int) -> list[np.ndarray]:
    """Simulates frames of one shape, so that they can also form a clip and a volume."""
    frames: list[np.ndarray] = []
    patient = 0
    while len(frames) < count:
        found = [one.image for one in phantom.simulate_patient(patient, image_size=_SIZE, frames=4)]
        if not frames or found[0].shape == frames[0].shape:
            frames += found
        patient += 1
    return frames[:count]


def _write_all(folder: pathlib.Path, frames: list[np.ndarray]) -> dict[str, list[str]]:
    """Writes the frames in every format; returns the file names by format."""
    stack = np.stack(frames)
    files: dict[str, list[str]] = {}
    for suffix in ("png", "jpg"):
        files[suffix] = [f"{number}.{suffix}" for number in range(len(frames))]
        for name, frame in zip(files[suffix], frames, strict=True):
            cv2.imwrite(str(folder / name), frame)
    for prefix, some in (("tiny_", frames[:2]), ("long_", frames * _LONG)):
        _write_dicom(folder / f"{prefix}raw.dcm", np.stack(some), rle=False)
        _write_video(folder / f"{prefix}clip.mp4", some)
        _write_volume(folder / f"{prefix}volume.nii", np.stack(some))
        _write_hdf5(folder / f"{prefix}stack.h5", np.stack(some))
    _write_dicom(folder / "raw.dcm", stack, rle=False)
    _write_dicom(folder / "rle.dcm", stack, rle=True)
    _write_video(folder / "clip.mp4", frames)
    _write_volume(folder / "volume.nii", stack)
    _write_hdf5(folder / "stack.h5", stack)
    return files | {
        "DICOM, uncompressed": ["raw.dcm"],
        "DICOM, RLE": ["rle.dcm"],
        "mp4": ["clip.mp4"],
        "NIfTI": ["volume.nii"],
        "HDF5": ["stack.h5"],
    }


def _write_dicom(path: pathlib.Path, stack: np.ndarray, rle: bool) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, UltrasoundMultiFrameImageStorage, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = UltrasoundMultiFrameImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.Modality, data.PatientID, data.PhotometricInterpretation = "US", "p", "MONOCHROME2"
    data.NumberOfFrames, data.Rows, data.Columns = stack.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    data.PixelData = stack.tobytes()
    if rle:
        data.compress(RLELossless)
    data.save_as(path, enforce_file_format=True)


def _write_video(path: pathlib.Path, frames: list[np.ndarray]) -> None:
    import av

    height, width = (side // 2 * 2 for side in frames[0].shape)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 8_000_000
        for frame in frames:
            rgb = np.ascontiguousarray(np.repeat(frame[:height, :width, None], 3, 2))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())


def _write_volume(path: pathlib.Path, stack: np.ndarray) -> None:
    import SimpleITK

    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(stack), str(path))


def _write_hdf5(path: pathlib.Path, stack: np.ndarray) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=stack, chunks=(1, *stack.shape[1:]), compression="gzip", compression_opts=1)


def _plain_frames(path: str) -> Iterator[np.ndarray]:
    """Reads a file as a short script would; yields uint8 [H, W]."""
    if path.endswith((".png", ".jpg")):
        yield np.asarray(Image.open(path).convert("L"))
    elif path.endswith(".dcm"):
        import pydicom

        yield from pydicom.dcmread(path).pixel_array
    elif path.endswith(".mp4"):
        import av

        with av.open(path) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="gray")
    elif path.endswith(".nii"):
        import SimpleITK

        yield from SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
    else:
        import h5py

        with h5py.File(path) as file:
            yield from file["image"][()]


def _plain_read(paths: Iterable[str]) -> int:
    return sum(1 for path in paths for _ in _plain_frames(path))


def _plain(paths: Iterable[str]) -> int:
    count = 0
    for path in paths:
        for frame in _plain_frames(path):
            image = Image.fromarray(frame)
            scale = 256 / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
            image.save(io.BytesIO(), "JPEG", quality=95)
            count += 1
    return count


def _ours(paths: Iterable[str], clean: bool) -> int:
    how = Storage("benchmark", clean=clean)
    return sum(1 for path in paths for _ in process(Item(os.path.basename(path)), os.path.dirname(path), how))


def _read(paths: Iterable[str]) -> int:
    return sum(1 for path in paths for _ in read_frames(path, Options()))


def _speed(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def _peak_memory(module: str, path: pathlib.Path) -> float:
    """Peak memory in MB for reading a long file, less that for a file of two frames."""
    peaks = []
    for prefix in ("tiny_", "long_"):
        call = [sys.executable, "-m", "benchmarks.data_prep", f"--peak={module}"]
        call += [f"--path={path.with_name(prefix + path.name)}"]
        peaks.append(float(subprocess.run(call, capture_output=True, text=True, check=True).stdout))
    return peaks[1] - peaks[0]


def _print_peak(module: str, path: str) -> None:
    for _ in read_frames(path, Options()) if module == "ours" else _plain_frames(path):
        pass
    # Not getrusage: its maximum includes that of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024)  # type: ignore[index]


def _scaling(folder: pathlib.Path, rounds: int) -> list[float]:
    """Speed of the whole build with two workers relative to one, sorted, one ratio per round."""
    ratios = []
    for _ in range(rounds):
        seconds = []
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as output:
                call = [sys.executable, "-m", "data_prep.build", "--dataset=folder", f"--input={folder}"]
                call += [f"--output={output}", "--name=scaling", f"--workers={workers}"]
                start = time.perf_counter()
                subprocess.run(call, capture_output=True, check=True)
                seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return sorted(ratios)


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)  # for child processes of this benchmark
    parser.add_argument("--path", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        _print_peak(args.peak, args.path)
        return
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        frames = _simulate(args.frames)
        files = _write_all(folder, frames)
        print(
            f"{args.frames} frames of {frames[0].shape[1]} x {frames[0].shape[0]}, one thread, {args.rounds} rounds\n"
        )
        print(
            "| format | read | plain read | ratio (min, median, max) | stored | cleaned | plain loop | MB | plain MB |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for kind, names in files.items():
            print(_row(kind, [str(folder / name) for name in names], args.rounds), flush=True)
        images = folder / "images"
        images.mkdir()
        for name in files["png"]:
            for copy in range(12):
                shutil.copy(folder / name, images / f"{copy}_{name}")
        ratios = _scaling(images, args.rounds)
        print(f"\nTwo workers over one: {ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}")


def _row(kind: str, paths: list[str], rounds: int) -> str:
    """The row of one format in the table."""
    works = {
        "read": functools.partial(_read, paths),
        "plain read": functools.partial(_plain_read, paths),
        "stored": functools.partial(_ours, paths, clean=False),
        "cleaned": functools.partial(_ours, paths, clean=True),
        "plain loop": functools.partial(_plain, paths),
    }
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(rounds + 1):
        for name, work in works.items():
            speed = _speed(work)
            if round_number:  # the first round is the warm-up
                speeds[name].append(speed)
    ratios = sorted(a / b for a, b in zip(speeds["read"], speeds["plain read"], strict=True))
    read, plain_read, *rest = (f"{statistics.median(values):,.0f}" for values in speeds.values())
    spread = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
    path = pathlib.Path(paths[0])
    is_long = path.with_name(f"long_{path.name}").exists()
    memory = [f"{_peak_memory(module, path):,.0f}" if is_long else "" for module in ("ours", "plain")]
    return "| " + " | ".join([kind, read, plain_read, spread, *rest, *memory]) + " |"


if __name__ == "__main__":
    main()
