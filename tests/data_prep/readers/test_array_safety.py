"""NumPy, MATLAB and HDF5 files are not trusted: nothing in them is run, followed or unpacked without end."""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest

from data_prep.readers import UnreadableError, read_frames
from tests.data_prep.readers.test_arrays import CLIP, grey, hdf5, mat, read

h5py = pytest.importorskip("h5py")


class Trap:
    def __reduce__(self):
        return open, ("sprung", "w")


def test_pickled_objects_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = np.full((20, 20), Trap(), object)
    np.save("a.npy", trap, allow_pickle=True)
    np.savez("a.npz", image=trap)
    for name, key in (("a.npy", ""), ("a.npz", ""), ("a.npz", "image")):
        with pytest.raises(UnreadableError, match=r"no array that can be frames|no integers"):
            read(name, key=key)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap())).close()  # it would have worked
    assert (tmp_path / "sprung").exists()


def npy_header(shape, dtype="|u1"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((10**6, 1000, 1000), "cut off"),
        ((100_000, 100_000), "more than 50 million"),
        ((-5, 100, 100), "damaged"),
        ((0, 1000, 1000), "cut off"),  # not one frame of how many there may be
        ((0, 100), "no array"),
        ((2, 3, 4, 100, 100), "no array"),
        ((), "no array"),
    ],
)
def test_shapes_that_a_file_cannot_hold_are_refused_before_they_are_read(tmp_path, shape, reason):
    (tmp_path / "a.npy").write_bytes(npy_header(shape) + bytes(100_000))
    with pytest.raises(UnreadableError, match=reason):
        read(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "header", ["{'descr'", "[" * 9000, "{}", "{'descr': '|u1', 'fortran_order': False, 'shape': 3}"]
)
def test_a_damaged_header_is_refused(tmp_path, header, capfd):
    text = header.encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    with pytest.raises(UnreadableError, match="header is damaged"):
        read(tmp_path / "a.npy")
    assert capfd.readouterr() == ("", "")


def test_a_bomb_in_an_archive_is_not_unpacked_without_end(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", npy_header((10**5, 48, 64)) + CLIP.tobytes())
    np.testing.assert_array_equal(grey(tmp_path / "a.npz"), CLIP)  # what is there, and memory for no more
    monkeypatch.setattr("data_prep.readers.stacks._HELD", 10_000)
    assert next(read_frames(tmp_path / "a.npz")).number == 0  # read as it is unpacked
    monkeypatch.setattr("data_prep.readers.stacks._MAX_UNPACKED", 300_000_000)
    with pytest.raises(UnreadableError, match="compressed, and not known to be up to"):
        read(tmp_path / "a.npz")


def test_a_bomb_in_a_matlab_file_is_refused_before_it_is_unpacked(tmp_path):
    path = mat(tmp_path / "a.mat", CLIP[0], packed=True)
    data = path.read_bytes()
    matrix = bytearray(zlib.decompress(data[136:]))
    at = matrix.index(struct.pack("<II", 5, 8)) + 8  # the dimensions
    struct.pack_into("<ii", matrix, at, 40_000, 50_000)
    struct.pack_into("<I", matrix, matrix.index(struct.pack("<II", 2, 3072)) + 4, 2_000_000_000)
    packed = zlib.compress(bytes(matrix) + bytes(10**6))
    path.write_bytes(data[:128] + struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(UnreadableError, match="more than 50 million"):
        read(path)


def test_hdf5_reads_no_other_file(tmp_path):
    secret = hdf5(tmp_path / "secret.h5", image=CLIP)
    (tmp_path / "secret.raw").write_bytes(CLIP.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink(str(secret), "image")
        file["soft"] = h5py.SoftLink("/link")
        file.create_dataset("stored", CLIP.shape, "u1", external=[(str(tmp_path / "secret.raw"), 0, CLIP.nbytes)])
        layout = h5py.VirtualLayout(CLIP.shape, "u1")
        layout[:] = h5py.VirtualSource(str(secret), "image", CLIP.shape)
        file.create_virtual_dataset("virtual", layout)
    for key in ("link", "soft", "link/image"):
        with pytest.raises(UnreadableError, match="no array of the name"):
            read(tmp_path / "a.h5", key=key)
    for key in ("stored", "virtual"):
        with pytest.raises(UnreadableError, match="lie in other files"):
            read(tmp_path / "a.h5", key=key)


def test_hdf5_that_was_never_written_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", CLIP.shape, "u1", chunks=(2, 48, 64))
    with pytest.raises(UnreadableError, match="cut off: nothing of it was written"):
        read(tmp_path / "a.h5")


def test_hdf5_that_is_packed_in_a_way_without_a_plug_in_says_so(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=CLIP, compression="lzf")
    np.testing.assert_array_equal(grey(tmp_path / "a.h5"), CLIP)
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    with pytest.raises(UnreadableError, match="not supported, without a plug-in"):
        read(tmp_path / "a.h5")


def test_a_chunk_that_unpacks_to_more_than_it_says_ends_at_the_memory_of_a_worker(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("image", CLIP.shape, "u1", chunks=(1, 48, 64), compression="gzip")
        dataset[:] = CLIP
        dataset.id.write_direct_chunk((3, 0, 0), zlib.compress(bytes(600_000_000), 1))
    code = (
        "import resource; from data_prep.readers import hdf5, read_frames, UnreadableError\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (400_000_000, 400_000_000))\n"
        f"frames, count = read_frames({str(tmp_path / 'a.h5')!r}), 0\n"
        "try:\n"
        "    for frame in frames: count += 1\n"
        "except UnreadableError as error: print(count, error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "3 damaged or cut off\n"
