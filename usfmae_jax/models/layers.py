"""Transformer layers with the numerics of the MAE code, written so that XLA compiles them well."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

AttentionImplementation = Literal["xla", "cudnn"] | None
#: Which intermediate values a block saves for the backward pass; the rest is recomputed.
Remat = Literal["none", "dots", "full"]

xavier = nnx.initializers.xavier_uniform()


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x * Phi(x)` with the Gaussian CDF (Hendrycks & Gimpel 2016); any shape."""
    return x * 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # The derivative Phi(x) + x phi(x) shares the erf with the value and is all that is kept for the backward pass;
    # derived automatically, it was the most expensive part of a small model on a CPU.
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    pdf = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, (cdf + x * pdf) * dx


def recomputed(step: Callable, remat: Remat, *, scan: bool) -> Callable:
    """Wraps a scan step so that its backward pass recomputes what was not saved (`jax.checkpoint`).

    Args:
      step: of `jax.lax.scan`.
      remat: "none" saves every value; "full" saves only the step's inputs; "dots" also saves the matrix products with
        parameters, so that only cheap operations are recomputed (and the attention, whose memory is quadratic).
      scan: whether the scan stays a loop; if unrolled, the compiler must be kept from merging the two computations.
    """
    if remat == "none":
        return step
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(step, prevent_cse=not scan, policy=policy)


#: Arrays with fewer elements are replicated: splitting them saves too little memory to justify the communication.
MIN_SPLIT_SIZE = 2**14


def split_axis(shape: Sequence[int], parts: int) -> int | None:
    """The axis along which an array is split over devices; None = it is replicated.

    It is the first axis that `parts` divides: shards that are contiguous in memory can be reduced directly, whereas for
    other axes a TPU reduces the whole array.

    Args:
      shape: of the array; for stacked blocks, of a single one.
      parts: number of parts.
    """
    if parts == 1 or math.prod(shape) < MIN_SPLIT_SIZE:
        return None
    return next((axis for axis in range(len(shape)) if shape[axis] % parts == 0), None)


def spread(x: jax.Array) -> jax.Array:
    """Shards the first axis of `[B, ...]` over all devices of the mesh in use, if any.

    The mesh is that of `jax.sharding.use_abstract_mesh`. Without this, the compiler moves activations where parameters
    are split, which costs more the larger the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.size <= 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def _whole(matrix: jax.Array) -> jax.Array:
    """Replicates a matrix on every device of the mesh in use."""
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec())


@jax.custom_vjp
def _gathered_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x [N, I] @ matrix [I, O]` for a matrix split over devices (ZeRO-3, Rajbhandari et al. 2020).

    The matrix is gathered for the product and again for the derivative: if it were kept, every device would hold the
    whole model.
    """
    return x @ _whole(matrix)


def _gathered_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = kept
    mesh = jax.sharding.get_abstract_mesh()
    *others, last = mesh.axis_names
    axis = split_axis(matrix.shape, mesh.shape[last])
    if axis is None:
        return dy @ _whole(matrix).T, x.T @ dy

    def own_part(x: jax.Array, dy: jax.Array) -> jax.Array:
        # An explicit reduce-scatter: left to the compiler, some sums become full all-reduces of twice the bytes.
        part = jax.lax.psum_scatter(x.T @ dy, last, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(part, tuple(others))

    rows = PartitionSpec(mesh.axis_names)
    summed = jax.shard_map(own_part, in_specs=(rows, rows), out_specs=PartitionSpec(*[None] * axis, last))
    return dy @ _whole(matrix).T, summed(x, dy)


_gathered_product.defvjp(lambda x, matrix: (_gathered_product(x, matrix), (x, matrix)), _gathered_backward)


class Linear(nnx.Linear):
    """Linear layer `[..., I] -> [..., O]`, computed as one 2-D product.

    On the CPU, XLA runs a 3-D by 2-D product up to three times slower than the same product with tokens flattened.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, dtype=dtype, kernel_init=xavier, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """`x @ kernel + bias` in the compute dtype."""
        flat = x.reshape(-1, x.shape[-1])
        devices = jax.sharding.get_abstract_mesh().size
        if devices <= 1 or len(flat) % devices or self.bias is None:
            return super().__call__(flat).reshape(*x.shape[:-1], -1)
        product = _gathered_product(flat.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return (product + self.bias[...].astype(self.dtype)).reshape(*x.shape[:-1], -1)


class Chain(nnx.Module):
    """Submodules named "0", "1", ..., as in torch's `Sequential`."""

    def __init__(self, modules: Sequence[nnx.Module]):
        self.length = len(modules)
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, str(index)) for index in range(self.length))


#: LayerNorm's epsilon in the MAE code and in timm.
NORM_EPS = 1e-6


def layer_norm(width: int, eps: float = NORM_EPS, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm computed in float32, whatever the input dtype."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scaled dot-product attention for CPUs, all arrays `[B, H, N, E]`, with the softmax in float32.

    On the CPU, XLA runs the derivative generated by JAX at a sixth of the speed of large products. With the derivative
    written out and the row sums taken from the output (Dao et al. 2022, appendix B), a training step of a small model
    is a sixth faster.
    """
    return _attend(q, k, v)[0]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(scores).astype(v.dtype)
    out = jnp.einsum("bhnm,bhmd->bhnd", p, v)
    return out, (q, k, v, p, out)


def _attend_backward(kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, p, out = kept
    dv = jnp.einsum("bhnm,bhnd->bhmd", p, d_out)
    dp = jnp.einsum("bhnd,bhmd->bhnm", d_out, v)
    d_scores = p * (dp - (d_out * out).sum(axis=-1, keepdims=True)) * q.shape[-1] ** -0.5
    return jnp.einsum("bhnm,bhmd->bhnd", d_scores, k), jnp.einsum("bhnm,bhnd->bhmd", d_scores, q), dv


attend.defvjp(_attend, _attend_backward)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: AttentionImplementation = None) -> jax.Array:
    """Scaled dot-product attention: queries `[B, N, H, E]`, keys and values `[B, M, H, E]` to `[B, N, H, E]`.

    If `implementation` is None, it is chosen for the target platform.
    """
    if implementation is None:
        return jax.lax.platform_dependent(q, k, v, cpu=_attend_on_cpu, default=jax.nn.dot_product_attention)
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _attend_on_cpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` in the layout of `jax.nn.dot_product_attention`, `[B, N, H, E]`."""
    return attend(*(part.swapaxes(1, 2) for part in (q, k, v))).swapaxes(1, 2)


class LowRank(nnx.Module):
    """The low-rank update `x @ down @ up` that LoRA (Hu et al. 2022) adds to a linear layer; zero at initialisation."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, dtype: Any, rngs: nnx.Rngs):
        self.down = nnx.Param(nnx.initializers.normal(1 / rank)(rngs.params(), (inputs, rank)))
        self.up = nnx.Param(jnp.zeros((rank, outputs)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., I] -> [..., O]`."""
        return x @ self.down[...].astype(self.dtype) @ self.up[...].astype(self.dtype)


def without_lora(params: Any) -> Any:
    """Merges every low-rank update into its matrix; parameters without one are unchanged."""
    if not isinstance(params, dict):
        return params
    merged = {name: without_lora(one) for name, one in params.items() if not name.endswith("_lora")}
    for name in params:
        if name.endswith("_lora"):
            one = merged[name.removesuffix("_lora")]
            added = params[name]["down"] @ params[name]["up"]  # stacked blocks: [depth, I, R] @ [depth, R, O]
            merged[name.removesuffix("_lora")] = one | {"kernel": one["kernel"] + added}
    return merged


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017), `[B, N, D] -> [B, N, D]`.

    One matrix computes query, key and value; the softmax is float32 whatever the compute dtype. With `lora`, both
    matrices get a low-rank update of that rank, see `LowRank`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dtype: Any,
        implementation: AttentionImplementation,
        lora: int = 0,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.qkv_lora = LowRank(width, 3 * width, lora, dtype=dtype, rngs=rngs) if lora else None
        self.proj_lora = LowRank(width, width, lora, dtype=dtype, rngs=rngs) if lora else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Every token attends to every token."""
        q, k, v = self._heads(x)
        attended = attention(q, k, v, self.implementation).reshape(x.shape)  # from [B, N, H, D/H]
        projected = self.proj(attended)
        return projected if self.proj_lora is None else projected + self.proj_lora(attended)

    def weights(self, x: jax.Array) -> jax.Array:
        """How much each token (row) attends to each token (column): float32 `[B, H, N, N]`, rows sum to 1."""
        q, k, _ = self._heads(x)
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
        return jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)

    def _heads(self, x: jax.Array) -> jax.Array:
        """Query, key and value, `[3, B, N, H, D/H]`."""
        b, n, d = x.shape
        qkv = self.qkv(x) if self.qkv_lora is None else self.qkv(x) + self.qkv_lora(x)
        return jnp.moveaxis(qkv.reshape(b, n, 3, self.num_heads, d // self.num_heads), 2, 0)
