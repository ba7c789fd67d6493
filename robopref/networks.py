"""Network modules (Flax linen), observation normalisation, and the one typed way to apply a module.

Observations are vectors [O] or images [H, W, C] with values from 0 to 255. The encoder of images is that of DrQ-v2
(Yarats et al. 2021, "Mastering visual continuous control", arXiv:2107.09645).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float

from robopref.types import Key, PyTree


class Normalizer(struct.PyTreeNode):
    """Standardises observations: (x - mean) / std. It is part of the agent, so a checkpoint can never miss it."""

    mean: Float[Array, "*O"]
    std: Float[Array, "*O"]

    @classmethod
    def identity(cls, observation_shape: Sequence[int]) -> Normalizer:
        """Leaves vectors as they are. Images are scaled by their encoder: theirs is one number for all pixels."""
        shape = () if len(observation_shape) > 1 else tuple(observation_shape)
        return cls(mean=jnp.zeros(shape), std=jnp.ones(shape))

    @classmethod
    def fit(cls, observations: Float[np.ndarray, "N O"]) -> Normalizer:
        """The mean and standard deviation of each dimension.

        A dimension that hardly moves in the data (standard deviation below 1e-4) is centred but not scaled: dividing by
        almost nothing would turn the smallest deviation on a robot into an enormous input.
        """
        mean = np.mean(observations, axis=0, dtype=np.float64)
        std = np.std(observations, axis=0, dtype=np.float64)
        std = np.where(std < 1e-4, 1.0, std)
        return cls(mean=jnp.asarray(mean, jnp.float32), std=jnp.asarray(std, jnp.float32))

    def __call__(self, observations: Float[Array, "*B *O"]) -> Float[Array, "*B *O"]:
        return (observations - self.mean) / self.std


@dataclass(frozen=True)
class Pixels:
    """How an agent sees images.

    Attributes:
        filters: of each convolution.
        strides: of the convolutions, one after the other; kernels are 3 by 3.
        features: what each network projects the convolutions' output to.
        shift: by how many pixels images are shifted at random while training, at most, along each axis.
    """

    filters: int = 32
    strides: tuple[int, ...] = (2, 1, 1, 1)
    features: int = 50
    shift: int = 4


class Conv(nn.Module):
    """A convolution with 3 by 3 kernels and no padding."""

    filters: int
    stride: int

    @nn.compact
    def __call__(self, images: Float[Array, "*B H W C"]) -> Float[Array, "*B h w filters"]:
        initializer = nn.initializers.orthogonal(jnp.sqrt(2.0))
        kernel = self.param("kernel", initializer, (3, 3, images.shape[-1], self.filters))
        bias = self.param("bias", nn.initializers.zeros, (self.filters,))
        flat = images.reshape(-1, *images.shape[-3:])
        # Agents are trained in a loop, in which XLA's own convolutions are 5 to 16 times slower on a processor.
        convolved: Array = jax.lax.platform_dependent(
            flat,
            kernel,
            cpu=partial(_multiply_patches, stride=self.stride),
            default=partial(_convolve, stride=self.stride),
        )
        return convolved.reshape(*images.shape[:-3], *convolved.shape[1:]) + bias


def _convolve(images: Float[Array, "N H W C"], kernel: Float[Array, "3 3 C F"], *, stride: int) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, (stride, stride), "VALID", dimension_numbers=layout)


def _multiply_patches(images: Float[Array, "N H W C"], kernel: Float[Array, "3 3 C F"], *, stride: int) -> Array:
    """The same as a product of matrices, with the nine pixels that each output sees side by side."""
    down, right = ((size - 3) // stride * stride + 1 for size in images.shape[1:3])
    patches = [images[:, i : i + down : stride, j : j + right : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class Convolutions(nn.Module):
    """Images with values from 0 to 255 to one flat vector each."""

    pixels: Pixels

    @nn.compact
    def __call__(self, images: Float[Array, "*B H W C"]) -> Float[Array, "*B F"]:
        hidden = images / 255.0 - 0.5
        for stride in self.pixels.strides:
            hidden = nn.relu(Conv(self.pixels.filters, stride)(hidden))
        return hidden.reshape(*hidden.shape[:-3], -1)


class Trunk(nn.Module):
    """The output of `Convolutions` to a few features between -1 and 1."""

    features: int

    @nn.compact
    def __call__(self, encoded: Float[Array, "*B F"]) -> Float[Array, "*B features"]:
        return jnp.tanh(nn.LayerNorm()(nn.Dense(self.features, kernel_init=nn.initializers.orthogonal(1.0))(encoded)))


class Dense(nn.Module):
    """An affine map of the columns of a matrix, or without a bias a linear one."""

    features: int
    initializer: nn.initializers.Initializer = nn.initializers.orthogonal(1.0)
    bias: bool = True

    @nn.compact
    def __call__(self, columns: Float[Array, "I N"]) -> Float[Array, "features N"]:
        kernel = self.param("kernel", self.initializer, (columns.shape[0], self.features))
        product: Array = kernel.T @ columns
        if not self.bias:
            return product
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return product + bias[:, None]


class MLP(nn.Module):
    """Fully connected ReLU network with orthogonal initialisation and dropout after each hidden layer.

    Samples are columns inside. Then each product of the backward pass has a form that XLA multiplies as fast on a
    processor as those of the forward pass; with samples as rows, gradients of kernels are 1.3 to 10 times slower.
    """

    hidden_dims: Sequence[int]
    output_dim: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B I"], *, deterministic: bool = True) -> Float[Array, "*B out"]:
        # Behind the barrier, XLA really transposes what else it would read transposed in each product.
        columns: Array = jax.lax.optimization_barrier(inputs.reshape(-1, inputs.shape[-1]).T)  # type: ignore[no-untyped-call]
        for width in self.hidden_dims:
            columns = nn.relu(Dense(width, nn.initializers.orthogonal(math.sqrt(2.0)))(columns))
            if self.dropout > 0:
                columns = nn.Dropout(self.dropout, deterministic=deterministic)(columns)
        return Dense(self.output_dim)(columns).T.reshape(*inputs.shape[:-1], self.output_dim)


class DeterministicPolicy(nn.Module):
    """An MLP whose output passes through tanh, so that actions lie in [-1, 1]; with `pixels`, behind an encoder."""

    hidden_dims: Sequence[int]
    action_dim: int
    dropout: float = 0.0
    pixels: Pixels | None = None

    @nn.compact
    def __call__(self, observations: Float[Array, "*B *O"], *, deterministic: bool = True) -> Float[Array, "*B A"]:
        if self.pixels is not None:
            observations = Trunk(self.pixels.features)(Convolutions(self.pixels)(observations))
        return jnp.tanh(MLP(self.hidden_dims, self.action_dim, self.dropout)(observations, deterministic=deterministic))


class Dropout(nn.Module):
    """Sets a share of the inputs to 0 and scales up the others, so that what is expected stays.

    The share is a multiple of 2^-16: one call of the generator decides about four numbers, where `nn.Dropout`, which
    takes up to a fifth of an update on a processor, has one for each.
    """

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B"]) -> Float[Array, "*B"]:
        dropped = round(self.rate * 2**16)
        if self.deterministic or not dropped:
            return inputs
        seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        words = threefry_2x32(seed, jnp.arange((inputs.size + 1) // 2, dtype=jnp.uint32))
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: inputs.size]
        return jnp.where(halves.reshape(inputs.shape) >= dropped, inputs / (1 - dropped / 2**16), 0.0)


class ColumnNorm(nn.Module):
    """Layer normalisation of the columns of a matrix."""

    @nn.compact
    def __call__(self, columns: Float[Array, "E N"]) -> Float[Array, "E N"]:
        width = columns.shape[0]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        # Means as products, which are quicker on a processor than reductions along columns.
        mean = partial(jnp.matmul, jnp.full((1, width), 1 / width), precision="highest")
        centred = columns - mean(columns)
        normalized: Array = centred * jax.lax.rsqrt(mean(jnp.square(centred)) + 1e-6)
        return normalized * scale[:, None] + bias[:, None]


class Attention(nn.Module):
    """Dot-product attention of tokens, the columns of a matrix, to others of the same sequence.

    Keys have no bias: it would add the same to all that a token compares, and so change nothing.
    """

    heads: int
    dropout: float
    deterministic: bool

    @nn.compact
    def __call__(
        self, to: Float[Array, "E Bn"], columns: Float[Array, "E BN"], mask: Bool[Array, "#B n N"]
    ) -> Float[Array, "E Bn"]:
        width = columns.shape[0]
        project = partial(Dense, width, nn.initializers.lecun_normal())

        def split(projected: Float[Array, "E BN"], length: int) -> Float[Array, "B H D N"]:
            parts = projected.reshape(self.heads, width // self.heads, -1, length)
            # Behind the barrier, each head is multiplied as it lies.
            return jax.lax.optimization_barrier(jnp.transpose(parts, (2, 0, 1, 3)))  # type: ignore[no-any-return, no-untyped-call]

        queries = split(project(name="query")(to), mask.shape[-2])
        keys = split(project(bias=False, name="key")(columns), mask.shape[-1])
        values = split(project(name="value")(columns), mask.shape[-1])
        logits = jnp.einsum("bhdn,bhdm->bhnm", queries, keys) / math.sqrt(width // self.heads)
        weights = jax.nn.softmax(jnp.where(mask[:, None], logits, np.finfo(np.float32).min), axis=-1)
        seen = jnp.einsum("bhdm,bhnm->bhdn", values, Dropout(self.dropout, self.deterministic)(weights))
        joined: Array = jax.lax.optimization_barrier(jnp.transpose(seen, (1, 2, 0, 3)))  # type: ignore[no-untyped-call]
        attended: Array = project(name="out")(joined.reshape(width, -1))
        return attended


class Transformer(nn.Module):
    """Blocks of self-attention and a network of one hidden layer, four times as wide, each with a residual connection.

    Layer normalisation comes before either part, and once more at the end (GPT-2), or after each residual connection
    (`post_norm`; BERT). Attention goes from every token to those that `mask` allows; a token that sees none, as padding
    may be, gives something finite that no other token sees. Where only some outputs are looked at, `read` says which:
    the last block computes no others.

    Tokens are columns inside, for the reason that samples are in `MLP`.
    """

    layers: int
    heads: int
    dropout: float = 0.0
    post_norm: bool = False
    activation: Callable[[Array], Array] = nn.gelu

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "*B N E"],
        mask: Bool[Array, "*#B N N"],
        *,
        read: slice = slice(None),
        deterministic: bool = True,
    ) -> Float[Array, "*B n E"]:
        *batch, length, width = tokens.shape
        allowed = jnp.broadcast_to(mask, (*batch, length, length)) if mask.ndim > 2 else mask
        allowed = allowed.reshape(-1, length, length)
        dropout, dense = (
            partial(Dropout, self.dropout, deterministic),
            partial(Dense, initializer=nn.initializers.lecun_normal()),
        )
        hidden: Array = jax.lax.optimization_barrier(tokens.reshape(-1, width).T)  # type: ignore[no-untyped-call]
        hidden = dropout()(ColumnNorm()(hidden) if self.post_norm else hidden)
        for layer in range(self.layers):
            wanted = read if layer == self.layers - 1 else slice(None)
            attend = Attention(self.heads, self.dropout, deterministic)
            normalize, renormalize = ColumnNorm(), ColumnNorm()
            seen = hidden if self.post_norm else normalize(hidden)
            attended = attend(_some(seen, length, wanted), seen, allowed[:, wanted])
            hidden = _some(hidden, length, wanted) + dropout()(attended)
            hidden = normalize(hidden) if self.post_norm else hidden
            inner = self.activation(dense(4 * width)(hidden if self.post_norm else renormalize(hidden)))
            hidden = hidden + dropout()(dense(width)(inner))
            hidden = renormalize(hidden) if self.post_norm else hidden
        output: Array = hidden if self.post_norm else ColumnNorm()(hidden)
        return output.T.reshape(*batch, -1, width)


def _some(columns: Float[Array, "E BN"], length: int, which: slice) -> Float[Array, "E Bn"]:
    """Some of the tokens of each sequence of this length."""
    if which == slice(None):
        return columns
    width = columns.shape[0]
    return columns.reshape(width, -1, length)[:, :, which].reshape(width, -1)


def interleave(tokens: Sequence[Float[Array, "*B T E"]]) -> Float[Array, "*B N E"]:
    """The tokens of the first step, in the order of the list, then those of the second, and so on."""
    stacked = jnp.stack(tokens, axis=-2)
    return stacked.reshape(*stacked.shape[:-3], -1, stacked.shape[-1])


def observation_shape(observations: Array, pixels: Pixels | None) -> tuple[int, ...]:
    """The shape of one observation of a batch: of vectors, or of images where `pixels` are given."""
    return observations.shape[-1:] if pixels is None else observations.shape[-3:]


def explore(actions: Float[Array, "*B A"], noise: float, key: Key) -> Float[Array, "*B A"]:
    """The actions of a deterministic policy with Gaussian noise of this standard deviation, kept in [-1, 1]."""
    return jnp.clip(actions + noise * jax.random.normal(key, actions.shape), -1, 1)


def init(module: nn.Module, key: Key, *inputs: Array) -> PyTree:
    """Fresh parameters of `module` for inputs of these shapes."""
    return module.init(key, *inputs)["params"]


def apply(module: nn.Module, params: PyTree, *inputs: Array, dropout_key: Key | None = None) -> Array:
    """`module`'s output; dropout is active exactly if a key is given."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    output: Array = module.apply({"params": params}, *inputs, deterministic=dropout_key is None, rngs=rngs)  # type: ignore[assignment]
    return output
