"""Entropy, the max-entropy losses and the two sides of the adversarial game.

Every loss returns one value per example; take the mean where you use it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from maxent_aug.checks import at_least_float32, check_number

# Of the gap log2(m) - H, the share H / log2(m) and the wanted share.
_FORMS: dict[str, Callable[[Array, Array, float], Array]] = {
    "printed": lambda gap, share, target: -jnp.log(gap),
    "intended": lambda gap, share, target: jnp.log(gap),
    "gap": lambda gap, share, target: gap,
    "target": lambda gap, share, target: jnp.square(share - target),
}
LOSS_FORMS = tuple(_FORMS)

# The smallest gap log2(m) - H, in bits, that float32 tells from rounding, of up to hundreds of
# classes. Below it the logarithm of the paper's loss is held constant, so that the uniform
# distribution has a finite loss.
MIN_GAP = 1e-6


def entropy(logits: ArrayLike) -> Array:
    """Entropy of softmax(logits), in bits.

    Args:
      logits: [..., m] unnormalised log-probabilities, any finite value.

    Returns:
      [...] float32 in [0, log2 m], finite with a finite gradient also for one-hot predictions.

    Raises:
      ValueError: if there are fewer than two classes.
    """
    logits = _check_classes(logits)
    # exp(-200) is 0 in float32, so the floor changes no value; it keeps 0 * log 0 from being NaN.
    log_p = jnp.maximum(jax.nn.log_softmax(logits.astype(jnp.float32)), -200.0)
    bits = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1) / math.log(2.0)
    return _clip(bits, 0.0, math.log2(logits.shape[-1]))


def uncertainty(logits: ArrayLike) -> Array:
    """h = H / log2 m: the entropy as a share of the most that m classes can have.

    Args:
      logits: as of `entropy`.

    Returns:
      [...] float32 in [0, 1], with `entropy`'s gradient.

    Raises:
      ValueError: if there are fewer than two classes.
    """
    logits = _check_classes(logits)
    return entropy(logits) / math.log2(logits.shape[-1])


def max_entropy_loss(logits: ArrayLike, *, form: str = "printed", target: float = 0.3) -> Array:
    """The loss that is to drive the augmenter towards uncertain predictions, L_ME of the paper.

    With H = entropy(logits) in bits and m classes, `form` names one of

    - `printed`: -log(log2 m - H), as the paper prints it. It *grows* with H, so minimising it
      makes predictions more certain: the identity is its optimum on a fitted classifier.
    - `intended`: log(log2 m - H), the sign that the paper's text asks for. It falls without
      bound as the prediction approaches the uniform one.
    - `gap`: log2 m - H, the same direction with a bounded slope.
    - `target`: (H / log2 m - target)^2, which asks for a share of the possible uncertainty.

    Args:
      logits: [..., m], m >= 2.
      form: one of the above.
      target: the wanted H / log2 m, in [0, 1]; used by `target` only.

    Returns:
      [...] float32, finite everywhere.

    Raises:
      ValueError: on an unknown form, a target outside [0, 1] or fewer than two classes.
    """
    if form not in _FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(LOSS_FORMS)}")
    check_number("target", target, 0, 1)
    logits = _check_classes(logits)
    bits, most = entropy(logits), math.log2(logits.shape[-1])
    return _FORMS[form](jnp.maximum(most - bits, MIN_GAP), bits / most, target)


def discriminator_loss(real_logits: ArrayLike, fake_logits: ArrayLike) -> Array:
    """Minus what the discriminator maximises: -(log D(I) + log(1 - D(I'))).

    Args:
      real_logits: [...] logit of D on original images; D = sigmoid(logit).
      fake_logits: [...] logit of D on augmented images, the same shape.

    Returns:
      [...] nats, float32, at least 0; 2 log 2 = 1.386 when D cannot tell the two apart.

    Raises:
      ValueError: on two shapes.
    """
    real, fake = jnp.asarray(real_logits, jnp.float32), jnp.asarray(fake_logits, jnp.float32)
    if real.shape != fake.shape:
        raise ValueError(f"logits must have one shape, got {real.shape} {fake.shape}")
    return -(jax.nn.log_sigmoid(real) + jax.nn.log_sigmoid(-fake))


def generator_loss(fake_logits: ArrayLike, *, saturating: bool = True) -> Array:
    """The augmenter's side of the game, to be minimised.

    Args:
      fake_logits: [...] logit of D on augmented images.
      saturating: log(1 - D(I')) as in the paper's objective V; False gives -log D(I')
        (Goodfellow et al. 2014, section 3), whose gradient survives a winning discriminator.

    Returns:
      [...] nats, float32.
    """
    fake = jnp.asarray(fake_logits, jnp.float32)
    return jax.nn.log_sigmoid(-fake) if saturating else -jax.nn.log_sigmoid(fake)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Cross-entropy of labels or of probabilities.

    Args:
      logits: [..., m].
      labels: [...] integers in [0, m), which is not checked, or [..., m] probabilities.

    Returns:
      [...] nats, float32.

    Raises:
      ValueError: on labels of another shape, or no integers where those are wanted.
    """
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    if labels.shape == logits.shape:
        likely = jnp.where(labels > 0, jax.nn.log_softmax(logits), 0.0)  # 0 log 0 is 0
        return -(labels.astype(jnp.float32) * likely).sum(-1)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers {logits.shape[:-1]} or probabilities {logits.shape}, "
            f"got {labels.dtype} {labels.shape}"
        )
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def loss_ranking_loss(predicted: Array, losses: Array, *, margin: float = 1.0) -> Array:
    """Asks that of each pair of images the one with the larger loss is predicted to have it.

    max(0, margin - sign(l_i - l_j) (p_i - p_j)) for image i of the first half of the batch and
    image j = i + B // 2; an odd last image has no pair.

    Args:
      predicted: [B].
      losses: [B], without gradient.
      margin: xi.

    Returns:
      [B // 2].

    Source: Yoo and Kweon 2019, "Learning loss for active learning", equation 2.
    """
    half = len(losses) // 2
    sign = jnp.sign(jax.lax.stop_gradient(losses[:half] - losses[half : 2 * half]))
    return jnp.maximum(0.0, margin - sign * (predicted[:half] - predicted[half : 2 * half]))


def _check_classes(logits: ArrayLike) -> Array:
    logits = at_least_float32(logits, "logits")
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(f"logits have shape {logits.shape}; the last axis needs 2 classes or more")
    return logits


def _clip(value: Array, low: float, high: float) -> Array:
    """Clips rounding errors away in value; the gradient is that of `value`."""
    return value + jax.lax.stop_gradient(jnp.clip(value, low, high) - value)
