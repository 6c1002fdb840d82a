"""Export to ONNX: the graph is written node by node from a model's parameters.

A block takes some twenty lines and is always the same, so the graph is written out rather than traced by a converter:
names and shapes are readable, the weights are streamed to the file, and only the `onnx` package is needed.
"""

import math
import os
from typing import Any

import numpy as np

from usfmae_jax.errors import InputError, install
from usfmae_jax.interop import files
from usfmae_jax.interop.model import Model, flatten
from usfmae_jax.models.decoders import level_blocks
from usfmae_jax.models.layers import NORM_EPS
from usfmae_jax.models.queries import DOUBLINGS

#: Old enough for runtimes from 2022, new enough for LayerNormalization.
OPSET = 17


def write_onnx(model: Model, directory: str) -> None:
    """Writes `model.onnx`, with the weights of a large model in `model.onnx.data`.

    Input: `images`, uint8 `[batch, H, W, C]`, any batch size. Outputs, float32 except for `classes`:

    - encoder: `class_token` `[batch, D]`, `mean_patch` `[batch, D]` and `patch_grid` `[batch, rows, columns, D]`
    - classifier, single- or multi-label: `probabilities` `[batch, classes]`
    - segmenter: `classes`, uint8 `[batch, H, W]`, and `probabilities` `[batch, H, W, 1 + C]`, the background first
    - instance segmenter: `probabilities` `[batch, Q, classes]` and `masks` `[batch, Q, H, W]` of each query
    - other heads: `outputs` `[batch, outputs]`, see `stablehlo.inference`

    Raises:
      InputError: the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError(f"--format=onnx needs the package onnx: {install('interop')}") from error
    graph = _Graph(model.description.get("encoder", {}).get("norm_eps", NORM_EPS))
    pixels = _pixels(graph, model)
    outputs = _outputs(graph, model, pixels)
    size, kind = model.preprocessing["image_size"], onnx.TensorProto
    images = onnx.helper.make_tensor_value_info("images", kind.UINT8, ["batch", *size, model.preprocessing["channels"]])
    results = [
        onnx.helper.make_tensor_value_info(n, kind.UINT8 if n == "classes" else kind.FLOAT, ["batch", *shape])
        for n, shape in outputs.items()
    ]
    weights = _weights(graph, os.path.join(directory, "model.onnx.data"))
    nodes = [onnx.helper.make_node(op, i, o, name=o[0], **attributes) for op, i, o, attributes in graph.nodes]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, model.description["model"], [images], results, weights),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="usfmae_jax",
    )
    path = os.path.join(directory, "model.onnx")
    onnx.save(proto, path + ".incomplete")
    os.replace(path + ".incomplete", path)


class _Graph:
    """Collects nodes and weights; every value is named after the node that produces it."""

    def __init__(self, norm_eps: float) -> None:
        self.norm_eps = norm_eps
        self.nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        self.weights: dict[str, np.ndarray] = {}
        self.shapes: dict[str, list[int]] = {}

    def add(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Adds a node with one output."""
        self.nodes.append((op, inputs, [name], attributes))
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        """Adds a float32 constant."""
        self.weights[name] = np.asarray(array, "<f4", order="C")
        return name

    def reshape(self, x: str, shape: list[int], name: str) -> str:
        """Reshapes `x`; 0 keeps a dimension, -1 is inferred."""
        self.shapes[name + ".shape"] = shape
        return self.add("Reshape", [x, name + ".shape"], name)

    def linear(self, x: str, kernel: np.ndarray, bias: np.ndarray, name: str) -> str:
        """`x @ kernel + bias`."""
        product = self.add("MatMul", [x, self.weight(name + ".kernel", kernel)], name + ".product")
        return self.add("Add", [product, self.weight(name + ".bias", bias)], name)

    def norm(self, x: str, scale: np.ndarray, bias: np.ndarray, name: str, eps: float = 0.0) -> str:
        """LayerNorm over the last axis, with the encoder's epsilon unless `eps` is given."""
        inputs = [x, self.weight(name + ".scale", scale), self.weight(name + ".bias", bias)]
        return self.add("LayerNormalization", inputs, name, axis=-1, epsilon=eps or self.norm_eps)

    def spatial(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Applies a node that expects channels second to maps `[batch, h, w, channels]`."""
        first = self.add("Transpose", inputs[:1], f"{name}.in", perm=[0, 3, 1, 2])
        done = self.add(op, [first, *inputs[1:]], f"{name}.out", **attributes)
        return self.add("Transpose", [done], name, perm=[0, 2, 3, 1])

    def conv(self, x: str, kernel: np.ndarray, bias: np.ndarray, name: str, stride: int = 1) -> str:
        """A convolution with JAX's "SAME" padding, for sizes that the stride divides; kernel `[side, side, I, O]`."""
        side = kernel.shape[0]
        before, total = max(side - stride, 0) // 2, max(side - stride, 0)
        pads = [before, before, total - before, total - before]
        weights = [self.weight(f"{name}.kernel", kernel.transpose(3, 2, 0, 1)), self.weight(f"{name}.bias", bias)]
        return self.spatial("Conv", [x, *weights], name, kernel_shape=[side] * 2, strides=[stride] * 2, pads=pads)

    def enlarged(self, x: str, times: tuple[int, int], name: str, linear: bool = False) -> str:
        """Upsamples maps by the factors (down, across): nearest-neighbour, or linear between pixel centres."""
        if times == (1, 1):
            return x
        scales = self.weight(f"{name}.scales", np.array([1, 1, *times], np.float32))
        how: dict[str, Any] = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
        how |= {"nearest_mode": "floor"}
        if linear:
            how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        return self.spatial("Resize", [x, "", scales], name, **how)


def _outputs(graph: _Graph, model: Model, pixels: str) -> dict[str, list[int]]:
    """Adds the model's outputs, from normalised images; their names, and shapes without the batch axis."""
    if model.description["model"] == "unet":
        return _masks(graph, model, _unet(graph, model, pixels))
    if model.task == "instances":
        return _instances(graph, model, pixels)
    last = _tokens(graph, model, pixels)
    if model.kind == "encoder":
        return _features(graph, model, last)
    return _masks(graph, model, _segmenter(graph, model, last, pixels)) if model.segments else _head(graph, model, last)


def _pixels(graph: _Graph, model: Model) -> str:
    """Normalised images, `[batch, H, W, channels]`."""
    mean, std = (np.asarray(model.preprocessing[name], np.float32) for name in ("mean", "std"))
    x = graph.add("Cast", ["images"], "pixels", to=1)
    x = graph.add("Div", [x, graph.weight("white", np.array(255, np.float32))], "intensity")
    x = graph.add("Sub", [x, graph.weight("mean", mean)], "centred")  # a grey channel is broadcast to all
    return graph.add("Div", [x, graph.weight("std", std)], "normalised")


def _tokens(graph: _Graph, model: Model, x: str, queries: np.ndarray | None = None, joined: int = 0) -> str:
    """Tokens before the final norm, `[batch, 1 + N, D]`; those after block I are named `blockI`.

    If given, `queries` `[1, Q, D]` are appended before block number `joined`.
    """
    p, about, (rows, columns) = flatten(model.params), model.description["encoder"], model.grid()
    patch, channels, width = about["patch_size"], about["channels"], about["width"]
    x = graph.reshape(x, [-1, rows, patch, columns, patch, channels], "split")
    x = graph.add("Transpose", [x], "patches", perm=[0, 1, 3, 2, 4, 5])
    x = graph.reshape(x, [-1, rows * columns, patch * patch * channels], "patches.flat")
    x = graph.linear(x, p["encoder.patch_embed.kernel"], p["encoder.patch_embed.bias"], "patch_embed")
    x = graph.add("Add", [x, graph.weight("positions", model.stored_positions()[:, 1:])], "embedded")
    graph.shapes |= {"first": [0], "second": [1], "axis": [1], "one_token": [1, width]}
    batch = graph.add("Shape", [x], "batch_size", start=0, end=1)
    shape = graph.add("Concat", [batch, "one_token"], "class_tokens.shape", axis=0)
    cls = graph.add("Expand", [graph.weight("cls_token", p["encoder.cls_token"]), shape], "class_tokens")
    x = graph.add("Concat", [cls, x], "tokens", axis=1)
    count = 1 + rows * columns
    for i in range(about["depth"]):
        if queries is not None and i == joined:
            count += queries.shape[1]
            graph.shapes["query_tokens"] = [*queries.shape[1:]]
            shape = graph.add("Concat", [batch, "query_tokens"], "queries.shape", axis=0)
            x = graph.add(
                "Concat",
                [x, graph.add("Expand", [graph.weight("queries", queries), shape], "queries.all")],
                "joined",
                axis=1,
            )
        prefix = "encoder.blocks.stack."
        block = {name.removeprefix(prefix): value[i] for name, value in p.items() if name.startswith(prefix)}
        x = _block(graph, x, block, count, about["num_heads"], f"block{i}")
    return x


def _block(graph: _Graph, x: str, p: dict[str, np.ndarray], tokens: int, heads: int, name: str) -> str:
    width = p["norm1.scale"].shape[0]
    y = graph.norm(x, p["norm1.scale"], p["norm1.bias"], f"{name}.norm1")
    y = graph.linear(y, p["attn.qkv.kernel"], p["attn.qkv.bias"], f"{name}.qkv")
    y = graph.reshape(y, [-1, tokens, 3, heads, width // heads], f"{name}.heads")
    y = graph.add("Transpose", [y], f"{name}.by_head", perm=[2, 0, 3, 1, 4])  # [3, batch, heads, tokens, D / heads]
    graph.nodes.append(("Split", [y], [f"{name}.{w}1" for w in "qkv"], {"axis": 0}))
    # Drop the leading axis of one of queries, keys and values; -1 is the batch.
    q, k, v = (graph.reshape(f"{name}.{w}1", [-1, heads, tokens, width // heads], f"{name}.{w}") for w in "qkv")
    k = graph.add("Transpose", [k], f"{name}.k.t", perm=[0, 1, 3, 2])
    scores = graph.add("MatMul", [q, k], f"{name}.scores")
    scale = graph.weight(f"{name}.scale", np.array(math.sqrt(heads / width), np.float32))
    scores = graph.add("Mul", [scores, scale], f"{name}.scaled")
    y = graph.add("MatMul", [graph.add("Softmax", [scores], f"{name}.attention", axis=-1), v], f"{name}.attended")
    y = graph.add("Transpose", [y], f"{name}.by_token", perm=[0, 2, 1, 3])
    y = graph.reshape(y, [-1, tokens, width], f"{name}.merged")
    x = graph.add(
        "Add", [x, graph.linear(y, p["attn.proj.kernel"], p["attn.proj.bias"], f"{name}.proj")], f"{name}.mid"
    )
    y = graph.norm(x, p["norm2.scale"], p["norm2.bias"], f"{name}.norm2")
    y = _gelu(graph, graph.linear(y, p["fc1.kernel"], p["fc1.bias"], f"{name}.fc1"), f"{name}.gelu")
    return graph.add("Add", [x, graph.linear(y, p["fc2.kernel"], p["fc2.bias"], f"{name}.fc2")], name)


def _gelu(graph: _Graph, x: str, name: str) -> str:
    """Exact GELU in the five nodes that runtimes recognise and fuse: x * (1 + erf(x / sqrt 2)) * 0.5."""
    for constant, value in (("root2", math.sqrt(2)), ("one", 1.0), ("half", 0.5)):
        graph.weight(constant, np.array(value, np.float32))
    y = graph.add("Erf", [graph.add("Div", [x, "root2"], f"{name}.divided")], f"{name}.erf")
    y = graph.add("Mul", [x, graph.add("Add", [y, "one"], f"{name}.plus")], f"{name}.product")
    return graph.add("Mul", [y, "half"], name)


def _features(graph: _Graph, model: Model, tokens: str) -> dict[str, list[int]]:
    p, width, (rows, columns) = flatten(model.params), model.description["encoder"]["width"], model.grid()
    x = graph.norm(tokens, p["encoder.norm.scale"], p["encoder.norm.bias"], "norm")
    graph.shapes["end"] = [1 + rows * columns]
    patches = graph.add("Slice", [x, "second", "end", "axis"], "patch_tokens")
    graph.reshape(graph.add("Slice", [x, "first", "second", "axis"], "class_tokens.normed"), [-1, width], "class_token")
    graph.add("ReduceMean", [patches], "mean_patch", axes=[1], keepdims=0)
    graph.reshape(patches, [-1, rows, columns, width], "patch_grid")
    return {"class_token": [width], "mean_patch": [width], "patch_grid": [rows, columns, width]}


def _head(graph: _Graph, model: Model, tokens: str) -> dict[str, list[int]]:
    p, width, (rows, columns) = flatten(model.params), model.description["encoder"]["width"], model.grid()
    graph.shapes["end"] = [1 + rows * columns]
    if model.description["pool"] == "mean":
        patches = graph.add("Slice", [tokens, "second", "end", "axis"], "patch_tokens")
        x = graph.add("ReduceMean", [patches], "mean_patch", axes=[1], keepdims=0)
        x = graph.norm(x, p["head_norm.scale"], p["head_norm.bias"], "head_norm", NORM_EPS)
    else:
        x = graph.norm(tokens, p["encoder.norm.scale"], p["encoder.norm.bias"], "norm")
        x = graph.reshape(graph.add("Slice", [x, "first", "second", "axis"], "class_token"), [-1, width], "pooled")
    if model.task == "multilabel":
        graph.add("Sigmoid", [graph.linear(x, p["head.kernel"], p["head.bias"], "logits")], "probabilities")
        return {"probabilities": [len(model.description["outputs"])]}
    if scale := model.description.get("scale"):
        mean, deviation = (graph.weight(f"scale.{n}", np.array(scale[n])) for n in ("mean", "deviation"))
        x = graph.linear(x, p["head.kernel"], p["head.bias"], "standardised")
        graph.add("Add", [graph.add("Mul", [x, deviation], "scaled_outputs"), mean], "outputs")
        return {"outputs": [len(scale["mean"])]}
    if model.kind == "model":
        graph.linear(x, p["head.kernel"], p["head.bias"], "outputs")
        return {"outputs": [len(model.description["outputs"])]}
    graph.add("Softmax", [graph.linear(x, p["head.kernel"], p["head.bias"], "logits")], "probabilities", axis=-1)
    return {"probabilities": [len(model.description["classes"])]}


def _masks(graph: _Graph, model: Model, logits: str) -> dict[str, list[int]]:
    """Class and probabilities of each pixel, from logits at the images' size."""
    shares = graph.add("Softmax", [logits], "probabilities", axis=-1)
    first = graph.add("ArgMax", [shares], "classes.wide", axis=-1, keepdims=0)
    graph.add("Cast", [first], "classes", to=2)  # uint8
    size = list(model.preprocessing["image_size"])
    return {"classes": size, "probabilities": [*size, 1 + len(model.description["outputs"])]}


def _segmenter(graph: _Graph, model: Model, last: str, images: str) -> str:
    """Logits of all pixels of a `Segmenter`, `[batch, H, W, K]`."""
    p, (rows, columns), about = flatten(model.params), model.grid(), model.description["encoder"]
    graph.shapes["end"] = [1 + rows * columns]

    def patches(tokens: str, name: str) -> str:
        return graph.add("Slice", [tokens, "second", "end", "axis"], name)

    patch, depth = about["patch_size"], about["depth"]
    if model.description["head"]["kind"] == "linear":
        x = graph.norm(patches(last, "patch_tokens"), p["encoder.norm.scale"], p["encoder.norm.bias"], "norm")
        x = graph.linear(x, p["head.kernel"], p["head.bias"], "head")
        x = graph.reshape(x, [-1, rows, columns, p["head.bias"].shape[0]], "head.grid")
        return graph.enlarged(x, (patch, patch), "logits", linear=True)
    levels = [
        patches(f"block{block}", f"head.level{i}.tokens") for i, block in enumerate(reversed(level_blocks(depth)))
    ]
    x, stride = _decoder(graph, p, "head", levels, images, (rows, columns), patch, 3)
    return graph.enlarged(x, (stride, stride), "logits", linear=True)


def _instances(graph: _Graph, model: Model, images: str) -> dict[str, list[int]]:
    """Predictions of the queries of a `MaskTransformer`."""
    p, (rows, columns), about = flatten(model.params), model.grid(), model.description["encoder"]
    queries, size = p["head.queries"], list(model.preprocessing["image_size"])
    count = queries.shape[1]
    last = _tokens(graph, model, images, queries, about["depth"] - model.description["head"]["blocks"])
    graph.shapes["end"], graph.shapes["all"] = [1 + rows * columns], [1 + rows * columns + count]
    patches = graph.add("Slice", [last, "second", "end", "axis"], "patch_tokens")
    pixels, stride = _decoder(
        graph, p, "head.pixels", [patches], images, (rows, columns), about["patch_size"], DOUBLINGS
    )
    x = graph.add("Slice", [last, "end", "all", "axis"], "query_answers")
    x = graph.norm(x, p["head.norm.scale"], p["head.norm.bias"], "head.norm", NORM_EPS)
    shares = graph.add(
        "Softmax",
        [graph.linear(x, p["head.classes.kernel"], p["head.classes.bias"], "head.classes")],
        "shares",
        axis=-1,
    )
    kinds = p["head.classes.bias"].shape[0]
    graph.shapes |= {"last": [2], "kinds": [kinds]}
    graph.add("Slice", [shares, "second", "kinds", "last"], "probabilities")
    for i in range(3):
        x = _gelu(graph, x, f"head.mask{i}.gelu") if i else x
        x = graph.linear(x, p[f"head.mask.{i}.kernel"], p[f"head.mask.{i}.bias"], f"head.mask{i}")
    height, across, embedding = size[0] // stride, size[1] // stride, p["head.mask.2.bias"].shape[0]
    flat = graph.reshape(pixels, [-1, height * across, embedding], "pixels.flat")
    flat = graph.add("Transpose", [flat], "pixels.by_channel", perm=[0, 2, 1])
    x = graph.reshape(graph.add("MatMul", [x, flat], "masks.flat"), [-1, count, height, across], "masks.logits")
    x = graph.add("Sigmoid", [x], "masks.narrow")
    scales = graph.weight("masks.scales", np.array([1, 1, stride, stride], np.float32))
    how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    graph.add("Resize", [x, "", scales], "masks", **how)
    return {"probabilities": [count, kinds - 1], "masks": [count, *size]}


def _decoder(
    graph: _Graph,
    p: dict[str, np.ndarray],
    head: str,
    levels: list[str],
    images: str,
    grid: tuple[int, int],
    patch: int,
    doublings: int,
) -> tuple[str, int]:
    """A `Decoder` named `head`, on patch tokens from the last level to the first: its output maps, and their stride."""
    doublings = max(d for d in range(doublings + 1) if patch % 2**d == 0)
    stride, beside = patch >> doublings, dict[int, str]()

    def join(at: int, x: str) -> None:
        beside[at] = graph.add("Add", [beside[at], x], f"{x}.joined") if at in beside else x

    for i, x in enumerate(levels):
        at, name = min(i, doublings), f"{head}.level{i}"
        x = graph.norm(x, p[f"{head}.norms.{i}.scale"], p[f"{head}.norms.{i}.bias"], f"{name}.norm", NORM_EPS)
        x = graph.linear(x, p[f"{head}.project.{i}.kernel"], p[f"{head}.project.{i}.bias"], f"{name}.projected")
        x = graph.reshape(x, [-1, *grid, p[f"{head}.project.{i}.bias"].shape[0]], f"{name}.grid")
        join(at, graph.enlarged(x, (2**at, 2**at), f"{name}.enlarged"))
    join(doublings, graph.conv(images, p[f"{head}.image.kernel"], p[f"{head}.image.bias"], f"{head}.image", stride))
    x = beside[0]
    for i in range(doublings + 1):
        x = graph.enlarged(x, (2, 2), f"{head}.stage{i}.enlarged") if i else x
        x = _stage(graph, p, f"{head}.stages.{i}", x, beside.get(i, "") if i else "")
    return graph.conv(x, p[f"{head}.out.kernel"], p[f"{head}.out.bias"], f"{head}.out"), stride


def _unet(graph: _Graph, model: Model, x: str) -> str:
    """Logits of all pixels of a `UNet`, `[batch, H, W, K]`."""
    p, depth, levels = flatten(model.params), model.description["unet"]["depth"], list[str]()
    for i in range(depth + 1):
        if i:
            x = graph.spatial("MaxPool", [x], f"down{i}.pooled", kernel_shape=[2, 2], strides=[2, 2])
        x = _stage(graph, p, f"down.{i}", x, "")
        levels.append(x)
    x = levels.pop()
    for i in range(depth):
        across = graph.conv(levels.pop(), p[f"across.{i}.kernel"], p[f"across.{i}.bias"], f"across.{i}")
        x = _stage(graph, p, f"up.{i}", graph.enlarged(x, (2, 2), f"up.{i}.enlarged"), across)
    return graph.conv(x, p["head.kernel"], p["head.bias"], "logits")


def _stage(graph: _Graph, p: dict[str, np.ndarray], name: str, x: str, beside: str) -> str:
    """A `Stage` of a decoder or U-Net; `beside` is added after the first convolution, "" = nothing."""
    if f"{name}.first.kernel" in p:
        x = graph.conv(x, p[f"{name}.first.kernel"], p[f"{name}.first.bias"], f"{name}.first")
    x = graph.add("Add", [x, beside], f"{name}.joined") if beside else x
    x = graph.norm(x, p[f"{name}.norm1.scale"], p[f"{name}.norm1.bias"], f"{name}.norm1", NORM_EPS)
    x = _gelu(graph, x, f"{name}.gelu1")
    x = graph.conv(x, p[f"{name}.second.kernel"], p[f"{name}.second.bias"], f"{name}.second")
    x = graph.norm(x, p[f"{name}.norm2.scale"], p[f"{name}.norm2.bias"], f"{name}.norm2", NORM_EPS)
    return _gelu(graph, x, f"{name}.gelu2")


def _weights(graph: _Graph, data_path: str) -> list[Any]:
    """The constants; those of a large model are streamed to `data_path`."""
    import onnx

    used = {name for _, inputs, _, _ in graph.nodes for name in inputs}
    shapes = {name: np.asarray(shape, np.int64) for name, shape in graph.shapes.items() if name in used}
    protos = [onnx.numpy_helper.from_array(shape, name) for name, shape in shapes.items()]
    if sum(array.nbytes for array in graph.weights.values()) <= files.EXTERNAL:  # a protobuf is limited to 2 GiB
        return protos + [onnx.numpy_helper.from_array(array, name) for name, array in graph.weights.items()]
    with open(data_path, "wb") as file:
        for name, array in graph.weights.items():
            proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=array.shape)
            proto.data_location = onnx.TensorProto.EXTERNAL
            file.write(b"\0" * (-file.tell() % 4096))  # aligned to pages, since runtimes memory-map the file
            place = {"location": os.path.basename(data_path), "offset": file.tell(), "length": array.nbytes}
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
            file.write(array.data)
            protos.append(proto)
    return protos
