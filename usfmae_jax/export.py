"""Export the weights of a run, finished or not, to other formats; every export is verified.

    python -m usfmae_jax.export --checkpoint=runs/pretrain-tiny
    python -m usfmae_jax.export --checkpoint=runs/pretrain-tiny --step=1500 --output=encoder-1500
    python -m usfmae_jax.export --checkpoint=runs/pretrain-tiny --format=hf --output=weights/tiny-hf

  safetensors  our own directory format, for usfmae_jax.load_encoder and --config.init
  timm         loads into timm.create_model, with strict=True
  hf           loads with ViTModel.from_pretrained and, with a decoder, ViTMAEForPreTraining.from_pretrained
  mae          the parameter names of the original MAE code, decoder included; also a .pth if PyTorch is installed
  onnx         uint8 images in; class token, mean patch feature and patch grid out; for a classifier probabilities, for
               a segmenter the class and the probabilities of each pixel
  stablehlo    the same, for jax.export.deserialize and other compilers

Written with the weights: preprocessing, lineage, a model card, and export.json with the largest difference between the
outputs of model and export on the same images. timm, hf, mae and onnx are compared if their packages are installed:
pip install '.[interop]' in the folder of usfmae_jax.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from usfmae_jax import __version__, files
from usfmae_jax.errors import DONE, InputError, Parser, answer, visible_output
from usfmae_jax.weights import find

if TYPE_CHECKING:
    from usfmae_jax.interop.model import Model

FORMATS = ("safetensors", "timm", "hf", "mae", "onnx", "stablehlo")
_WEIGHTS = ("model.safetensors", "mae.pth", "model.onnx", "model.onnx.data", "model.stablehlo")
_JSON = ("architecture", "config", "export", "lineage", "preprocessing", "preprocessor_config")
#: What an output folder of this command may hold.
WRITTEN = (*_WEIGHTS, "README.md", *(f"{name}.json" for name in _JSON))


@visible_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser("usfmae_jax.export", __doc__ or "")
    say = "workdir of a run, encoder or classifier directory, or usfmae-tiny"
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=say)
    parser.add_argument("--step", type=int, help="of a run; default: the newest checkpoint")
    parser.add_argument("--format", default="safetensors", choices=FORMATS, help="default: %(default)s")
    parser.add_argument("--output", metavar="DIR", help="default: WORKDIR/encoder (or classifier), or DIR-FORMAT")

    def act() -> int:
        args = parser.parse_args(argv)
        export(args.checkpoint, args.output, args.step, args.format)
        return DONE

    return answer(act)


def export(checkpoint: str, output: str | None = None, step: int | None = None, form: str = "safetensors") -> None:
    """Exports weights, and prints where they are and how far their outputs are from those of the model.

    Args:
      checkpoint: workdir of a run, or output of `usfmae_jax.convert`, an encoder or classifier directory, or the name
        of included weights.
      output: directory; default `<workdir>/encoder` for safetensors, `<checkpoint>-<format>` for others.
      step: checkpoint of a run; default is the newest.
      form: one of `FORMATS`.

    Raises:
      InputError: there is no such run or checkpoint, the format cannot represent the model, a package is missing, or
        the output holds something else; or the export differs from the model, and then no weights are left.
    """
    from usfmae_jax.interop import card, files, verify, writing  # only once the flags are known to be valid
    from usfmae_jax.interop.model import is_pretraining, open_model

    output = output or _default_output(checkpoint, form)
    files.check_output(output, WRITTEN)
    _check_replaces_its_own(output, form)
    in_training = is_pretraining(checkpoint)
    if step is not None and not in_training:
        raise InputError(f"--step={step}: {checkpoint} is not the workdir of a run, so it has no steps to choose from")
    model = open_model(checkpoint, step, whole=True)
    network = model.description["model"]
    if network not in ("vit", "unet") or (network == "unet" and form not in ("safetensors", "onnx", "stablehlo")):
        others = ", and a U-Net to safetensors, onnx and stablehlo" if network == "unet" else ""
        raise InputError(f"{checkpoint} holds a {network}; only vision transformers can be exported{others}")
    if model.kind == "model" and form in ("timm", "hf", "mae"):
        raise InputError(
            f"{checkpoint} has a head for another task than classification, which {form} has no place for; use "
            "--format=safetensors, onnx or stablehlo"
        )
    decoder = model.description.get("decoder", {}).get("kind")
    if decoder and form in ("hf", "mae"):
        raise InputError(
            f"{checkpoint} was pretrained with a {decoder} decoder, which {form} has no place for; export its "
            "encoder/, or use another format"
        )
    said = "encoder" if model.kind in ("encoder", "mae") else model.kind
    if in_training and model.lineage:
        said += f" after step {model.lineage[-1]['step']}"
    if model.kind == "encoder" or (model.kind == "mae" and form not in ("hf", "mae")):
        model = model.encoder()
    verify.share(model.params)
    os.makedirs(output, exist_ok=True)
    if form == "safetensors":  # replaces an earlier export by a rename
        writing.WRITERS[form](model, output)
        result = verify.compare_parameters(model, output)
    else:
        _remove_weights(output)  # so that an interrupted export leaves none beside an older export.json
        images = verify.sample_images(model)
        ours = verify.expected(model, images)
        writing.WRITERS[form](model, output)
        model = dataclasses.replace(model, params={})  # makes room in memory for what the other library loads
        if form == "mae":
            writing.add_pth(output)
        result = verify.compare_outputs(form, model, output, images, ours)
    described = {
        "architecture": model.description["encoder" if network == "vit" else "unet"],
        "decoder": model.description.get("decoder"),
        "pool": model.description.get("pool", ""),
        "classes": model.description.get("classes", []),
    }
    if model.kind == "model":
        described |= {
            name: model.description[name] for name in ("outputs", "head", "scale") if name in model.description
        }
    about = {"format": form, "code": f"usfmae_jax {__version__}", "model": described, **result}
    parity = {name: about.get(name) for name in ("format", "code", "largest_difference", "runtime", "not_compared")}
    writing.write_preprocessing(model, output)
    writing.write_json(output, "export.json", about)
    writing.write_json(output, "lineage.json", {"stages": model.lineage, "export": parity})
    card.write_card(model, form, output, about)
    if any(value > about["limits"][name] for name, value in about.get("differences", {}).items()):
        _remove_weights(output)
        raise InputError(_too_far(model, form, output, about))
    compared = (
        about.get("not_compared") or f"largest difference {about['largest_difference']:.1e} with {about['runtime']}"
    )
    print(f"{said}: {output} ({compared})", file=sys.stderr)


def _too_far(model: "Model", form: str, output: str, about: dict[str, Any]) -> str:
    from usfmae_jax.models.layers import NORM_EPS

    eps = model.description.get("encoder", {}).get("norm_eps", NORM_EPS)
    what = "please report it with the versions of your packages"
    if form in ("timm", "mae") and eps != NORM_EPS:  # they have no setting for it
        what = (
            f"its layer norms add {eps:g} to the variance and those of {form} {NORM_EPS:g}; export it to hf, onnx "
            f"or stablehlo, or convert it once more with --norm_eps={NORM_EPS:g}"
        )
    return (
        f"the export to {form} is {about['largest_difference']:.2g} off the model, more than {about['limit']:g}; its "
        f"weights are removed, and {output}/export.json has the numbers: {what}"
    )


def _remove_weights(output: str) -> None:
    for name in _WEIGHTS:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(output, name))


def _default_output(checkpoint: str, form: str) -> str:
    inside = os.path.exists(os.path.join(find(checkpoint), "architecture.json"))
    if form == "safetensors" and not inside:
        fine_tuned = any(os.path.isdir(os.path.join(checkpoint, name)) for name in ("classifier", "members"))
        kind = "classifier" if fine_tuned else "encoder"
        return os.path.join(checkpoint, kind)
    return f"{os.path.normpath(checkpoint)}-{form}"


def _check_replaces_its_own(output: str, form: str) -> None:
    """Raises InputError if a folder holds weights that are not an earlier export to the same format."""
    if not os.path.isdir(output) or not os.listdir(output):
        return
    try:
        with open(os.path.join(output, "export.json"), "rb") as file:
            earlier = files.parse(file.read())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        # The encoder that a run writes has no export.json.
        ours = os.path.exists(os.path.join(output, "architecture.json"))
        earlier = "safetensors" if ours else "something else"
    if earlier != form:
        raise InputError(
            f"--output={output} holds weights already ({earlier}), not an export to {form}; name a new folder"
        )


if __name__ == "__main__":
    sys.exit(main())
