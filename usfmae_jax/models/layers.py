"""Layers of a transformer, with the numerics of the MAE code, arranged for the compiler."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

AttentionImplementation = Literal["xla", "cudnn"] | None

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


class Linear(nnx.Linear):
    """`[..., I] -> [..., O]`, computed as one 2-D product.

    XLA on the CPU runs a 3-D by 2-D product up to three times slower than the same product with tokens flattened.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, dtype=dtype, kernel_init=xavier, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """`x @ kernel + bias` in the compute dtype."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


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
