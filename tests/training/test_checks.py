"""What artefacts may show of what a person gave."""

import pytest

from usfmae_jax.training.checks import public_paths


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/jane/data/x", "x"),
        ("~jane/x", "x"),
        ("~/x/", "x"),
        ("../../home/jane/x", "x"),
        ("./../jane/x", "x"),
        (r"C:\Users\jane\x", "x"),
        ("C:/Users/jane/x", "x"),
        (r"\\server\jane\x", "x"),
        ("/home/jane doe/my x", "my x"),
        ("data /home/jane/x", "x"),
        ("data/a,/home/jane/b , c", "data/a,b,c"),
        ("data/x/*", "data/x/*"),
        ("runs/../x", "x"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("", ""),
    ],
)
def test_of_paths_that_leave_the_folder_only_the_last_part_is_shown(path, shown):
    assert public_paths(path) == shown
