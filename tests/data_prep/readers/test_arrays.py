"""NumPy, MATLAB and HDF5 arrays: where their frames are, which array is taken, and that memory stays flat."""

import numpy as np
import pytest
import scipy.io

from data_prep.readers import Options, UnreadableError, arrays, read_frames, stacks
from tests.data_prep.readers import samples

h5py = pytest.importorskip("h5py")

CLIP = samples.scene(frames=7)
DEEP = CLIP.astype(np.int16) * 100 - 5000
COLOUR = np.repeat(CLIP[..., None], 3, axis=-1)
COLOUR[:, 20:30, 20:30] = 200, 30, 40


def read(path, **options):
    return list(read_frames(path, Options(**options)))


def grey(path, **options):
    return np.stack([frame.pixels[:, :, 0] for frame in read(path, **options)])


def hdf5(path, matlab=False, **datasets):
    how = {"userblock_size": 512} if matlab else {}
    with h5py.File(path, "w", **how) as file:
        for name, data in datasets.items():
            file[name] = data.T if matlab else data
            if matlab:
                file[name].attrs["MATLAB_class"] = np.bytes_(data.dtype.name.replace("bool", "logical"))
    if matlab:
        with path.open("r+b") as file:
            file.write(b"MATLAB 7.3 MAT-file")
    return path


def npy(path, data):
    np.save(path, data)
    return path


def npz(path, data, save=np.savez):
    save(path, image=data)
    return path


def mat(path, data, packed=False):
    scipy.io.savemat(path, {"image": data}, do_compression=packed)
    return path


FRAMES_FIRST = {
    "a.npy": npy,
    "a.npz": npz,
    "z.npz": lambda path, data: npz(path, data, np.savez_compressed),
    "a.h5": lambda path, data: hdf5(path, image=data),
}
FRAMES_LAST = {
    "a.mat": mat,
    "z.mat": lambda path, data: mat(path, data, packed=True),
    "h.mat": lambda path, data: hdf5(path, matlab=True, image=data),
}


@pytest.mark.parametrize("name", [*FRAMES_FIRST, *FRAMES_LAST])
def test_frames_are_along_the_first_axis_in_numpy_and_hdf5_and_the_last_in_matlab(tmp_path, name):
    last = name in FRAMES_LAST
    path = (FRAMES_LAST if last else FRAMES_FIRST)[name](tmp_path / name, CLIP.transpose(1, 2, 0) if last else CLIP)
    for axis in range(3):
        np.testing.assert_array_equal(grey(path, axis=axis), np.moveaxis(CLIP, axis, 0))
    assert [frame.number for frame in read(path, stride=3)] == [0, 3, 6]
    assert [frame.number for frame in read(path, max_frames=2)] == [1, 5]


@pytest.mark.parametrize("name", [*FRAMES_FIRST, *FRAMES_LAST])
def test_stills_and_colour_are_told_by_their_shape(tmp_path, name):
    last = name in FRAMES_LAST
    write = (FRAMES_LAST if last else FRAMES_FIRST)[name]
    np.testing.assert_array_equal(grey(write(tmp_path / name, CLIP[0])), CLIP[:1])
    (frame,) = read(write(tmp_path / name, COLOUR[0]))
    np.testing.assert_array_equal(frame.pixels, COLOUR[0])
    frames = read(write(tmp_path / name, COLOUR.transpose(1, 2, 3, 0) if last else COLOUR))
    np.testing.assert_array_equal([frame.pixels for frame in frames], COLOUR)
    single = CLIP[:, None] if not last else CLIP.transpose(1, 2, 0)[:, :, None]  # [N, 1, H, W]; H x W x 1 x N
    np.testing.assert_array_equal(grey(write(tmp_path / name, single)), CLIP)


@pytest.mark.parametrize("dtype", ["<i2", ">u2", "<f4", ">f8", "<i8"])
def test_other_numbers_than_8_bits_share_one_window(tmp_path, dtype):
    deep = (DEEP - DEEP.min()).astype(dtype)
    deep[3] //= 5  # a dark frame should stay dark
    expected = np.rint(255 * np.clip(deep / np.percentile(deep, 99.9), 0, 1).astype(float))
    for path in (
        npy(tmp_path / "a.npy", deep),
        npz(tmp_path / "a.npz", deep),
        hdf5(tmp_path / "a.h5", image=deep),
        mat(tmp_path / "a.mat", deep.transpose(1, 2, 0)),
    ):
        np.testing.assert_allclose(grey(path), expected, atol=3)


def test_arrays_in_fortran_order_are_the_same_arrays(tmp_path):
    for data in (CLIP, CLIP[0], COLOUR[0]):
        expected = read(npy(tmp_path / "c.npy", data))
        found = read(npy(tmp_path / "f.npy", np.asfortranarray(data)))
        for one, two in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.pixels, two.pixels)
    last = npy(tmp_path / "f.npy", np.asfortranarray(CLIP.transpose(1, 2, 0)))
    np.testing.assert_array_equal(grey(last, axis=2), CLIP)
    with pytest.raises(UnreadableError, match="Fortran order"):
        read(npy(tmp_path / "f.npy", np.asfortranarray(COLOUR)))


def several(folder):
    mask = CLIP > 100
    np.savez(folder / "a.npz", image=CLIP, mask=mask.astype(np.uint8), number=np.arange(7), note="text")
    hdf5(folder / "a.h5", image=CLIP, mask=mask.astype(np.uint8), number=np.arange(7), note=b"text")
    turned = {"image": CLIP.transpose(1, 2, 0), "mask": mask.transpose(1, 2, 0).astype(np.uint8)}
    scipy.io.savemat(folder / "a.mat", {**turned, "number": np.arange(7.0), "note": "text", "s": {"a": CLIP}})
    hdf5(folder / "h.mat", matlab=True, **turned)
    return sorted(folder.iterdir())


def test_of_several_arrays_the_key_names_one(tmp_path):
    for path in several(tmp_path):
        with pytest.raises(UnreadableError, match=r"^2 arrays could be frames: say which with the option key$"):
            read(path)
        np.testing.assert_array_equal(grey(path, key="image"), CLIP)
        np.testing.assert_array_equal(grey(path, key="mask"), CLIP > 100)
        with pytest.raises(UnreadableError, match="no array of the name"):
            read(path, key="images")


def test_truth_values_tables_and_texts_are_no_frames(tmp_path):
    mask = (CLIP > 100).transpose(1, 2, 0)
    table = np.zeros((100, 4))
    np.savez(tmp_path / "a.npz", image=CLIP, mask=mask, table=table, note="text")
    hdf5(tmp_path / "a.h5", image=CLIP, mask=mask, table=table, note=b"text")
    image = CLIP.transpose(1, 2, 0)
    scipy.io.savemat(
        tmp_path / "a.mat", {"image": image, "mask": mask, "table": table, "c": image * 1j, "note": "text"}
    )
    hdf5(tmp_path / "h.mat", matlab=True, image=image, mask=mask, table=table)
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(grey(path), CLIP)


def test_an_array_in_a_group_is_named_by_its_path(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scan/one"], file["scan/two"] = CLIP, 255 - CLIP
    np.testing.assert_array_equal(grey(tmp_path / "a.h5", key="scan/two"), 255 - CLIP)


@pytest.mark.parametrize("name", [*FRAMES_FIRST, *FRAMES_LAST])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.97])
def test_an_array_that_is_cut_off_is_refused(tmp_path, name, kept):
    last = name in FRAMES_LAST
    path = (FRAMES_LAST if last else FRAMES_FIRST)[name](tmp_path / name, CLIP.transpose(1, 2, 0) if last else CLIP)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UnreadableError):
        read(path)


def test_chunks_of_hdf5_may_hold_parts_of_several_frames(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=np.concatenate([CLIP] * 4), chunks=(4, 16, 16), compression="gzip")
    np.testing.assert_array_equal(grey(tmp_path / "a.h5"), np.concatenate([CLIP] * 4))


def test_hdf5_whose_numbers_lie_in_its_header_or_have_other_bits_than_those_of_numpy_is_read(tmp_path):
    types, space = h5py.h5t, h5py.h5s.create_simple(CLIP.shape)
    inside = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    inside.set_layout(h5py.h5d.COMPACT)
    twelve = types.STD_I16LE.copy()
    twelve.set_precision(12)  # of which the last is the sign
    for name, kind, how, data in (("a", types.STD_U8LE, inside, CLIP), ("b", twelve, None, CLIP * 16.0 - 2048)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            h5py.h5d.create(file.id, b"image", kind, space, how).write(space, space, data.astype(np.int16))
    np.testing.assert_array_equal(grey(tmp_path / "a.h5"), CLIP)
    low, high = np.percentile(CLIP, [0.1, 99.9])
    np.testing.assert_allclose(grey(tmp_path / "b.h5"), np.clip((CLIP - low) / (high - low), 0, 1) * 255, atol=3)


@pytest.mark.parametrize("name", ["a.npy", "z.npz", "z.mat"])
def test_a_large_array_is_never_in_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(stacks, "_HELD", 10_000)
    last = name in FRAMES_LAST
    path = (FRAMES_LAST if last else FRAMES_FIRST)[name](tmp_path / name, CLIP.transpose(1, 2, 0) if last else CLIP)
    stack = arrays.open_array(path)
    for number, plane in enumerate(stack.planes(range(7))):
        assert plane.base is not None
        assert plane.nbytes == 48 * 64
        np.testing.assert_array_equal(plane, CLIP[number])


@pytest.mark.parametrize("names", [["a_", "a_", "b_"], [b"a_", b"a_", b"b_"], [7, 7, 8]])
def test_hdf5_can_say_whose_each_frame_is(tmp_path, names):
    stack = np.random.default_rng(0).integers(0, 256, (3, 20, 24), np.uint8)
    hdf5(tmp_path / "a.h5", image=stack, owner=names)
    options = Options(key="image", patient_key="owner", stride=2)
    found = [(frame.number, frame.patient) for frame in arrays.read(tmp_path / "a.h5", options)]
    first, last = (name.decode() if isinstance(name, bytes) else str(name) for name in (names[0], names[2]))
    assert found == [(0, first), (2, last)]


@pytest.mark.parametrize("owner", [["one", "two"], None])
def test_a_name_for_each_frame_means_each(tmp_path, owner):
    stack = np.random.default_rng(0).integers(0, 256, (3, 20, 24), np.uint8)
    hdf5(tmp_path / "a.h5", image=stack, **({"owner": owner} if owner else {}))
    with pytest.raises(UnreadableError, match="no names for each"):
        list(arrays.read(tmp_path / "a.h5", Options(key="image", patient_key="owner")))
