"""Weights by name: the included ones, each a folder beside this file, and where to get others.

README.md describes how they were made, with every command.
"""

import difflib
import os
import pathlib

from usfmae_jax.errors import InputError

FOLDER = pathlib.Path(__file__).parent

#: The included weights.
INCLUDED = ("usfmae-tiny",)
#: Published weights that are not included: where to find their file. `convert` writes a folder of the same name.
ELSEWHERE = {
    "usfmae-base": "the checkpoint that the README of https://github.com/Yusufii9/USF-MAE links to",
    "mae-base": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base_full.pth (CC BY-NC 4.0)",
}


def find(path: str) -> str:
    """The folder of named weights; any other path to a checkpoint is returned unchanged.

    A file, or a folder with a model, of that name in the current directory takes precedence. Any other folder does not:
    it may be the workdir of the very run that starts from these weights.

    Raises:
      InputError: the name is that of weights that are not included or that the installation lacks, or is close to a
        known name.
    """
    path = os.fspath(path)
    included = path in INCLUDED
    if os.path.isfile(path) or (os.path.isdir(path) and (not included or _holds_model(path))):
        return path
    if included:
        if not (FOLDER / path / "model.safetensors").is_file():
            raise InputError(f"the file of {path} is missing from the installed usfmae_jax: install the package again")
        return str(FOLDER / path)
    if path in ELSEWHERE:
        raise InputError(
            f"{path} is not included; download {ELSEWHERE[path]}, and give it to "
            f"python -m usfmae_jax.convert --input=FILE --output={path}, which makes a folder that has this name"
        )
    known, last = [*INCLUDED, *ELSEWHERE], os.path.basename(path.rstrip("/"))
    if last != path or "." in path:
        if last in INCLUDED and "://" not in path and not os.path.isdir(os.path.expanduser(path)):
            raise InputError(f"{path!r} is no folder; the name {last} alone stands for the included weights")
        return path
    word = path.lower()
    if any(word in name.split("-") for name in known) or difflib.get_close_matches(word, known, n=1):
        raise InputError(
            f"{path!r} is neither a folder nor the name of weights: included is {', '.join(INCLUDED)}; for "
            f"{' or '.join(ELSEWHERE)}, that name says where to get the file"
        )
    return path


def _holds_model(folder: str) -> bool:
    return any(next(pathlib.Path(folder).glob(name), None) for name in ("*.safetensors", "*/*.safetensors"))
