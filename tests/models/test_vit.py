"""The encoder's pieces against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from usfmae_jax.models import layers, patches, vit


def test_gelu_is_exact_and_so_is_its_derivative(rng):
    x = rng.normal(size=200).astype(np.float32) * 3
    np.testing.assert_allclose(layers.gelu(x), x * 0.5 * (1 + erf(x / np.sqrt(2))), atol=1e-6)
    derivative = jax.vmap(jax.grad(layers.gelu))(x)
    reference = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(derivative, reference, atol=1e-6)


@pytest.mark.parametrize(("shape", "patch"), [((2, 32, 48, 3), 8), ((1, 28, 14, 1), 14)])
def test_unpatchify_inverts_patchify(rng, shape, patch):
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    found = patches.patchify(images, patch)
    assert found.shape == (shape[0], shape[1] * shape[2] // patch**2, patch**2 * shape[3])
    np.testing.assert_array_equal(patches.unpatchify(found, (shape[1] // patch, shape[2] // patch), patch), images)


def test_patches_run_row_by_row_and_hold_row_column_channel():
    images = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    found = patches.patchify(images, 2)
    np.testing.assert_array_equal(found[1, 1], images[1, :2, 2:].reshape(-1))


def test_image_size_must_be_divisible_by_the_patch():
    with pytest.raises(ValueError, match="30x32 is not divisible by patch size 8"):
        patches.patchify(jnp.zeros((1, 30, 32, 1)), 8)


def test_position_table_follows_its_formula():
    table = patches.sincos_table((3, 5), 16)
    assert table.shape == (15, 16)
    row, column = 2, 4
    w = 10000.0 ** (-2 * np.arange(4) / 8)
    expected = np.concatenate([np.sin(column * w), np.cos(column * w), np.sin(row * w), np.cos(row * w)])
    np.testing.assert_allclose(table[row * 5 + column], expected, atol=1e-6)


def test_position_table_is_resized_smoothly_and_kept_on_its_own_grid():
    table = patches.sincos_table((8, 8), 16)
    np.testing.assert_array_equal(patches.resize_table(table, (8, 8), (8, 8)), table)
    larger = np.asarray(patches.resize_table(table, (8, 8), (16, 16))).reshape(16, 16, 16)
    original = table.reshape(8, 8, 16)
    # Low frequencies survive interpolation: half-way between two old positions lies their mean.
    between = (larger[4:12:2, 4:12:2, 6] + larger[5:13:2, 5:13:2, 6]) / 2
    np.testing.assert_allclose(between, original[2:6, 2:6, 6], atol=0.01)


def test_position_tables_are_resized_as_pytorch_does_it():
    # torch.nn.functional.interpolate(table, size=(3, 5), mode="bicubic", align_corners=False), torch 2.13
    table = np.array([[0, 1, 4], [2, -3, 5]], np.float32)
    expected = [
        [-0.31961116, 0.2317232, 1.3472226, 3.027098, 4.159529],
        [1.192, -0.1719994, -1.0, 2.2220008, 5.028001],
        [2.7036107, -0.57572186, -3.3472219, 1.4169048, 5.8964734],
    ]
    np.testing.assert_allclose(
        patches.resize_table(table.reshape(6, 1), (2, 3), (3, 5)).reshape(3, 5), expected, atol=2e-6
    )


@pytest.mark.parametrize(("old", "new"), [((14, 14), (7, 9)), ((14, 14), (16, 24)), ((3, 5), (3, 10))], ids=str)
def test_position_tables_are_resized_as_the_installed_pytorch_does_it(rng, old, new):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -r requirements-interop.txt")
    table = rng.normal(size=(old[0] * old[1], 8)).astype(np.float32)
    image = torch.from_numpy(table.reshape(1, *old, 8)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, size=new, mode="bicubic", align_corners=False)
    expected = resized[0].permute(1, 2, 0).reshape(-1, 8).numpy()
    np.testing.assert_allclose(patches.resize_table(table, old, new), expected, atol=1e-5)


def test_position_is_no_parameter():
    model = nnx.eval_shape(
        lambda: vit.ViT(image_size=(16, 16), patch_size=8, channels=1, width=8, depth=1, num_heads=2, rngs=nnx.Rngs(0))
    )
    assert set(nnx.to_pure_dict(nnx.state(model))) == {"patch_embed", "cls_token", "blocks", "norm"}


def test_linear_layers_start_xavier_uniform_as_if_flattened():
    model = vit.ViT(image_size=(32, 32), patch_size=8, channels=3, width=64, depth=4, num_heads=2, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    kernels = {
        "patch": (params["patch_embed"]["kernel"], 192 + 64),
        "qkv": (params["blocks"]["stack"]["attn"]["qkv"]["kernel"], 64 + 192),  # as one matrix
        "fc1": (params["blocks"]["stack"]["fc1"]["kernel"], 64 + 256),
    }
    for name, (kernel, fans) in kernels.items():
        bound = np.sqrt(6 / fans)
        assert 0.98 * bound < np.abs(kernel).max() <= bound, name
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)
    stacked = params["blocks"]["stack"]["fc1"]["kernel"]
    assert not np.array_equal(stacked[0], stacked[1])  # each layer its own numbers
    assert not params["blocks"]["stack"]["fc1"]["bias"].any()


def test_visible_patches_alone_are_what_masking_the_sequence_would_give(rng):
    model = vit.ViT(image_size=(32, 32), patch_size=8, channels=1, width=32, depth=2, num_heads=2, rngs=nnx.Rngs(0))
    images = jnp.asarray(rng.normal(size=(2, 32, 32, 1)), jnp.float32)
    everything = jnp.broadcast_to(jnp.arange(16), (2, 16))
    run = jax.jit(lambda model, images, keep: model(images, keep))
    np.testing.assert_allclose(run(model, images, everything), run(model, images, None), atol=1e-5)
    few = jnp.asarray([[3, 1, 7], [0, 15, 2]])
    changed = images.at[:, 24:, :8].set(9.0)  # patch 12, which nobody sees
    np.testing.assert_array_equal(run(model, images, few), run(model, changed, few))


def test_softmax_and_norm_are_float32_under_bfloat16():
    model = vit.ViT(
        image_size=(16, 16),
        patch_size=8,
        channels=1,
        width=8,
        depth=1,
        num_heads=2,
        dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    lines = str(jax.make_jaxpr(lambda x: model(x))(jnp.zeros((1, 16, 16, 1)))).splitlines()
    exponentials = [line for line in lines if "= exp " in line]
    assert exponentials
    assert all(":f32" in line for line in exponentials)
    assert all(":f32" in line for line in lines if "= rsqrt " in line)


def test_grey_pixels_are_repeated_to_the_models_channels():
    images = jnp.asarray([[[[0]], [[255]]]], jnp.uint8)
    x = patches.normalize_images(images, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    np.testing.assert_allclose(x[0, :, 0], [[-1, -1, 0], [1, 3, 1]])


def test_attention_of_cpus_is_that_of_jax_with_the_same_gradients(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32) for _ in range(3))

    def reference(q, k, v):
        return jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    np.testing.assert_allclose(layers.attend(q, k, v), reference(q, k, v), atol=1e-6)
    weigh = jnp.arange(4.0)
    own, derived = (
        jax.jit(jax.grad(lambda *x, f=f: (f(*x) ** 2 * weigh).sum(), argnums=(0, 1, 2)))(q, k, v)
        for f in (layers.attend, reference)
    )
    for one, other in zip(own, derived, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def _blocks(scan, remat):
    def make(rngs):
        return vit.Block(16, 2, 2.0, dtype=jnp.float32, attention=None, rngs=rngs)

    return nnx.split(vit.Blocks(2, make, scan=scan, remat=remat, rngs=nnx.Rngs(0)))


def _block_gradient(scan, remat):
    graph, params = _blocks(scan, remat)
    return jax.jit(jax.grad(lambda params, x: (nnx.merge(graph, params)(x) ** 2).sum())), params


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (True, "full"), (False, "full")])
def test_the_choice_of_attention_changes_no_bit_on_a_cpu(rng, monkeypatch, scan, remat):
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    chosen, params = _block_gradient(scan, remat)
    found = chosen(params, x)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: cpu(*args))
    expected = _block_gradient(scan, remat)[0](params, x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("scan", [True, False])
def test_keeping_less_for_the_backward_pass_changes_no_gradient(rng, scan):
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    kept, found = {}, {}
    for remat in ("none", "dots", "full"):
        graph, params = _blocks(scan, remat)
        loss = lambda params, x, graph=graph: (nnx.merge(graph, params)(x) ** 2).sum()  # noqa: E731
        found[remat] = jax.jit(jax.grad(loss))(params, x)
        residuals = jax.eval_shape(lambda *args, loss=loss: jax.vjp(loss, *args)[1], params, x)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert kept["none"] > kept["dots"] > kept["full"]
    for remat in ("dots", "full"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found[remat], found["none"])


def test_attention_is_that_of_the_platform_it_is_compiled_for():
    gradient, params = _block_gradient(True, "none")
    traced = gradient.trace(params, jnp.zeros((2, 5, 16)))
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    ours, of_jax = ("batching_dims = [0, 1] x [0, 1]", "batching_dims = [0, 2] x [0, 2]")  # [B, H, N, E], [B, N, H, E]
    assert ours in text["cpu"]
    assert of_jax not in text["cpu"]
    for name in ("cuda", "tpu"):
        assert of_jax in text[name]


ROLLOUT = jax.jit(vit.attention_rollout, static_argnums=2)
TINY = {"patch_size": 8, "channels": 1, "width": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def encoder():
    encoder = vit.ViT(image_size=(32, 32), **TINY, rngs=nnx.Rngs(0))
    qkv = encoder.blocks.stack.attn.qkv
    qkv.kernel[...] = 3 * qkv.kernel[...]  # attention that prefers some patches
    return encoder


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _rolled_by_hand(encoder, images, pool):
    graph, stacked = nnx.split(encoder.blocks.stack)
    x = encoder.embed(images)
    rolled = np.eye(x.shape[1])
    for index in range(3):
        block = nnx.merge(graph, jax.tree.map(lambda p, i=index: p[i], stacked))
        q, k, _ = np.split(np.asarray(block.attn.qkv(block.norm1(x))), 3, axis=-1)
        heads = [_softmax(q[..., h] @ k[..., h].swapaxes(1, 2) / 4) for h in (slice(0, 16), slice(16, 32))]
        mixed = np.mean(heads, axis=0) + np.eye(x.shape[1])
        rolled = mixed / mixed.sum(axis=-1, keepdims=True) @ rolled
        x = block(x)
    patches = rolled[:, 0, 1:] if pool == "cls" else rolled[:, 1:, 1:].mean(axis=1)
    patches = patches - patches.min(axis=1, keepdims=True)
    return (patches / patches.max(axis=1, keepdims=True)).reshape(-1, *[s // 8 for s in images.shape[1:3]])


@pytest.mark.parametrize(("pool", "shape"), [("cls", (2, 32, 32, 1)), ("mean", (2, 32, 48, 1))])
def test_rollout_is_its_definition(encoder, pool, shape):
    images = jax.random.normal(jax.random.key(0), shape)
    found = ROLLOUT(encoder, images, pool)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _rolled_by_hand(encoder, images, pool), atol=1e-4)


def test_each_rollout_reaches_from_0_to_1(encoder):
    maps = np.asarray(ROLLOUT(encoder, jax.random.normal(jax.random.key(0), (3, 32, 32, 1)), "cls"))
    np.testing.assert_array_equal(maps.min(axis=(1, 2)), 0)
    np.testing.assert_allclose(maps.max(axis=(1, 2)), 1, atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_even_attention_is_no_picture(encoder, pool):
    even = nnx.clone(encoder)
    even.blocks.stack.attn.qkv.kernel[...] = jnp.zeros_like(even.blocks.stack.attn.qkv.kernel[...])
    assert not ROLLOUT(even, jax.random.normal(jax.random.key(0), (2, 32, 32, 1)), pool).any()


def test_rollout_in_bfloat16_follows_the_same_paths(encoder):
    half = vit.ViT(image_size=(32, 32), **TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(encoder))
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))
    maps = [np.asarray(ROLLOUT(model, images, "cls")).ravel() for model in (half, encoder)]
    assert np.corrcoef(maps)[0, 1] > 0.98
