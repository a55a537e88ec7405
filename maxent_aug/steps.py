"""One pure step a phase: (state, images, labels, key) -> (state, metrics), and evaluations.

Phases 1 and 3 change the classifier alone, phase 2 the augmenter and the discriminator alone, the
joint phase classifier and augmenter. Images are float32, normalised (see `normalize`). A step's
metrics are scalars, means over the batch or running ones, and finite: where one is not, a run ends.
The key is for what is random in a step; the steps of the paper draw nothing.

Compile them: eager steps take a hundred times as long. On several devices give `jax.jit` a batch
that is divided among them; in `jax.shard_map` weights that are alike on all devices get the sum of
their gradients, not the mean.

A step or an evaluation that needs an augmenter raises ValueError on a state without one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from flax.training.train_state import TrainState
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from maxent_aug import losses
from maxent_aug.checks import check_image_shape, check_number

Metrics = dict[str, Array]

PRICE = 200.0  # log volume that 1 of h is worth where s = 1/2, at the tolerance
MOST = 1e6  # of a tolerance or strictness
MEMORY = 0.98  # decay of `matching_step`'s running means, with an update in every step


class ModelState(TrainState):
    """A flax TrainState with statistics: of batch normalisation, of `matching_step`, or {}."""

    batch_stats: Any = struct.field(default_factory=dict)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The network, or its method named by `method=`, in evaluation mode."""
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        return self.apply_fn(variables, *inputs, **options)


class State(struct.PyTreeNode):
    """The three networks of the paper; None for those that a phase does not have.

    And, where they are recorded, the augmenter's weights in the course of a joint phase: the tree
    of its params with an axis of snapshots before the others.
    """

    classifier: ModelState
    augmenter: ModelState | None = None
    discriminator: ModelState | None = None
    snapshots: Any = None


def create_model_state(
    module: nn.Module,
    key: Array,
    image_shape: tuple[int, ...],
    tx: optax.GradientTransformation,
    *inputs: Any,
) -> ModelState:
    """Initialises a network.

    Args:
      module: maps images [B, H, W, C] to anything; beside weights it may have batch statistics.
      key: a typed random key.
      image_shape: (H, W, C).
      tx: the optimiser, one that needs no more than gradients and weights.
      inputs: what the module takes beside the images; of a `StochasticAugmenter` a key.

    Returns:
      Its weights, float32, with the optimiser's state, before the first update.

    Raises:
      ValueError: on another image_shape, or a module with variables of other collections.
    """
    image_shape = check_image_shape(image_shape)
    image = jnp.zeros((1, *image_shape))
    # Within another program, as in `jax.eval_shape`, one cannot be compiled by itself.
    init = nn.Module.init if isinstance(image, Tracer) else _compiled_init
    variables = init(module, key, image, *inputs)
    if others := set(variables) - {"params", "batch_stats", "intermediates"}:
        raise ValueError(f"the module has variables {sorted(others)}: a step would lose them")
    state = ModelState.create(
        apply_fn=module.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=tx,
    )
    # create() leaves a Python 0, whose weak type would compile the first step twice.
    return state.replace(step=jnp.zeros((), jnp.int32))


# Compiled once for all seeds and rows of a comparison, without optimisations, which for a program
# that runs once take several times as long as all else.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _compiled_init(module: nn.Module, *inputs: Any) -> Any:
    return module.init(*inputs)


def normalize(images: Array, mean: ArrayLike, sd: ArrayLike) -> Array:
    """Images [..., C] of 0 to 255 as the networks take them: float32 of mean 0 and sd 1 (ours).

    Args:
      images: uint8 or float.
      mean, sd: of images / 255, one number or [C].

    Raises:
      ValueError: on a mean or sd of other shapes.
    """
    mean, sd = _like_channels(images, mean=mean, sd=sd)
    return (images.astype(jnp.float32) / 255.0 - mean) / sd


def denormalize(images: Array, mean: ArrayLike, sd: ArrayLike) -> Array:
    """The inverse of `normalize`: float32 [..., C] to uint8, rounded and clipped.

    Raises:
      ValueError: on a mean or sd of other shapes.
    """
    mean, sd = _like_channels(images, mean=mean, sd=sd)
    return jnp.clip(jnp.round((images * sd + mean) * 255.0), 0, 255).astype(jnp.uint8)


def _like_channels(images: Array, **statistics: ArrayLike) -> list[Array]:
    """Each float32, and as large as the images."""
    for name, value in statistics.items():
        shape, channels = np.shape(value), images.shape[-1]
        if shape not in ((), (1,), (channels,)):
            raise ValueError(f"{name} must be a number or [C] with C = {channels}, got {shape}")
    each = (jnp.asarray(value, jnp.float32) for value in statistics.values())
    return [jnp.broadcast_to(value, images.shape) for value in each]


def classifier_step(
    state: State, images: Array, labels: Array, key: Array
) -> tuple[State, Metrics]:
    """Phases 1 and 3: one update of the classifier, on the augmenter's images if there is one.

    Args:
      state: its augmenter, frozen here, may be None; its classifier any that takes `train`,
        False by default, with or without batch statistics and dropout.
      images: [B, H, W, C] normalised.
      labels: [B] integers, or [B, m] probabilities.
      key: a typed random key, for the augmenter's draws and dropout.
    """
    if state.augmenter is not None:
        images, _ = state.augmenter(images, key)
    classifier, metrics = _classifier_update(state.classifier, images, labels, key)
    return state.replace(classifier=classifier), metrics


def frozen_step(state: State, images: Array, labels: Array, key: Array) -> tuple[State, Metrics]:
    """`classifier_step` for a frozen `StochasticAugmenter`, told the classifier's uncertainty.

    Args:
      state: without a discriminator; its classifier as of `classifier_step`.
      images: [B, H, W, C] normalised, in random order.
      labels: [B] integers, or [B, m] probabilities.
      key: a typed random key.
    """
    augmenter, count = _augmenter(state), len(images)
    # To save time only images that get an affine transform are passed through the classifier as
    # they are; the others, whose colours alone depend on it, get the mean of these uncertainties.
    groups, number = augmenter(count, method="partition")
    seen = losses.uncertainty(state.classifier(_first(images, groups, number)))
    others = (0, 0), (0, count // groups - number)
    uncertainty = jnp.pad(seen.reshape(groups, number), others, constant_values=seen.mean())
    chosen = first_of_groups(count, groups, number)
    augmented, _ = augmenter(images, key, uncertainty.reshape(count), chosen)
    classifier, metrics = _classifier_update(state.classifier, augmented, labels, key)
    return state.replace(classifier=classifier), metrics


def first_of_groups(count: int, groups: int, number: int) -> Array:
    """[count] bool: the first `number` of each of so many equal groups of a batch."""
    return jnp.arange(count) % (count // groups) < number


def _first(batch: Array, groups: int, number: int) -> Array:
    """The first `number` of each of so many equal groups; XLA leaves them on their devices."""
    each = batch.shape[1:]
    return batch.reshape(groups, -1, *each)[:, :number].reshape(-1, *each)


def _classifier_update(
    classifier: ModelState, images: Array, labels: Array, key: Array
) -> tuple[ModelState, Metrics]:
    def loss_fn(params: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, updates = classifier.apply_fn(
            {"params": params, "batch_stats": classifier.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        batch_stats = updates.get("batch_stats", {})
        each = losses.cross_entropy(_check_logits(logits, images), labels)
        return each.mean(), (logits, batch_stats)

    grads, (logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(classifier.params)
    classifier = classifier.apply_gradients(grads=grads, batch_stats=batch_stats)
    return classifier, jax.tree.map(jnp.mean, _classifier_metrics(logits, labels))


def loss_prediction_step(
    state: State, images: Array, labels: Array, key: Array, *, backbone_updates: int
) -> tuple[State, Metrics]:
    """`classifier_step` for a `LossPredictor`, which learns to rank its losses at the same time.

    Args:
      state: its classifier is a `LossPredictor`'s.
      images: [B, H, W, C] normalised.
      labels: [B] integers.
      key: a typed random key, unused.
      backbone_updates: after so many the prediction no longer changes the classifier's features.

    Source: Yoo and Kweon 2019, "Learning loss for active learning", section 3.3, lambda = 1.
    """
    del key
    classifier = state.classifier

    def loss_fn(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
        (logits, predicted), updates = classifier.apply_fn(
            {"params": params, "batch_stats": classifier.batch_stats},
            images,
            train=True,
            backbone_learns=classifier.step < backbone_updates,
            method="with_loss",
            mutable=["batch_stats"],
        )
        each = losses.cross_entropy(logits, labels)
        ranking = losses.loss_ranking_loss(predicted, each).mean()
        return each.mean() + ranking, (logits, ranking, updates["batch_stats"])

    grads, (logits, ranking, batch_stats) = jax.grad(loss_fn, has_aux=True)(classifier.params)
    classifier = classifier.apply_gradients(grads=grads, batch_stats=batch_stats)
    metrics = jax.tree.map(jnp.mean, _classifier_metrics(logits, labels))
    return state.replace(classifier=classifier), metrics | {"ranking_loss": ranking}


def adversarial_step(
    augmenter: ModelState,
    discriminator: ModelState | None,
    images: Array,
    classify: Callable[[Array], Array],
    *,
    form: str = "printed",
    target: float = 0.3,
    loss_weight: float = 2.0,
    saturating: bool = True,
    key: Array | None = None,
) -> tuple[ModelState, ModelState | None, Metrics]:
    """One update of the augmenter, then one of the discriminator, of the paper's objective V.

    V(D, G) = E[log D(I) + log(1 - D(I')) + loss_weight * L_ME(I')], min over G, max over D.

    Args:
      augmenter: maps images, and the key if there is one, to (augmented images, theta).
      discriminator: maps images to logits [B]; None leaves its terms out of V. Batch statistics,
        if either network has some, stay as they are.
      images: [B, H, W, C] normalised.
      classify: a frozen classifier, images -> logits [B, m]; any differentiable function.
      form, target: of `max_entropy_loss`.
      loss_weight: lambda.
      saturating: of `generator_loss`.
      key: of a stochastic augmenter.

    Returns:
      augmenter, discriminator, and scalars: loss (V, but for the discriminator's log D(I)),
      max_entropy_loss, entropy (bits) and, with a discriminator, generator_loss and
      discriminator_loss.

    Raises:
      ValueError: on an unknown form or another target, or logits that are not [B, m].
    """
    inputs = (images,) if key is None else (images, key)

    def augmenter_loss(params: Any) -> tuple[Array, Metrics]:
        augmented, _ = augmenter.replace(params=params)(*inputs)
        logits = _check_logits(classify(augmented), images)
        max_entropy = losses.max_entropy_loss(logits, form=form, target=target).mean()
        loss = loss_weight * max_entropy
        metrics = {"max_entropy_loss": max_entropy, "entropy": losses.entropy(logits).mean()}
        if discriminator is not None:
            fake = discriminator(augmented)
            metrics["generator_loss"] = losses.generator_loss(fake, saturating=saturating).mean()
            loss += metrics["generator_loss"]
        return loss, metrics

    (loss, metrics), grads = jax.value_and_grad(augmenter_loss, has_aux=True)(augmenter.params)
    augmenter = augmenter.apply_gradients(grads=grads)
    if discriminator is None:
        return augmenter, None, {"loss": loss, **metrics}
    judge, (augmented, _) = discriminator, augmenter(*inputs)

    def discriminator_loss(params: Any) -> Array:
        learning = judge.replace(params=params)
        return losses.discriminator_loss(learning(images), learning(augmented)).mean()

    d_loss, grads = jax.value_and_grad(discriminator_loss)(judge.params)
    judge = judge.apply_gradients(grads=grads)
    return augmenter, judge, {"loss": loss, "discriminator_loss": d_loss, **metrics}


def _check_logits(logits: Any, images: Array) -> Array:
    """Raises ValueError unless there are some for each image."""
    shape = getattr(logits, "shape", type(logits).__name__)
    if len(shape) != 2 or shape[0] != images.shape[0]:
        raise ValueError(
            f"the classifier must return logits [B, m] with B = {images.shape[0]}, got {shape}"
        )
    return logits


def matching_step(
    augmenter: ModelState,
    unseen: Array,
    classify: Callable[[Array], Array],
    key: Array,
    *,
    tolerance: float = 0.0,
    strictness: float = 10.0,
    memory: float = MEMORY,
) -> tuple[ModelState, Metrics]:
    """One update of a stochastic augmenter: wider, but hardly less certain than without it.

    With h = H / log2 m, maximises the volume of the `Box`es of images that the classifier has never
    seen, while their h(augmented) stays about h(unseen), as they are: minimises

      s PRICE h(augmented) - (1 - s) log volume + edge,
      s = sigmoid(strictness (h(augmented) / h(unseen) - 1 - tolerance)),

    without a gradient through s; edge is that of `Box`, and always leads back from the bounds. So
    wide boxes are kept for the coordinates, and the images, in which they cost little certainty;
    they cost none where the transformed image is as good a one as any other. The identity cannot be
    the result, since its volume is 0, nor can the image be destroyed, since it would be too
    uncertain. Images that the classifier trains on would not do: what it has learned by heart it
    may be certain of in whatever state. Both h in s are means over the images of the last steps,
    the augmenter's `batch_stats`, so that a few images a step are enough; that both weights have
    limits keeps one step from outweighing all others in Adam's memory.

    Args:
      augmenter: of a `StochasticAugmenter`.
      unseen: [U, H, W, C] normalised, of images that the classifier never trains on.
      classify: a frozen classifier, images -> logits [B, m]; any differentiable function.
      key: a typed random key.
      tolerance: about how much more uncertain augmented images may be, in parts of h(unseen);
        from -1 to 1e6.
      strictness: at least 0, at most 1e6; the larger, the closer to that.
      memory: share of the running means that is kept in a step, in [0, 1].

    Returns:
      The augmenter, and scalars: augmenter_loss, certainty_weight (s) and, running means that it
      remembers, uncertainty_augmented and uncertainty_unseen (h) and half_width.

    Raises:
      ValueError: on another augmenter, no images, logits that are not [U, m], or other numbers.
    """
    _check_stochastic(augmenter)
    if unseen.shape[0] == 0:  # whose mean is NaN, for ever
        raise ValueError(f"unseen must hold an image or more, got {unseen.shape}")
    check_number("tolerance", tolerance, -1, MOST)
    check_number("strictness", strictness, 0, MOST)
    check_number("memory", memory, 0, 1)
    first, before = augmenter.step == 0, augmenter.batch_stats

    def remember(name: str, value: Array) -> Array:
        return jnp.where(first, value, memory * before[name] + (1 - memory) * value)

    uncertainty = losses.uncertainty(_check_logits(classify(unseen), unseen))
    plain = remember("unseen", uncertainty.mean())

    def loss_fn(params: Any) -> tuple[Array, tuple[Array, Metrics]]:
        learning = augmenter.replace(params=params)
        augmented, *_, box = learning(unseen, key, uncertainty, method="transform")
        now = losses.uncertainty(classify(augmented)).mean()
        running = jax.lax.stop_gradient(remember("augmented", now))
        weight = _certainty_weight(running, plain, tolerance, strictness)
        growth = (1 - weight) * box.log_volume.mean()
        loss = weight * PRICE * now - growth + box.edge.mean()
        half_width = remember("half_width", box.half_width.mean())
        return loss, (loss, {"augmented": running, "unseen": plain, "half_width": half_width})

    grads, (loss, remembered) = jax.grad(loss_fn, has_aux=True)(augmenter.params)
    augmenter = augmenter.apply_gradients(grads=grads, batch_stats=remembered)
    return augmenter, {"augmenter_loss": loss} | _running_metrics(augmenter, tolerance, strictness)


def _certainty_weight(
    augmented: Array, unseen: Array, tolerance: float, strictness: float
) -> Array:
    # unseen is 0 where the classifier is certain of all images.
    excess = augmented / jnp.maximum(unseen, 1e-6) - 1 - tolerance
    return jax.nn.sigmoid(strictness * excess)


def _running_metrics(augmenter: ModelState, tolerance: float, strictness: float) -> Metrics:
    """The running means of `matching_step`, and the weight that follows from them."""
    augmented, unseen = augmenter.batch_stats["augmented"], augmenter.batch_stats["unseen"]
    return {
        "uncertainty_augmented": augmented,
        "uncertainty_unseen": unseen,
        "certainty_weight": _certainty_weight(augmented, unseen, tolerance, strictness),
        "half_width": augmenter.batch_stats["half_width"],
    }


def joint_step(
    state: State,
    images: Array,
    labels: Array,
    key: Array,
    unseen: Array | None,
    *,
    learns: Array | None = None,
    tolerance: float = 0.0,
    strictness: float = 10.0,
    memory: float = MEMORY,
) -> tuple[State, Metrics]:
    """The joint phase: an update of the classifier on the augmenter's images, one of the augmenter.

    Args:
      state: without a discriminator.
      images: [B, H, W, C] normalised, in random order.
      labels: [B] integers, or [B, m] probabilities.
      key: a typed random key.
      unseen: [U, H, W, C] normalised; the augmenter learns from these alone. None: it does not.
      learns: [] bool, whether the augmenter learns, where the device alone knows.
      tolerance, strictness, memory: of `matching_step`.

    Returns:
      The state, and the metrics of `frozen_step` and, as they stand, those that `matching_step`
      remembers.
    """
    augmenter = _check_stochastic(_augmenter(state))
    key, matching_key = jax.random.split(key)
    trained, metrics = frozen_step(state, images, labels, key)
    limits = {"tolerance": tolerance, "strictness": strictness}
    if unseen is not None:

        def learn(augmenter: ModelState) -> ModelState:
            given = augmenter, unseen, state.classifier, matching_key
            return matching_step(*given, **limits, memory=memory)[0]

        if learns is None:
            augmenter = learn(augmenter)
        else:
            augmenter = jax.lax.cond(learns, learn, lambda same: same, augmenter)
    return trained.replace(augmenter=augmenter), metrics | _running_metrics(augmenter, **limits)


def recorded_step(
    state: State, *arguments: Any, step: Callable[..., tuple[State, Metrics]], updates: int, **more
) -> tuple[State, Metrics]:
    """A step that also keeps the augmenter's new weights as the snapshot of this time.

    Args:
      state: with snapshots.
      arguments, more: of the step.
      step: `joint_step`.
      updates: of the classifier in the phase, which the snapshots divide evenly.
    """
    time = _snapshot_index(state, updates)
    state, metrics = step(state, *arguments, **more)
    snapshots = jax.tree.map(
        lambda kept, new: kept.at[time].set(new), state.snapshots, _augmenter(state).params
    )
    return state.replace(snapshots=snapshots), metrics


def replayed_step(
    state: State, images: Array, labels: Array, key: Array, *, updates: int
) -> tuple[State, Metrics]:
    """`frozen_step` of a new classifier, on what the augmenter did at the same time before.

    Args:
      state: with the snapshots of `recorded_step`.
      images, labels, key: of `frozen_step`.
      updates: of `recorded_step`; later ones have the last snapshot.
    """
    time, augmenter = _snapshot_index(state, updates), _augmenter(state)
    params = jax.tree.map(lambda kept: kept[time], state.snapshots)
    then = state.replace(augmenter=augmenter.replace(params=params))
    trained, metrics = frozen_step(then, images, labels, key)
    return trained.replace(augmenter=augmenter), metrics


def _snapshot_index(state: State, updates: int) -> Array:
    """The index of the snapshot that the classifier's next update belongs to."""
    count = len(jax.tree.leaves(state.snapshots)[0])
    # The update at which each but the first begins; in Python, since products overflow int32.
    begins = [min(-(-i * updates // count), np.iinfo(np.int32).max) for i in range(1, count)]
    return (state.classifier.step >= np.array(begins, np.int32)).sum()


def augment_step(
    state: State, images: Array, labels: Array, key: Array, **options: Any
) -> tuple[State, Metrics]:
    """Phase 2: `adversarial_step` against the state's classifier, which stays as it is."""
    del labels
    augmenter, discriminator, metrics = adversarial_step(
        _augmenter(state), state.discriminator, images, state.classifier, key=key, **options
    )
    return state.replace(augmenter=augmenter, discriminator=discriminator), metrics


def _augmenter(state: State) -> ModelState:
    if state.augmenter is None:
        raise ValueError("this phase needs a state with an augmenter")
    return state.augmenter


def _check_stochastic(augmenter: ModelState) -> ModelState:
    if "unseen" not in getattr(augmenter, "batch_stats", {}):
        raise ValueError("augmenter must be a state of a StochasticAugmenter")
    return augmenter


def eval_step(state: State, images: Array, labels: Array, key: Array) -> Metrics:
    """The classifier on images as they are: values [B] of loss, accuracy and entropy."""
    del key
    return _classifier_metrics(state.classifier(images), labels)


def _classifier_metrics(logits: Array, labels: Array) -> Metrics:
    return {
        "loss": losses.cross_entropy(logits, labels),
        "accuracy": _is_right(logits, labels),
        "entropy": losses.entropy(logits),
    }


def joint_eval_step(state: State, images: Array, labels: Array, key: Array) -> Metrics:
    """`eval_step`, and what a stochastic augmenter does to the same images, each drawn once.

    Returns:
      `eval_step`'s values [B], logits [B, m] before and after the augmentation, theta [B, 2, 3],
      half_width [B, 6], with colours [B, 10], and augmented_accuracy [B]; and, with one box for all
      images of the batch in place of each one's own, its half-widths the geometric means of these,
      same_box_accuracy and same_box_entropy [B].
    """
    augmenter, logits = _augmenter(state), state.classifier(images)
    uncertainty = losses.uncertainty(logits)
    augmented, theta, _, box = augmenter(images, key, uncertainty, method="transform")
    logits_after = state.classifier(augmented)
    same_width = jnp.broadcast_to(jnp.exp(jnp.log(box.half_width).mean(0)), box.half_width.shape)
    same, *_ = augmenter(images, same_width, key, method="apply_width")
    logits_same = state.classifier(same)
    return {
        **_classifier_metrics(logits, labels),
        "theta": theta,
        "half_width": box.half_width,
        "logits_before": logits,
        "logits_after": logits_after,
        "augmented_accuracy": _is_right(logits_after, labels),
        "same_box_accuracy": _is_right(logits_same, labels),
        "same_box_entropy": losses.entropy(logits_same),
    }


def _is_right(logits: Array, labels: Array) -> Array:
    likeliest = labels if labels.ndim == 1 else labels.argmax(-1)
    return (logits.argmax(-1) == likeliest).astype(jnp.float32)


def augment_eval_step(
    state: State,
    images: Array,
    labels: Array,
    key: Array,
    *,
    form: str,
    target: float,
    saturating: bool,
) -> Metrics:
    """`eval_step`, and what augmenter and discriminator do to the same images.

    Returns:
      `eval_step`'s values [B], logits [B, m] before and after the augmentation, theta [B, 2, 3],
      theta_again [B, 2, 3] of another draw, and [B]: augmented_accuracy, max_entropy_loss, and with
      a discriminator generator_loss and discriminator_loss.
    """
    augmenter = _augmenter(state)
    key, other_key = jax.random.split(key)
    augmented, theta = augmenter(images, key)
    _, theta_again = augmenter(images, other_key)
    logits, logits_after = state.classifier(images), state.classifier(augmented)
    of_discriminator = {}
    if state.discriminator is not None:
        fake, real = state.discriminator(augmented), state.discriminator(images)
        of_discriminator = {
            "generator_loss": losses.generator_loss(fake, saturating=saturating),
            "discriminator_loss": losses.discriminator_loss(real, fake),
        }
    return {
        **_classifier_metrics(logits, labels),
        **of_discriminator,
        "theta": theta,
        "theta_again": theta_again,
        "logits_before": logits,
        "logits_after": logits_after,
        "augmented_accuracy": _is_right(logits_after, labels),
        "max_entropy_loss": losses.max_entropy_loss(logits_after, form=form, target=target),
    }
