"""Layers of a transformer, with the numerics of the MAE code, arranged for the compiler."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

AttentionImplementation = Literal["xla", "cudnn"] | None
#: What a block keeps of its values for the backward pass, which computes the rest again.
Remat = Literal["none", "dots", "full"]

xavier = nnx.initializers.xavier_uniform()


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x * Phi(x)` with the Gaussian CDF (Hendrycks & Gimpel 2016); any shape."""
    return x * 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # The derivative Phi(x) + x phi(x) shares the erf with the value and is all that the backward pass keeps;
    # derived automatically it was the dearest part of a small model on a CPU.
    (x,), (dx,) = primals, tangents
    cdf = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    pdf = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, (cdf + x * pdf) * dx


def recomputed(step: Callable, remat: Remat, *, scan: bool) -> Callable:
    """A step over blocks whose backward pass computes again what it has not kept.

    Args:
      step: of `jax.lax.scan`.
      remat: "none" keeps every value, "full" what goes into the step and no more; "dots" also the products with
        matrices, so that only what is cheap is computed again (and the attention, whose memory is quadratic).
      scan: whether the scan stays a loop; unrolled, the compiler must be kept from merging both computations.
    """
    if remat == "none":
        return step
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(step, prevent_cse=not scan, policy=policy)


#: Arrays with fewer elements than this are replicated: splitting them costs more messages than it saves memory.
MIN_SPLIT_SIZE = 2**14


def split_axis(shape: Sequence[int], parts: int) -> int | None:
    """The axis along which devices hold parts of an array; None = all hold it whole.

    It is the first that `parts` divides: parts of rows that lie together in memory can be reduced as they are, while of
    others a TPU reduces the whole array.

    Args:
      shape: of the array; of stacked blocks, of one.
      parts: how many.
    """
    if parts == 1 or math.prod(shape) < MIN_SPLIT_SIZE:
        return None
    return next((axis for axis in range(len(shape)) if shape[axis] % parts == 0), None)


def spread(x: jax.Array) -> jax.Array:
    """`[B, ...]` with its first axis over all devices of the mesh in use (`jax.sharding.use_abstract_mesh`), if any.

    Left to itself the compiler moves activations where parameters are split, which is dearer the larger the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.size <= 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def _whole(matrix: jax.Array) -> jax.Array:
    """A matrix on every device of the mesh in use."""
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec())


@jax.custom_vjp
def _gathered_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x [N, I] @ matrix [I, O]` where devices hold parts of the matrix (ZeRO-3, Rajbhandari et al. 2020).

    It is gathered for the product and again for the derivative: kept, every device would hold the whole model.
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
        # Said in so many words: of sums that a compiler has to recognise it reduces some whole, for twice the bytes.
        part = jax.lax.psum_scatter(x.T @ dy, last, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(part, tuple(others))

    rows = PartitionSpec(mesh.axis_names)
    summed = jax.shard_map(own_part, in_specs=(rows, rows), out_specs=PartitionSpec(*[None] * axis, last))
    return dy @ _whole(matrix).T, summed(x, dy)


_gathered_product.defvjp(lambda x, matrix: (_gathered_product(x, matrix), (x, matrix)), _gathered_backward)


class Linear(nnx.Linear):
    """`[..., I] -> [..., O]`, computed as one 2-D product.

    XLA on the CPU runs a 3-D by 2-D product up to three times slower than the same product with tokens flattened.
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
    """Modules under the names "0", "1", ..., as torch's Sequential has them."""

    def __init__(self, modules: Sequence[nnx.Module]):
        self.length = len(modules)
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, str(index)) for index in range(self.length))


#: What LayerNorm adds to the variance in the MAE code, and in timm.
NORM_EPS = 1e-6


def layer_norm(width: int, eps: float = NORM_EPS, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm in float32 whatever comes in."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scaled dot-product attention, all `[B, H, N, E]`, with the softmax in float32; what CPUs use.

    XLA on the CPU runs the derivative that JAX derives at a sixth of the speed of large products; written out, with the
    row sums taken from the output (Dao et al. 2022, appendix B), a training step of a small model is a sixth faster.
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

    Without an `implementation` it is what suits the platform that is compiled for.
    """
    if implementation is None:
        return jax.lax.platform_dependent(q, k, v, cpu=_attend_on_cpu, default=jax.nn.dot_product_attention)
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _attend_on_cpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` in the layout of `jax.nn.dot_product_attention`, `[B, N, H, E]`."""
    return attend(*(part.swapaxes(1, 2) for part in (q, k, v))).swapaxes(1, 2)


class LowRank(nnx.Module):
    """What LoRA (Hu et al. 2022) adds to a matrix: `x @ down @ up`, of a low rank, nothing in the beginning."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, dtype: Any, rngs: nnx.Rngs):
        self.down = nnx.Param(nnx.initializers.normal(1 / rank)(rngs.params(), (inputs, rank)))
        self.up = nnx.Param(jnp.zeros((rank, outputs)))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., I] -> [..., O]`."""
        return x @ self.down[...].astype(self.dtype) @ self.up[...].astype(self.dtype)


def without_lora(params: Any) -> Any:
    """Parameters in which every low-rank addition has become part of its matrix; what has none is as it was."""
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

    Query, key and value come from one matrix; the softmax is float32 whatever the compute dtype. With `lora` both
    matrices have a low-rank addition of that rank, see `LowRank`.
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
