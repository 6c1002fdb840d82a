"""Ten lines that use an export, for its model card; the tests run them."""

from usfmae_jax.interop.model import Model


def example(model: Model, form: str, beside: bool) -> str:
    """Python that is run in the folder of an export.

    Args:
      model: what was exported.
      form: the format, see `usfmae_jax.export`.
      beside: whether a program's weights lie in `model.safetensors` beside it.
    """
    channels, (height, width) = model.description["encoder"]["channels"], model.preprocessing["image_size"]
    head = "pool" in model.description
    floats = f"x = torch.zeros(2, {channels}, {height}, {width})  # normalised images"
    pixels = f"images = np.zeros((2, {height}, {width}, {model.preprocessing['channels']}), np.uint8)"
    text = {
        "safetensors": _SAFETENSORS,
        "timm": _TIMM + (_TIMM_CLASSIFY if head else _TIMM_FEATURES),
        "hf": _HF_CLASSIFY if head else _HF_FEATURES,
        "mae": _MAE,
        "onnx": _ONNX,
        "stablehlo": _STABLEHLO,
    }[form]
    if form == "safetensors" and head:
        text = _CLASSIFIER
    outputs = "probabilities" if head else "class_token, mean_patch, patch_grid"
    if beside and form == "stablehlo":
        text = text.replace("import numpy as np", "import numpy as np\nimport safetensors.numpy")
    inputs = 'images, safetensors.numpy.load_file("model.safetensors")' if beside else "images"
    words = {
        "INPUTS": inputs,
        "FLOATS": floats,
        "PIXELS": pixels,
        "ARGUMENTS": _timm_arguments(model),
        "OUTPUTS": outputs,
    }
    for word, value in words.items():
        text = text.replace(word, value)
    return text.strip()


def _timm_arguments(model: Model) -> str:
    about, size = model.description["encoder"], tuple(model.preprocessing["image_size"])
    pool = "avg" if model.description.get("pool") == "mean" else "token"
    classes = len(model.description.get("classes", ()))
    return (
        f'"vit_base_patch16_224", num_classes={classes}, global_pool="{pool}", img_size={size},\n'
        f"    patch_size={about['patch_size']}, in_chans={about['channels']}, embed_dim={about['width']}, "
        f"depth={about['depth']},\n    num_heads={about['num_heads']}, mlp_ratio={about['mlp_ratio']},"
    )


_SAFETENSORS = """
import numpy as np
from usfmae_jax import load_encoder

encoder = load_encoder(".")
images = np.zeros((2, 300, 400, 1), np.uint8)  # any size, one or three channels
features = encoder(images)
features.class_token  # [2, D]
features.mean_patch  # [2, D]
features.patch_grid  # [2, rows, columns, D]
"""

_CLASSIFIER = """
from usfmae_jax.interop.model import open_model

model = open_model(".")  # its params, and description, preprocessing and lineage
"""

_TIMM = """
import timm
import torch
from safetensors.torch import load_file

model = timm.create_model(
    ARGUMENTS
)
model.load_state_dict(load_file("model.safetensors"), strict=True)
FLOATS
"""
_TIMM_CLASSIFY = "probabilities = model.eval()(x).softmax(dim=-1)"
_TIMM_FEATURES = "tokens = model.eval().forward_features(x)  # [2, 1 + N, D], the class token first"

_HF_FEATURES = """
import torch
from transformers import ViTModel

model = ViTModel.from_pretrained(".", add_pooling_layer=False).eval()
FLOATS
tokens = model(pixel_values=x).last_hidden_state  # [2, 1 + N, D], the class token first
"""
_HF_CLASSIFY = """
import torch
from transformers import ViTForImageClassification

model = ViTForImageClassification.from_pretrained(".").eval()
FLOATS
probabilities = model(pixel_values=x).logits.softmax(dim=-1)
"""

_MAE = """
from safetensors.torch import load_file

state = load_file("model.safetensors")  # for load_state_dict of the original model
"""

_ONNX = """
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
PIXELS
names = [output.name for output in session.get_outputs()]  # OUTPUTS
outputs = dict(zip(names, session.run(names, {"images": images})))
"""

_STABLEHLO = """
import jax
import numpy as np

with open("model.stablehlo", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
PIXELS
outputs = program.call(INPUTS)  # a dict with OUTPUTS
"""
