"""The three networks: residual classifiers, the spatial-transformer augmenter, the discriminator.

All take images [B, H, W, C] of any size from 4x4 up and any number of channels, and raise
ValueError for another number of dimensions.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from maxent_aug.color import ColorBounds, adjust_color
from maxent_aug.spatial import (
    WIDE_BOUNDS,
    AffineBounds,
    affine_matrix,
    bounded_affine,
    warp_affine,
)

# As torchvision initialises its ResNets.
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
Conv3x3 = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=fan_out_normal)
Conv1x1 = partial(nn.Conv, kernel_size=(1, 1), use_bias=False, kernel_init=fan_out_normal)


def _check_images(images: Array) -> None:
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point [B, H, W, C], got {images.dtype} {images.shape}"
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015, figure 5 left)."""

    features: int
    norm: Callable[..., nn.Module]
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv3x3(self.features, strides=self.stride, dtype=self.dtype)(x)
        y = nn.relu(self.norm()(y))
        y = self.norm()(Conv3x3(self.features, dtype=self.dtype)(y))
        return nn.relu(y + _shortcut(self, x, self.features))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut (He et al. 2015, figure 5 right)."""

    features: int
    norm: Callable[..., nn.Module]
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(self.norm()(Conv1x1(self.features, dtype=self.dtype)(x)))
        y = Conv3x3(self.features, strides=self.stride, dtype=self.dtype)(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(Conv1x1(4 * self.features, dtype=self.dtype)(y))
        return nn.relu(y + _shortcut(self, x, 4 * self.features))


def _shortcut(block: BasicBlock | BottleneckBlock, x: Array, features: int) -> Array:
    """The identity where shapes agree, else a projection (He et al. 2015, option B)."""
    if block.stride == 1 and x.shape[-1] == features:
        return x
    return block.norm()(Conv1x1(features, strides=block.stride, dtype=block.dtype)(x))


class ResNet(nn.Module):
    """A residual classifier with the CIFAR stem: one 3x3 convolution, no pooling.

    Attributes:
      num_classes: m, 2 or more.
      stage_sizes: blocks in each stage; each stage after the first halves the resolution.
      block: BasicBlock or BottleneckBlock.
      width: features of the first stage; each stage doubles them.
      dtype: of the computation. Weights, batch statistics and logits are float32.

    Source: He et al. 2015, "Deep residual learning for image recognition", sections 3.3 and 4.2.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    block: type[BasicBlock] | type[BottleneckBlock] = BasicBlock
    width: int = 64
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.stage_sizes = tuple(self.stage_sizes)  # a module is hashed where it is compiled
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, with_stages: bool = False) -> Any:
        """Maps images [B, H, W, C] to logits [B, num_classes].

        With train=True batch statistics are those of the batch, and the running ones are updated
        (apply with mutable=["batch_stats"]). With with_stages=True the result is (logits, means
        over the pixels after each stage, [B, features] each).
        """
        _check_images(images)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        x = nn.relu(norm()(Conv3x3(self.width, dtype=self.dtype)(images)))
        stages = []
        for stage, blocks in enumerate(self.stage_sizes):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(self.width * 2**stage, norm, stride, self.dtype)(x)
            stages.append(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))
        logits = nn.Dense(self.num_classes)(stages[-1])
        return (logits, stages) if with_stages else logits


ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock)
# 0.15 M weights: for a CPU and for small images. XLA's convolutions with 24 channels run several
# times slower on a CPU than those with 16 or 32.
ResNetSmall = partial(ResNet, stage_sizes=(1, 1, 2), width=16)


def _downsample(x: Array, width: int, activation: Callable[[Array], Array]) -> Array:
    """Strided convolutions until the shorter side is at most 4, flattened: [B, features]."""
    _check_images(x)
    while min(x.shape[1:3]) > 4:
        x = activation(nn.Conv(width, (3, 3), strides=2, kernel_init=fan_out_normal)(x))
        width = min(2 * width, 128)
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


START_WIDTH = 0.1  # of the noise of a new stochastic `Augmenter`


def _identity(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """An initialiser: the identity transform, row by row."""
    del key
    return jnp.eye(2, 3, dtype=dtype).reshape(shape)


class Localization(nn.Module):
    """The localisation network of a spatial transformer: images [B, H, W, C] -> [B, outputs].

    Starts at bias_init, by default the identity transform, for every image: the last layer has zero
    weights, and a gradient that is not zero. Source: Jaderberg et al. 2015, section 3.1; the layers
    are ours.
    """

    width: int = 16
    hidden: int = 64
    outputs: int = 6
    bias_init: Callable[..., Array] = _identity

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = _downsample(images.astype(jnp.float32), self.width, nn.relu)
        x = nn.relu(nn.Dense(self.hidden, kernel_init=fan_out_normal)(x))
        zeros = nn.initializers.zeros
        return nn.Dense(self.outputs, kernel_init=zeros, bias_init=self.bias_init)(x)


class Augmenter(nn.Module):
    """A spatial transformer: chooses an affine transform for each image and applies it.

    Attributes:
      padding_mode: what lies outside the image, as in `grid_sample`.
      width, hidden: size of the localisation network.
      bounds: of the six coordinates of the transform; None leaves theta free, as in the paper.
      stochastic: whether uniform noise is added to what is chosen, of widths that are chosen too
        and begin at `START_WIDTH`.

    Source: Jaderberg et al. 2015, "Spatial transformer networks".
    """

    padding_mode: str = "zeros"
    width: int = 16
    hidden: int = 64
    bounds: AffineBounds | None = None
    stochastic: bool = False

    @nn.compact
    def __call__(self, images: Array, key: Array | None = None) -> tuple[Array, Array]:
        """Maps images [B, H, W, C] to (augmented [B, H, W, C], theta [B, 2, 3]).

        Raises ValueError if it is stochastic and gets no key.
        """
        _check_images(images)
        outputs = 12 if self.stochastic else 6
        start = _identity if self.bounds is None else nn.initializers.zeros

        def bias(key: Array, shape: Sequence[int], dtype: Any) -> Array:
            widths = jnp.full(shape[0] - 6, START_WIDTH, dtype)
            return jnp.concatenate([start(key, (6,), dtype), widths])

        chosen = Localization(self.width, self.hidden, outputs, bias)(images)
        if self.stochastic:
            if key is None:
                raise ValueError("a stochastic augmenter needs a key")
            chosen, widths = jnp.split(chosen, 2, axis=-1)
            chosen += widths * jax.random.uniform(key, chosen.shape, minval=-1.0)
        if self.bounds is None:
            theta = chosen.reshape(-1, 2, 3)
        else:
            theta = bounded_affine(jnp.tanh(chosen), self.bounds, size=images.shape[1:3])
        return warp_affine(images, theta, padding_mode=self.padding_mode), theta


class Box(NamedTuple):
    """What a `StochasticAugmenter` has learned for each image.

    half_width is [B, 6] shares of the bounds, with colours [B, 10]. log_volume is [B], summed over
    the coordinates: log((half_width - least_width) / (1 - least_width)). edge is [B] a cost, 0 far
    from the bounds, that grows towards the largest widths with a gradient that does not vanish,
    where all other gradients do.
    """

    half_width: Array
    log_volume: Array
    edge: Array


class StochasticAugmenter(nn.Module):
    """Learns for each image a box of affine transforms about the identity, and draws one from it.

    The box depends on the image's uncertainty, h = H / log2 m in [0, 1], to a classifier: what an
    image can bear is seen in how certain the classifier is of it, hardly in its pixels.

    The coordinates of the transform, six and four of colour, are bounds * half_width * r, r uniform
    in [-1, 1]; half_width is at most 1, so that no bound is ever passed, and at least
    `least_width`, so that the transform cannot become a constant. The draw is differentiable in it
    (Kingma and Welling 2014, the reparametrisation). A narrower box always leads back to the image
    as it is: one with a centre of its own may shrink far away from it.

    Attributes:
      bounds: of the six coordinates.
      interpolation, padding_mode: mode and padding_mode of `grid_sample`. What is blurred, or has
        empty corners, costs certainty that its transform alone would not.
      start_width: half_width of every coordinate of a new augmenter, between least_width and 1.
      least_width: above 0.
      share: of the images that get an affine transform: by chance in a call, a fixed number in
        training (`partition`).
      others_shift: by which the other images are shifted at most, to either side and up or down, as
        a share of width and height; by whole pixels, and so without blur. None leaves them as they
        are, their colours, too.
      uncertainty: assumed of images whose uncertainty is not given.
      hidden: units of the network from uncertainty to box.
      color: bounds of four coordinates more, of `adjust_color`, for images of three channels, all
        of which they change (but see others_shift); None leaves colours as they are.
    """

    bounds: AffineBounds = WIDE_BOUNDS
    interpolation: str = "bicubic"
    padding_mode: str = "reflection"
    start_width: float = 0.5
    least_width: float = 0.02
    share: float = 0.5
    others_shift: float | None = 0.0
    uncertainty: float = 0.2
    hidden: int = 64
    color: ColorBounds | None = None

    def setup(self) -> None:
        if not 0 < self.least_width < self.start_width < 1:
            raise ValueError(
                f"start_width must be between least_width, {self.least_width}, which is above 0, "
                f"and 1, got {self.start_width}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0, at most 1, got {self.share}")
        if self.others_shift is not None and not 0 <= self.others_shift <= 1:
            raise ValueError(f"others_shift must be None or in [0, 1], got {self.others_shift}")
        if not 0 <= self.uncertainty <= 1:
            raise ValueError(f"uncertainty must be in [0, 1], got {self.uncertainty}")
        room = 1 - self.least_width
        start = (self.start_width - self.least_width) / room
        odds = jnp.log(start / (1 - start))
        zeros, bias = nn.initializers.zeros, nn.initializers.constant(odds)
        self.hidden_layer = nn.Dense(self.hidden, kernel_init=fan_out_normal)
        outputs = len(self.bounds) + len(self.color or ())
        self.output_layer = nn.Dense(outputs, kernel_init=zeros, bias_init=bias)
        if self.is_initializing():  # what `matching_step` remembers
            for name in ("augmented", "unseen", "half_width"):
                self.variable("batch_stats", name, jnp.zeros, (), jnp.float32)

    def box(self, uncertainty: Array) -> Box:
        """The box of an image of each uncertainty [B]."""
        # Linear and log: most images are near either end of [0, 1].
        features = jnp.stack([3 * uncertainty, 3 + 0.6 * jnp.log(uncertainty + 1e-4)], axis=-1)
        raw = self.output_layer(nn.silu(self.hidden_layer(features)))
        half_width = self.least_width + (1 - self.least_width) * nn.sigmoid(raw)
        # Of shares s from 0 to 1: log s, and -log(1 - s) / 20, which together are best at 20 / 21.
        log_volume, edge = nn.log_sigmoid(raw), nn.softplus(raw) / 20
        return Box(half_width, log_volume.sum(-1), edge.sum(-1))

    def draw(
        self, half_width: Array, key: Array, size: Sequence[int]
    ) -> tuple[Array, Array | None]:
        """theta [B, 2, 3], and color [B, 4] of `adjust_color`, drawn from each image's box.

        size: (height, width) of the images.
        """
        shares = half_width * jax.random.uniform(
            key, half_width.shape, half_width.dtype, minval=-1.0
        )
        affine, color = jnp.split(shares, [len(self.bounds)], axis=-1)
        theta = bounded_affine(affine, self.bounds, size=size)
        return theta, None if self.color is None else color * jnp.array([self.color], color.dtype)

    def partition(self, count: int) -> tuple[int, int]:
        """(groups, number): how many images are transformed, of so many in random order.

        The first `number` of each of so many equal groups. Groups are 8, if that divides the
        images, so that up to 8 devices have equal parts, and need not send images to each other.
        The share is therefore rounded, by up to half an image a group.
        """
        groups = math.gcd(count, 8) if self.share * count >= 8 else 1
        return groups, max(1, round(self.share * count / groups))

    def __call__(
        self,
        images: Array,
        key: Array,
        uncertainty: Array | None = None,
        chosen: Array | None = None,
    ) -> tuple[Array, Array]:
        """Maps images [B, H, W, C] to (augmented [B, H, W, C], theta [B, 2, 3]).

        Which get an affine transform is drawn, or chosen [B]; uncertainty [B] matters to the others
        for their colours alone.
        """
        return self.augment(images, key, uncertainty, chosen)[:2]

    def augment(
        self,
        images: Array,
        key: Array,
        uncertainty: Array | None = None,
        chosen: Array | None = None,
    ) -> tuple[Array, Array, Array | None]:
        """As a call, with what was done to colours, too: (augmented, theta, color [B, 4])."""
        draw_key, chosen_key, shift_key = jax.random.split(key, 3)
        if chosen is None:
            chosen = jax.random.bernoulli(chosen_key, float(self.share), images.shape[:1])
        half_width = self._boxes(images, uncertainty).half_width
        theta, color = self.draw(half_width, draw_key, images.shape[1:3])
        if self.others_shift is None:
            theta = jnp.where(chosen[:, None, None], theta, jnp.eye(2, 3, dtype=theta.dtype))
            changed = self._change(images, theta, color)
            color = None if color is None else jnp.where(chosen[:, None], color, 0.0)
            return jnp.where(chosen[:, None, None, None], changed, images), theta, color
        shift = self._shift(images, shift_key, self.others_shift)
        theta = jnp.where(chosen[:, None, None], theta, shift.astype(theta.dtype))
        return self._change(images, theta, color), theta, color

    def transform(
        self, images: Array, key: Array, uncertainty: Array | None = None
    ) -> tuple[Array, Array, Array | None, Box]:
        """(augmented, theta, color, box), all with an affine transform, whatever `share` is."""
        box = self._boxes(images, uncertainty)
        return *self.apply_width(images, box.half_width, key), box

    def apply_width(
        self, images: Array, half_width: Array, key: Array
    ) -> tuple[Array, Array, Array | None]:
        """(augmented, theta, color) drawn from given boxes, all with an affine transform."""
        theta, color = self.draw(half_width, key, images.shape[1:3])
        return self._change(images, theta, color), theta, color

    def _boxes(self, images: Array, uncertainty: Array | None) -> Box:
        _check_images(images)
        if self.color is not None and images.shape[-1] != 3:
            raise ValueError(f"color must be None for images of {images.shape[-1]} channels")
        if uncertainty is None:
            uncertainty = jnp.full(images.shape[:1], self.uncertainty, jnp.float32)
        if uncertainty.shape != images.shape[:1]:
            raise ValueError(
                f"uncertainty must be [B] with B = {len(images)}, got {uncertainty.shape}"
            )
        return self.box(uncertainty)

    def _change(self, images: Array, theta: Array, color: Array | None) -> Array:
        mode, padding_mode = self.interpolation, self.padding_mode
        warped = warp_affine(images, theta, mode=mode, padding_mode=padding_mode)
        return warped if color is None else adjust_color(warped, color).astype(images.dtype)

    def _shift(self, images: Array, key: Array, most_of_size: float) -> Array:
        """theta [B, 2, 3] of a shift by whole pixels."""
        batch, height, width, _ = images.shape
        size = np.array([[width, height]])
        most = np.rint(most_of_size * size).astype(int)
        pixels = jax.random.randint(key, (batch, 2), -most, most + 1)
        return affine_matrix(translation=2 * pixels / size)


class Discriminator(nn.Module):
    """Original or augmented? A small DCGAN-style network: images [B, H, W, C] -> logits [B].

    Without batch normalisation, so that each image is judged by itself. Ours: the paper names no
    network. Source: Radford et al. 2015, "Unsupervised representation learning with DCGAN".
    """

    width: int = 32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = _downsample(images, self.width, partial(nn.leaky_relu, negative_slope=0.2))
        return nn.Dense(1)(x)[:, 0]


class LossPredictor(nn.Module):
    """A classifier that can also predict its own loss on each image.

    Attributes:
      classifier: a ResNet.
      hidden: features of each stage of the classifier that the prediction is made from.

    Source: Yoo and Kweon 2019, "Learning loss for active learning", section 3.2.
    """

    classifier: ResNet
    hidden: int = 128

    def setup(self) -> None:
        self.stages = [nn.Dense(self.hidden) for _ in self.classifier.stage_sizes]
        self.head = nn.Dense(1)

    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Maps images [B, H, W, C] to logits [B, num_classes]."""
        return self.with_loss(images, train=train)[0]

    def with_loss(
        self, images: Array, *, train: bool = False, backbone_learns: Array | bool = True
    ) -> tuple[Array, Array]:
        """Maps images to (logits, predicted losses [B]).

        With backbone_learns=False the prediction has no gradient in the classifier.
        """
        logits, stages = self.classifier(images, train=train, with_stages=True)
        stages = [jnp.where(backbone_learns, x, jax.lax.stop_gradient(x)) for x in stages]
        hidden = [nn.relu(dense(x)) for dense, x in zip(self.stages, stages, strict=True)]
        return logits, self.head(jnp.concatenate(hidden, axis=-1))[:, 0]
