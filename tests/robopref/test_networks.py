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
    Normalizer,
    Pixels,
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
