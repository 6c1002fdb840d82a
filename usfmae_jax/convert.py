"""Convert weights from the original MAE, USF-MAE, timm or Hugging Face; PyTorch files or safetensors.

    python -m usfmae_jax.convert --input=mae_pretrain_vit_base_full.pth --output=weights/mae-base
    python -m usfmae_jax.convert --input=checkpoint.pth.tar --output=weights/usfmae --ema
    python -m usfmae_jax.main --config=pretrain --config.init=weights/mae-base --config.data.path=DIR

The format is detected automatically. The output is an encoder directory (encoder/), and for a fine-tuned model a
classifier directory (classifier/), else a checkpoint for --config.init of pretraining, with the decoder if there is
one. No code in the file is executed. PyTorch files need PyTorch: pip install '.[interop]' in the folder of usfmae_jax.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from usfmae_jax import __version__
from usfmae_jax.errors import DONE, InputError, Parser, answer, visible_output

if TYPE_CHECKING:
    from usfmae_jax.interop.files import Source
    from usfmae_jax.interop.model import Model
    from usfmae_jax.interop.reading import Account, Options

#: What an output folder of this command may hold.
WRITTEN = ("checkpoints", "classifier", "config.json", "encoder", "lineage.json")


@visible_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser("usfmae_jax.convert", __doc__ or "")
    parser.add_argument("--input", required=True, metavar="FILE", help="of weights, or a directory with one")
    parser.add_argument("--output", required=True, metavar="DIR", help="new, or an earlier output of this door")
    parser.add_argument("--channels", type=int, default=0, choices=[1, 3], help="change the patch kernel to as many")
    parser.add_argument("--image_size", default="", metavar="N | H,W", help="to use the model on; default: the file's")
    parser.add_argument("--num_heads", type=int, default=0, metavar="N", help="attention heads, if the file is silent")
    parser.add_argument("--decoder_num_heads", type=int, default=0, metavar="N", help="of the decoder")
    parser.add_argument("--mean", default="", metavar="M,M,M", help="of the normalisation; default: the file's")
    parser.add_argument("--std", default="", metavar="S,S,S", help="of the normalisation; default: the file's")
    parser.add_argument("--norm_eps", type=float, default=0, metavar="EPS", help="of the layer norms; 1e-6 is MAE's")
    say = "take the averaged weights that a training script kept beside the plain ones"
    parser.add_argument("--ema", action="store_true", help=say)
    parser.add_argument("--licence", default="", help="of the weights, if the file is silent")
    say = "go on without what is missing or not understood, where that can be"
    parser.add_argument("--allow_partial", action="store_true", help=say)

    def act() -> int:
        args = parser.parse_args(argv)
        convert(args.input, args.output, _options(args), args.licence, averaged=args.ema)
        return DONE

    return answer(act)


def convert(path: str, output: str, options: "Options", licence: str = "", *, averaged: bool = False) -> None:
    """Converts a file, and prints what became of its tensors and where the result is.

    Args:
      path: the file or directory.
      output: directory.
      options: what the file may not state, or what to change.
      licence: licence of the weights; "" = the known one, if any.
      averaged: see `files.open_source`.

    Raises:
      InputError: the file cannot be used, or the output folder holds something else; nothing is written.
    """
    from usfmae_jax.interop.files import check_output, open_source  # only once the flags are known to be valid
    from usfmae_jax.interop.reading import read_model

    check_output(output, WRITTEN)
    source = open_source(path, averaged=averaged)
    model, account = read_model(source, options)
    account.notes += [source.note] * bool(source.note)
    lineage = model.lineage or _origin(path, source, licence, account)
    stage = {
        "job": "convert",
        "code": f"usfmae_jax {__version__}",
        "step": 0,
        "source": {"format": account.origin, "files": list(source.files), "sha256": source.sha256},
        "architecture": model.description["encoder"],
        "notes": account.notes,
    }
    _print(model, account)
    lineage = [*lineage, stage | ({"licence": licence} if licence else {})]
    _write(dataclasses.replace(model, lineage=lineage), output)
    print(f"written to {output}: {', '.join(sorted(set(os.listdir(output)) & set(WRITTEN)))}", file=sys.stderr)


def _options(args: argparse.Namespace) -> "Options":
    from usfmae_jax.interop.reading import Options

    def numbers(name: str, kind: type) -> tuple[Any, ...]:
        text = getattr(args, name)
        try:
            return tuple(kind(part) for part in text.split(",")) if text else ()
        except ValueError as error:
            raise InputError(f"--{name}={text} must be numbers separated by commas") from error

    size = numbers("image_size", int)
    if len(size) > 2 or any(side < 1 for side in size):
        raise InputError(f"--image_size={args.image_size} must be one positive number, or height,width")
    given = {name: getattr(args, name) for name in Options.__dataclass_fields__}
    given |= {"image_size": (size * 2)[:2] or None, "mean": numbers("mean", float), "std": numbers("std", float)}
    return Options(**given)


def _origin(path: str, source: "Source", licence: str, account: "Account") -> list[dict[str, Any]]:
    """The training stage behind weights that carry no lineage, as far as it is known."""
    from usfmae_jax.interop.card import published_stage

    name = os.path.basename(os.path.abspath(path))
    stage = published_stage(name)
    if stage:
        account.notes.append(
            f"licence by the name {name!r}: {stage['licence']}; what starts from these weights inherits it"
        )
        return [stage]
    if not licence:
        account.notes.append(
            "warning: nothing says under which licence these weights are; add --licence='...' if you know"
        )
    return [{"job": "unknown", "code": "not stated", "licence": licence, "data": []}]


def _print(model: "Model", account: "Account") -> None:
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    about = model.description["encoder"]
    size = "x".join(map(str, about["image_size"]))
    said = f"{about['depth']} blocks of width {about['width']}, {size}, patches of {about['patch_size']}"
    say(f"recognised: {account.origin}; {said}")
    say("mapped:     " + ", ".join(f"{count} tensors into the {part}" for part, count in account.used.items()))
    for name, reason in account.left.items():
        say(f"left over:  {name}: {reason}")
    for name in account.unknown:
        say(f"left over:  {name}: not understood")
    for name in account.missing:
        say(f"missing:    {name}")
    if model.kind == "encoder":
        account.notes.append("no decoder in it: pretraining from these weights initialises a fresh one")
    for note in account.notes:
        say(note)


def _write(model: "Model", output: str) -> None:
    from usfmae_jax.interop.checkpoint import save_parameters
    from usfmae_jax.interop.model import save_model, write_lineage

    for old in ("checkpoints", "classifier", "encoder"):  # of an earlier conversion; this one may not replace all
        shutil.rmtree(os.path.join(output, old), ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(output, "config.json"))
    os.makedirs(output, exist_ok=True)
    write_lineage(output, model.lineage)
    save_model(os.path.join(output, "encoder"), model.encoder())
    if model.kind in ("classifier", "model"):
        save_model(os.path.join(output, "classifier"), model)
        return
    about = {"kind": model.kind, "description": model.description, "preprocessing": model.preprocessing}
    settings = model.description["encoder"] | model.description.get("decoder", {})
    settings |= {"mean": model.preprocessing["mean"], "std": model.preprocessing["std"]}
    data = {"channels": model.preprocessing["channels"]}
    config = {"model": settings, "data": data, "preprocessing": model.preprocessing}
    save_parameters(output, model.params, about, config)


if __name__ == "__main__":
    sys.exit(main())
