"""The tree that builds are made from."""

import pytest

from tests.data_prep.builds import picture, write


@pytest.fixture
def tree(tmp_path):
    """Six images in two class folders, two of them in other formats, and files that are none."""
    root = tmp_path / "My Images-2"
    for number, name in enumerate(["b/1.png", "b/2.jpg", "b/3.bmp", "a/1.png", "a/2.TIF", "a/deep/3.png"]):
        write(root / name, picture(number))
    (root / "README.md").write_text("text")
    (root / "b/.hidden.png").write_text("text")
    return root
