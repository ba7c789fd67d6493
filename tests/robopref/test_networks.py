from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

from robopref.agent import num_parameters
from robopref.datasets import fit_normalizer
from robopref.networks import (
    MLP,
    Convolutions,
    DeterministicPolicy,
    Dropout,
    Normalizer,
    Pixels,
    Transformer,
    Trunk,
    _convolve,
    _multiply_patches,
    apply,
    init,
    observation_shape,
)

INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)


def test_a_normalizer_standardises():
    data = np.random.default_rng(1).normal([5.0, -300.0, 0.0], [0.01, 20.0, 3.0], (4000, 3))
    standardised = np.asarray(Normalizer.fit(data)(jnp.asarray(data, jnp.float32)))
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=2e-3)
    np.testing.assert_allclose(standardised.std(axis=0), 1, rtol=2e-3)


def test_a_normalizer_is_exact_for_data_far_from_zero():
    """Single precision would lose the spread of numbers this large."""
    data = 1e4 + np.array([[-1e-2], [1e-2]] * 5000)
    np.testing.assert_allclose(Normalizer.fit(data).std, 1e-2, rtol=1e-5)


@pytest.mark.parametrize("jitter", [0.0, 1e-9, 5e-5])
def test_a_dimension_that_hardly_moves_is_centred_but_not_blown_up(jitter):
    data = np.stack([np.full(1000, 0.7), np.linspace(-1, 1, 1000)], axis=1)
    data[::2, 0] += jitter
    normalizer = Normalizer.fit(data)
    assert float(normalizer.std[0]) == 1.0
    on_the_robot = normalizer(jnp.array([0.71, 0.0]))
    np.testing.assert_allclose(on_the_robot[0], 0.01, atol=1e-4)
    np.testing.assert_allclose(normalizer.std[1], np.std(data[:, 1]), rtol=1e-6)


def test_a_dimension_that_moves_a_little_is_scaled():
    data = np.array([[0.0], [1e-3]])
    np.testing.assert_allclose(Normalizer.fit(data)(jnp.asarray(data, jnp.float32))[:, 0], [-1, 1], rtol=1e-5)


def test_the_identity_changes_nothing():
    np.testing.assert_array_equal(Normalizer.identity((5,))(INPUTS), INPUTS)


def test_a_datasets_normalizer_is_that_of_all_its_observations(dataset, episodes):
    observations = np.concatenate([episode.observations for episode in episodes])
    normalizer = fit_normalizer(dataset)
    np.testing.assert_allclose(normalizer.mean, observations.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(normalizer.std[:4], observations[:, :4].std(axis=0), rtol=1e-5)
    assert float(normalizer.std[4]) == 1.0


def layers(params):
    return [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for _, layer in sorted(params.items())]


def test_an_mlp_is_affine_maps_with_relu_between_them():
    module = MLP((8, 8), 4)
    params = init(module, jax.random.key(0), INPUTS)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    (first, a), (second, b), (third, c) = layers(params)
    hidden = np.maximum(np.maximum(np.asarray(INPUTS) @ first + a, 0) @ second + b, 0)
    np.testing.assert_allclose(apply(module, params, INPUTS), hidden @ third + c, rtol=1e-5, atol=1e-5)


def test_kernels_begin_orthogonal_and_biases_at_zero():
    params = init(MLP((8, 8), 4), jax.random.key(0), INPUTS)
    *hidden, (last, _) = [(kernel, bias) for kernel, bias in layers(params)]
    for kernel, bias in layers(params):
        assert not bias.any()
        assert kernel.dtype == np.float32
    first, second = (kernel for kernel, _ in hidden)
    np.testing.assert_allclose(first @ first.T, 2 * np.eye(5), atol=1e-5)
    np.testing.assert_allclose(second.T @ second, 2 * np.eye(8), atol=1e-5)
    np.testing.assert_allclose(last.T @ last, np.eye(4), atol=1e-5)


def test_another_key_gives_other_parameters():
    first, second = (layers(init(MLP((8, 8), 4), jax.random.key(seed), INPUTS))[0][0] for seed in (0, 1))
    assert not np.allclose(first, second)


def test_dropout_acts_exactly_if_a_key_is_given():
    module = DeterministicPolicy((8, 8), 4, dropout=0.5)
    params = init(module, jax.random.key(0), INPUTS)
    plain = apply(module, params, INPUTS)
    np.testing.assert_array_equal(apply(module, params, INPUTS), plain)
    np.testing.assert_array_equal(apply(DeterministicPolicy((8, 8), 4), params, INPUTS), plain)
    dropped = [np.asarray(apply(module, params, INPUTS, dropout_key=jax.random.key(seed))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])
    assert not np.array_equal(dropped[0], plain)


def test_dropout_keeps_the_expected_activation():
    """What survives is scaled up, so that the mean over many masks is the output without dropout."""
    module = MLP((64,), 1, dropout=0.25)
    params = init(module, jax.random.key(0), INPUTS)
    keys = jax.random.split(jax.random.key(1), 2000)
    outputs = jax.vmap(lambda key: apply(module, params, INPUTS, dropout_key=key))(keys)
    error = np.asarray(outputs.mean(axis=0) - apply(module, params, INPUTS))
    standard_error = np.asarray(outputs.std(axis=0)) / np.sqrt(len(keys))
    assert (standard_error > 0).all()
    assert (np.abs(error) < 5 * standard_error).all()


def test_without_dropout_a_key_changes_nothing():
    module = DeterministicPolicy((8, 8), 4)
    params = init(module, jax.random.key(0), INPUTS)
    np.testing.assert_array_equal(
        apply(module, params, INPUTS, dropout_key=jax.random.key(1)), apply(module, params, INPUTS)
    )


def test_a_policy_is_the_tanh_of_an_mlp_and_so_bounded():
    module = DeterministicPolicy((8, 8), 4)
    params = init(module, jax.random.key(0), INPUTS)
    mlp = apply(MLP((8, 8), 4), params["MLP_0"], INPUTS)
    np.testing.assert_allclose(apply(module, params, INPUTS), np.tanh(mlp), rtol=1e-5, atol=1e-6)
    far = np.asarray(apply(module, params, 1e6 * INPUTS))
    assert np.isfinite(far).all()
    assert (np.abs(far) <= 1).all()
    assert (np.abs(far) > 0.99).any()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3)])
def test_batch_axes_are_kept(batch):
    module = DeterministicPolicy((8, 8), 4)
    params = init(module, jax.random.key(0), jnp.zeros(5))
    assert apply(module, params, jnp.zeros((*batch, 5))).shape == (*batch, 4)


PIXELS = Pixels(filters=3, strides=(2, 1), features=6, shift=1)
IMAGES = np.random.default_rng(2).integers(0, 256, (4, 9, 11, 2), dtype=np.uint8)


def layer_norm(inputs: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    centred = inputs - inputs.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6) * scale + offset


def shifted(params, by=0.1):
    """With biases that are not zero and scales that are not one."""
    return jax.tree.map(lambda leaf: leaf + by, params)


def convolved(params, images: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    """The convolutions of one image after the other, channel by channel, and every nth place of what comes out."""
    outputs = []
    for image in images:
        hidden = image / 255.0 - 0.5
        for index, stride in enumerate(strides):
            kernel, bias = (np.asarray(params[f"Conv_{index}"][name], np.float64) for name in ("kernel", "bias"))
            maps = [
                sum(correlate(hidden[..., c], kernel[..., c, f], "valid") for c in range(hidden.shape[-1])) + bias[f]
                for f in range(kernel.shape[-1])
            ]
            hidden = np.maximum(np.stack(maps, axis=-1)[::stride, ::stride], 0)
        outputs.append(hidden.ravel())
    return np.stack(outputs)


def test_convolutions_are_those_of_scipy():
    module = Convolutions(PIXELS)
    params = shifted(init(module, jax.random.key(0), jnp.asarray(IMAGES)))
    outputs = module.apply({"params": params}, jnp.asarray(IMAGES))
    # 9 x 11 becomes 4 x 5 with stride 2, and then 2 x 3.
    assert outputs.shape == (4, 2 * 3 * 3)
    expected = convolved(params, IMAGES, PIXELS.strides)
    assert (expected > 0).any()
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(module.apply({"params": params}, jnp.asarray(IMAGES, jnp.float32)), outputs)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(9, 11), (10, 12), (3, 3)])
def test_both_ways_to_convolve_give_the_same_and_the_same_gradients(stride, shape):
    """One is for processors, the other for accelerators."""
    images = jax.random.normal(jax.random.key(0), (4, *shape, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 5))
    results = []
    for convolve in (_convolve, _multiply_patches):
        results.append(jax.vjp(partial(convolve, stride=stride), images, kernel))
    (output, pull), (other, other_pull) = results
    np.testing.assert_allclose(output, other, rtol=1e-4, atol=1e-5)
    for gradient, expected in zip(pull(output), other_pull(output), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-3)


def test_a_trunk_is_a_normalised_projection():
    inputs = np.random.default_rng(3).normal(size=(5, 8))
    params = shifted(init(Trunk(6), jax.random.key(0), jnp.asarray(inputs, jnp.float32)))
    dense, norm = params["Dense_0"], params["LayerNorm_0"]
    projected = inputs @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    expected = np.tanh(layer_norm(projected, np.asarray(norm["scale"]), np.asarray(norm["bias"])))
    np.testing.assert_allclose(
        Trunk(6).apply({"params": params}, jnp.asarray(inputs, jnp.float32)), expected, rtol=1e-4, atol=1e-5
    )


def test_a_policy_from_pixels_is_an_mlp_behind_an_encoder():
    module = DeterministicPolicy((8,), 4, pixels=PIXELS)
    params = shifted(init(module, jax.random.key(0), jnp.asarray(IMAGES)), by=0.05)
    encoded = Convolutions(PIXELS).apply({"params": params["Convolutions_0"]}, jnp.asarray(IMAGES))
    features = Trunk(6).apply({"params": params["Trunk_0"]}, encoded)
    expected = np.tanh(apply(MLP((8,), 4), params["MLP_0"], features))
    np.testing.assert_allclose(apply(module, params, jnp.asarray(IMAGES)), expected, rtol=1e-5, atol=1e-6)
    assert params.keys() == {"Convolutions_0", "Trunk_0", "MLP_0"}


def test_the_published_policy_has_its_number_of_parameters():
    """Counted in the authors' code for images of 64 pixels and Meta-World's four actions."""
    module = DeterministicPolicy((1024, 1024), 4, dropout=0.5, pixels=Pixels())
    shapes = jax.eval_shape(lambda: init(module, jax.random.key(0), jnp.zeros((64, 64, 3))))
    convolutions = (9 * 3 * 32 + 32) + 3 * (9 * 32 * 32 + 32)
    # 64 becomes 31, 29, 27 and 25 pixels.
    trunk = 25 * 25 * 32 * 50 + 50 + 2 * 50
    mlp = (50 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 4 + 4)
    assert num_parameters(shapes) == convolutions + trunk + mlp == 2_134_714


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3)])
def test_batch_axes_of_images_are_kept(batch):
    module = DeterministicPolicy((8,), 4, pixels=PIXELS)
    params = init(module, jax.random.key(0), jnp.zeros((9, 11, 2)))
    images = jnp.resize(jnp.asarray(IMAGES), (*batch, 9, 11, 2))
    actions = apply(module, params, images)
    assert actions.shape == (*batch, 4)
    flat = apply(module, params, images.reshape(-1, 9, 11, 2))
    np.testing.assert_allclose(actions.reshape(-1, 4), flat, rtol=1e-5, atol=1e-6)


def test_the_shape_of_one_observation():
    images = jnp.zeros((7, 2, 3, 9, 11, 2))
    assert observation_shape(images, PIXELS) == (9, 11, 2)
    assert observation_shape(jnp.zeros((7, 2, 3, 5)), None) == (5,)


def test_the_identity_of_images_is_one_number_for_all_pixels():
    normalizer = Normalizer.identity((9, 11, 2))
    assert normalizer.mean.shape == normalizer.std.shape == ()
    seen = normalizer(jnp.asarray(IMAGES))
    assert seen.dtype == jnp.float32
    np.testing.assert_array_equal(seen, IMAGES)


# Transformers

TOKENS, WIDTH, HEADS = 5, 8, 2
SEQUENCES = np.random.default_rng(4).normal(size=(3, TOKENS, WIDTH)).astype(np.float32)
MASKS = np.tril(np.ones((TOKENS, TOKENS), bool)) & np.array(
    [[[1, 1, 1, 1, 1]], [[0, 0, 1, 1, 1]], [[1, 0, 1, 0, 1]]], bool
)


def make_transformer(post_norm: bool, **changes):
    module = Transformer(2, HEADS, post_norm=post_norm, activation=jnp.tanh, **changes)
    params = init(module, jax.random.key(0), jnp.asarray(SEQUENCES), jnp.asarray(MASKS))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    return module, jax.tree.unflatten(tree, [leaf + rng.normal(0, 0.2, leaf.shape).astype("f4") for leaf in leaves])


def affine(inputs, part):
    return inputs @ np.asarray(part["kernel"], np.float64) + np.asarray(part.get("bias", 0.0), np.float64)


def norm(inputs, part):
    return layer_norm(inputs, np.asarray(part["scale"]), np.asarray(part["bias"]))


def attended(inputs, mask, params):
    """Of one sequence, head by head and token by token; a token that sees nothing is left at zeros."""
    query, key, value = (affine(inputs, params[name]) for name in ("query", "key", "value"))
    size, output = WIDTH // HEADS, np.zeros_like(inputs)
    for start in range(0, WIDTH, size):
        part = slice(start, start + size)
        for token in range(len(inputs)):
            others = np.flatnonzero(mask[token])
            if len(others):
                weights = np.exp(key[others, part] @ query[token, part] / np.sqrt(size))
                output[token, part] = weights @ value[others, part] / weights.sum()
    return affine(output, params["out"])


def transformed(params, tokens, mask, post_norm: bool) -> np.ndarray:
    """One sequence through two blocks, as the papers of GPT-2 and BERT have it."""
    names = iter(f"ColumnNorm_{index}" for index in range(5))
    hidden = np.asarray(tokens, np.float64)
    if post_norm:
        hidden = norm(hidden, params[next(names)])
    for block in range(2):
        first, second = params[next(names)], params[next(names)]
        attention, up, down = (
            params[name] for name in (f"Attention_{block}", f"Dense_{2 * block}", f"Dense_{2 * block + 1}")
        )
        if post_norm:
            hidden = norm(hidden + attended(hidden, mask, attention), first)
            hidden = norm(hidden + affine(np.tanh(affine(hidden, up)), down), second)
        else:
            hidden = hidden + attended(norm(hidden, first), mask, attention)
            hidden = hidden + affine(np.tanh(affine(norm(hidden, second), up)), down)
    return hidden if post_norm else norm(hidden, params[next(names)])


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_transformer_is_attention_and_a_network_with_residual_connections(post_norm):
    module, params = make_transformer(post_norm)
    outputs = np.asarray(apply(module, params, jnp.asarray(SEQUENCES), jnp.asarray(MASKS)))
    for tokens, mask, output in zip(SEQUENCES, MASKS, outputs, strict=True):
        sees = mask.any(axis=-1)
        np.testing.assert_allclose(
            output[sees], transformed(params, tokens, mask, post_norm)[sees], rtol=1e-4, atol=1e-4
        )
    assert np.isfinite(outputs).all()
    one = jnp.asarray(MASKS[0])
    shared = apply(module, params, jnp.asarray(SEQUENCES[:1]), one)
    np.testing.assert_allclose(shared[0], outputs[0], rtol=1e-5, atol=1e-5)
    single = apply(module, params, jnp.asarray(SEQUENCES[1]), jnp.asarray(MASKS[1]))
    np.testing.assert_allclose(single, outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("post_norm", [False, True])
def test_tokens_that_are_masked_or_see_nothing_change_no_other(post_norm):
    """The second sequence begins with two tokens that nobody sees, and that see nothing themselves."""
    module, params = make_transformer(post_norm)
    mask, weights = jnp.asarray(MASKS[1]), np.linspace(1, 2, WIDTH, dtype=np.float32)

    def total(tokens):
        outputs = apply(module, params, tokens, mask)
        return jnp.sum(weights * outputs[2:]), outputs

    gradient, outputs = jax.grad(total, has_aux=True)(jnp.asarray(SEQUENCES[1]))
    other, moved = jax.grad(total, has_aux=True)(jnp.asarray(SEQUENCES[1]).at[:2].multiply(-50.0))
    np.testing.assert_allclose(outputs[2:], moved[2:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-4)
    assert not np.any(gradient[:2])
    assert np.abs(gradient[2:]).max() > 0.1
    assert np.isfinite(outputs).all()
    short = apply(module, params, jnp.asarray(SEQUENCES[1, 2:]), mask[2:, 2:])
    np.testing.assert_allclose(short, outputs[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("read", [slice(1, None, 3), slice(-1, None), slice(None)])
def test_outputs_that_are_read_alone_are_the_same(post_norm, read):
    module, params = make_transformer(post_norm)
    inputs = {"params": params}, jnp.asarray(SEQUENCES), jnp.asarray(MASKS)
    np.testing.assert_allclose(module.apply(*inputs, read=read), module.apply(*inputs)[:, read], rtol=1e-5, atol=1e-5)


def test_a_transformers_dropout_acts_exactly_if_a_key_is_given():
    module, params = make_transformer(False, dropout=0.5)
    plain, _ = make_transformer(False)
    inputs = jnp.asarray(SEQUENCES), jnp.asarray(MASKS)
    np.testing.assert_allclose(apply(module, params, *inputs), apply(plain, params, *inputs), rtol=1e-6)
    first, again, other = (apply(module, params, *inputs, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_the_share_it_says_at_random_and_keeps_what_is_expected(rate):
    inputs = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (3, 30_001)), jnp.float32)
    outputs = np.asarray(apply_dropout(rate, inputs, 0))
    dropped = outputs == 0
    share = round(rate * 2**16) / 2**16
    deviation = np.sqrt(share * (1 - share) / dropped.size)
    np.testing.assert_allclose(dropped.mean(), share, atol=5 * deviation)
    np.testing.assert_allclose(outputs[~dropped], np.asarray(inputs)[~dropped] / (1 - share), rtol=1e-6)
    # Neighbours, halves of one word, rows and calls are dropped independently: both with probability share^2.
    pairs = [
        (dropped[:, :-1], dropped[:, 1:]),
        (dropped[:-1], dropped[1:]),
        (dropped, apply_dropout(rate, inputs, 1) == 0),
    ]
    for one, other in pairs:
        np.testing.assert_allclose(np.mean(one & other), share**2, atol=5 * share / np.sqrt(one.size))


def apply_dropout(rate: float, inputs: jax.Array, seed: int) -> np.ndarray:
    output = Dropout(rate, deterministic=False).apply({}, inputs, rngs={"dropout": jax.random.key(seed)})
    return np.asarray(output)


def test_dropout_of_each_seed_is_its_own_when_several_are_computed_at_once():
    inputs = jnp.ones((2, 7))
    keys = jax.random.split(jax.random.key(0), 3)
    drop = lambda key: Dropout(0.5, deterministic=False).apply({}, inputs, rngs={"dropout": key})  # noqa: E731
    together = jax.vmap(drop)(keys)
    for key, output in zip(keys, together, strict=True):
        np.testing.assert_array_equal(drop(key), output)
    assert len(np.unique(together.reshape(3, -1), axis=0)) == 3
