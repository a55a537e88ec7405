"""Phases as data: what each trains, how long, and from which phase's end."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from maxent_aug import models, programs, steps
from maxent_aug.color import ColorBounds
from maxent_aug.config import (
    Ablation,
    ActiveLearning,
    Augmenter,
    Bounds,
    ColorLimits,
    Comparison,
    Config,
    Discriminator,
    Learning,
    ScheduledClassifier,
    Search,
)
from maxent_aug.spatial import DEFAULT_BOUNDS, AffineBounds

# All that is random in a phase is drawn from fold_in(key(seed), KINDS[kind]). Kinds
# that make a new classifier share 0, so that for a seed all begin with the same weights.
KINDS = {"pretrain": 0, "augment": 1, "finetune": 2, "train": 0, "joint": 0, "replay": 0}
MATCHING = ("learned", "replayed")  # by `joint_step`, or replaying one that was
SNAPSHOTS = 20  # of an augmenter, for a replay, if it has as many updates
LAST_UPDATE = 2**31 - 1  # optimisers count in int32


@dataclass(frozen=True)
class Phase:
    """A part of a run: which networks are trained, how long, and from which phase's end."""

    branch: str
    kind: str
    epochs: int
    begin: Callable[..., steps.State]  # (state of the phase before or None, key) -> state
    step: Callable[..., tuple[steps.State, steps.Metrics]]
    eval_step: Callable[..., steps.Metrics]
    follows: "Phase | None" = None
    policy: programs.Policy = programs.unchanged
    unseen: programs.Unseen = programs.ALL_SEEN

    @property
    def name(self) -> str:
        return self.kind if self.branch == self.kind else f"{self.branch}-{self.kind}"


class Row(NamedTuple):
    """Of a comparison.

    Attributes:
      policy: of all images, before the augmenter.
      augmenter: None, a form of the paper's loss, or one of MATCHING.
      others: with MATCHING, the policy of images without an affine transform; None shifts them.
    """

    policy: programs.Policy
    augmenter: str | None = None
    others: programs.Policy | None = None


def schedule(
    config: Config, classifier: nn.Module, image_shape: tuple[int, ...]
) -> tuple[Phase, ...]:
    """The paper's protocol: pretrain, then the baseline, then phases 2 and 3 for each loss form.

    Args:
      config: the run's.
      classifier: a network as of `steps.classifier_step`, such as that of `make_classifier`.
      image_shape: (H, W, C).
    """
    pretrain, finetune = _classifier_phases(config, classifier, image_shape)
    begin_augment = _begin_augment(config.augmenter, config.discriminator, image_shape)
    phases = [pretrain, finetune("baseline", pretrain)]
    for form in config.augmenter.loss_forms:
        game = _augment_steps(config.augmenter, form)
        augment = Phase(form, "augment", config.epochs.augment, begin_augment, *game, pretrain)
        phases += [augment, finetune(form, augment)]
    return tuple(phases)


def _classifier_phases(
    config: Config | Ablation, classifier: nn.Module, image_shape: tuple[int, ...]
) -> tuple[Phase, Callable[[str, Phase], Phase]]:
    """Phase 1, and what makes phase 3 of a branch from the phase that it follows."""
    tx = optax.adam(config.classifier.learning_rate)
    begin = partial(begin_classifier, classifier, image_shape, tx)
    pretrain = Phase("pretrain", "pretrain", config.epochs.pretrain, begin, *_CLASSIFIER_STEPS)
    # Made once, so that the branches share their compiled programs.
    begin_again = partial(fresh_optimizer, optax.adam(config.classifier.finetune_learning_rate))

    def finetune(branch: str, follows: Phase) -> Phase:
        epochs = config.epochs.finetune
        return Phase(branch, "finetune", epochs, begin_again, *_CLASSIFIER_STEPS, follows)

    return pretrain, finetune


def ablation(
    config: Ablation, classifier: nn.Module, image_shape: tuple[int, ...]
) -> tuple[Phase, Phase, dict[tuple[str, ...], tuple[Phase, Phase]]]:
    """Phases 2 and 3 of the paper, from one pretrained classifier, for all variants of phase 2.

    Args:
      config: of all variants.
      classifier: a network as of `steps.classifier_step`, such as that of `make_classifier`.
      image_shape: (H, W, C).

    Returns:
      Pretraining; phase 3 without an augmenter; and phases 2 and 3 of each variant: form of the
      loss, discriminator or alone, free or bounded, deterministic or stochastic.
    """
    pretrain, finetune = _classifier_phases(config, classifier, image_shape)
    factors, variants = config.factors, {}
    games = {form: _augment_steps(config.augmenter, form) for form in factors.loss_forms}
    for variant in product(
        factors.loss_forms, factors.discriminators, factors.thetas, factors.draws
    ):
        form, judge, theta, draw = variant
        begin_augment = _begin_augment(
            config.augmenter,
            config.discriminator if judge == "discriminator" else None,
            image_shape,
            bounds=DEFAULT_BOUNDS if theta == "bounded" else None,
            stochastic=draw == "stochastic",
        )
        branch, epochs = "-".join(variant), config.epochs.augment
        augment = Phase(branch, "augment", epochs, begin_augment, *games[form], follows=pretrain)
        variants[variant] = augment, finetune(branch, augment)
    return pretrain, finetune("baseline", pretrain), variants


def comparison(
    config: Comparison,
    classifier: nn.Module,
    rows: Mapping[str, Row],
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
) -> dict[str, tuple[Phase, ...]]:
    """One phase for a fixed policy or a joint one; for the paper's augmenter its three.

    Each row's classifier gets the same number of updates under the same learning rates. The paper's
    augmenter is trained when it has had half of them, and makes the images of the other half. A
    replayed one was trained with another classifier, in the joint phase of the row named the same
    but for "learned".

    Args:
      config: of all rows.
      classifier: a network as of `steps.classifier_step`, such as that of `make_classifier`.
      rows: by name.
      image_shape: (H, W, C).
      steps_per_epoch: with config.epochs.train, the length of the cosine.

    Returns:
      The phases of each row, in order.
    """
    begin = _begin_scheduled(config, classifier, image_shape, steps_per_epoch)
    begin_augment = _begin_augment(config.augmenter, config.discriminator, image_shape)
    epochs, half = config.epochs.train, config.epochs.train // 2
    phases: dict[str, tuple[Phase, ...]] = {}
    joints: dict[str, Phase] = {}
    for row, (policy, augmenter, others) in rows.items():
        train = partial(Phase, row, policy=policy)
        if augmenter is None:
            phases[row] = (train("train", epochs, begin, *_CLASSIFIER_STEPS),)
        elif augmenter in MATCHING:
            branch = row.replace("replayed", "learned")
            if branch not in joints:
                joint = _joint(branch, config, begin, policy, image_shape, others)
                # Of every one, so that a row that replays it may be asked for later.
                joints[branch] = _recorded(joint, steps_per_epoch)
            joint = joints[branch]
            if augmenter == "replayed":
                rest = _replayed(row, config, begin, joint, steps_per_epoch)
            else:
                rest = _rest(config, joint)
            phases[row] = joint, rest
        else:
            pretrain = train("pretrain", half, begin, *_CLASSIFIER_STEPS)
            game = _augment_steps(config.augmenter, augmenter)
            augment = train("augment", config.epochs.augment, begin_augment, *game, pretrain)
            finetune = train(
                "finetune", epochs - half, _freeze_augmenter, *_CLASSIFIER_STEPS, augment
            )
            phases[row] = pretrain, augment, finetune
    return phases


def search(
    config: Search,
    classifier: nn.Module,
    trials: Mapping[str, programs.Policy],
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
) -> dict[str, Phase]:
    """For each trial, by name, a classifier trained under its policy.

    Args:
      config: the run's.
      classifier: a network as of `steps.classifier_step`, such as that of `make_classifier`.
      trials: the policies of all images.
      image_shape: (H, W, C).
      steps_per_epoch: with config.epochs.train, the length of the cosine.
    """
    begin = _begin_scheduled(config, classifier, image_shape, steps_per_epoch)
    return {
        name: Phase(name, "train", config.epochs.train, begin, *_CLASSIFIER_STEPS, policy=policy)
        for name, policy in trials.items()
    }


def learning(
    config: Learning,
    classifier: nn.Module,
    policy: programs.Policy,
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
    others: programs.Policy | None = None,
) -> tuple[Phase, Phase]:
    """A classifier and a stochastic augmenter together, then the classifier alone, on all images.

    In the second phase the augmenter is frozen.

    Args:
      config: the run's.
      classifier: a network as of `steps.classifier_step`, such as that of `make_classifier`.
      policy: of all images, before the augmenter.
      image_shape: (H, W, C).
      steps_per_epoch: with config.epochs.train, the length of the cosine.
      others: of `Row`.
    """
    begin = _begin_scheduled(config, classifier, image_shape, steps_per_epoch)
    joint = _joint("learned", config, begin, policy, image_shape, others)
    return joint, _rest(config, joint)


def affine_bounds(bounds: Bounds) -> AffineBounds:
    """What people can read, as bounds of the six coordinates of a transform."""
    shift, rotation = 2 * bounds.shift, math.radians(bounds.rotation)
    scale, aspect = math.log(bounds.scale), math.log(bounds.aspect)
    return AffineBounds(shift, shift, rotation, scale, aspect, bounds.shear)


def color_bounds(limits: ColorLimits) -> ColorBounds:
    """What people can read, as bounds of the four coordinates of a change of colours."""
    contrast, saturation = math.log(limits.contrast), math.log(limits.saturation)
    return ColorBounds(limits.brightness, contrast, saturation, math.radians(limits.hue))


def make_augmenter(
    config: Comparison | Learning, channels: int, *, others_alone: bool = False
) -> models.StochasticAugmenter:
    """The network that the configuration describes, for images of so many channels.

    With others_alone it leaves those without an affine transform as they are.
    """
    learned = config.learned
    return models.StochasticAugmenter(
        bounds=affine_bounds(config.bounds),
        color=color_bounds(config.color_bounds) if learned.color and channels == 3 else None,
        interpolation=learned.interpolation,
        padding_mode=learned.padding_mode,
        start_width=learned.start_width,
        share=learned.share,
        others_shift=None if others_alone else learned.others_shift,
    )


def _joint(
    branch: str,
    config: Comparison | Learning,
    begin_new: Callable[..., steps.State],
    policy: programs.Policy,
    image_shape: tuple[int, ...],
    others: programs.Policy | None,
) -> Phase:
    """Classifier and augmenter together."""
    learned, epochs = config.learned, config.epochs.train
    together = min(epochs - 1, max(1, round(learned.together * epochs)))
    augmenter = make_augmenter(config, image_shape[-1], others_alone=others is not None)
    if others is not None:  # for the very images that `steps.frozen_step` leaves alone

        def transformed(key: Array, count: int) -> Array:
            del key
            return steps.first_of_groups(count, *augmenter.partition(count))

        policy = programs.divide(policy, others, transformed)
    interval = learned.interval
    # Of fewer and larger batches: Malladi et al. 2022, https://arxiv.org/abs/2205.10287.
    rate = learned.learning_rate * interval**0.5
    tx = optax.adam(rate, b1=0.9**interval, b2=0.999**interval)

    def begin(start: None, key: Array) -> steps.State:
        augmenter_key = jax.random.fold_in(key, 1)
        created = steps.create_model_state(augmenter, augmenter_key, image_shape, tx, key)
        return begin_new(start, key).replace(augmenter=created)

    step = partial(
        steps.joint_step,
        tolerance=learned.tolerance,
        strictness=learned.strictness,
        memory=steps.MEMORY**interval,
    )
    count = max(1, interval * config.batch_size // learned.every)
    unseen = programs.Unseen(learned.unseen, count, interval)
    evaluate = steps.joint_eval_step
    return Phase(branch, "joint", together, begin, step, evaluate, policy=policy, unseen=unseen)


def _rest(config: Comparison | Learning, joint: Phase) -> Phase:
    """The rest of the epochs: the classifier alone, no image unseen any more."""
    return replace(
        joint,
        kind="finetune",
        epochs=config.epochs.train - joint.epochs,
        begin=_freeze_augmenter,
        step=steps.frozen_step,
        follows=joint,
        unseen=programs.ALL_SEEN,
    )


def _recorded(joint: Phase, steps_per_epoch: int) -> Phase:
    """A joint phase that keeps snapshots of the augmenter."""
    updates = joint.epochs * steps_per_epoch
    count = min(SNAPSHOTS, updates)  # each is written

    def begin(start: None, key: Array) -> steps.State:
        state = joint.begin(start, key)
        augmenter = cast(steps.ModelState, state.augmenter)
        snapshots = jax.tree.map(
            lambda weights: jnp.zeros((count, *weights.shape), weights.dtype), augmenter.params
        )
        return state.replace(snapshots=snapshots)

    return replace(
        joint, begin=begin, step=partial(steps.recorded_step, step=joint.step, updates=updates)
    )


def _replayed(
    branch: str,
    config: Comparison,
    begin_new: Callable[..., steps.State],
    joint: Phase,
    steps_per_epoch: int,
) -> Phase:
    """A new classifier, trained on all images as the augmenter learned to transform them."""

    def begin(start: steps.State, key: Array) -> steps.State:
        return start.replace(classifier=begin_new(None, key).classifier)

    return replace(
        joint,
        branch=branch,
        kind="replay",
        epochs=config.epochs.train,
        begin=begin,
        step=partial(steps.replayed_step, updates=joint.epochs * steps_per_epoch),
        follows=joint,
        unseen=programs.ALL_SEEN,
    )


_CLASSIFIER_STEPS = steps.classifier_step, steps.eval_step  # step and eval_step of a Phase


def _begin_scheduled(
    config: Comparison | Learning | Search,
    classifier: nn.Module,
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
) -> Callable[..., steps.State]:
    """Makes a new classifier, its learning rate a cosine over all of the training."""
    tx = scheduled_sgd(config.classifier, config.epochs.train * steps_per_epoch)
    return partial(begin_classifier, classifier, image_shape, tx)


def scheduled_sgd(config: ScheduledClassifier, updates: int) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum and weight decay, its learning rate a falling cosine."""
    rate = optax.cosine_decay_schedule(config.learning_rate, min(updates, LAST_UPDATE))
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, config.momentum, nesterov=True),
    )


def make_classifier(
    config: Config | Ablation | Comparison | ActiveLearning | Learning | Search, num_classes: int
) -> models.ResNet:
    """The network that the configuration names."""
    architecture = getattr(models, config.classifier.architecture)
    return architecture(num_classes, dtype=jnp.dtype(config.compute_dtype))


def begin_classifier(
    classifier: nn.Module,
    image_shape: tuple[int, ...],
    tx: optax.GradientTransformation,
    _: None,
    key: Array,
) -> steps.State:
    """A new classifier."""
    return steps.State(steps.create_model_state(classifier, key, image_shape, tx))


def _begin_augment(
    augmenter_config: Augmenter,
    discriminator_config: Discriminator | None,
    image_shape: tuple[int, ...],
    **options: Any,
) -> Callable[..., steps.State]:
    """Adds a new augmenter, of these options, and, if it has a configuration, a discriminator."""
    augmenter = models.Augmenter(padding_mode=augmenter_config.padding_mode, **options)
    augmenter_tx = optax.adam(augmenter_config.learning_rate)
    # Made once: a state with another network, though the same, is traced and compiled anew.
    discriminator, discriminator_tx = models.Discriminator(), None
    if discriminator_config is not None:
        discriminator_tx = optax.sgd(discriminator_config.learning_rate)

    def begin(state: steps.State, key: Array) -> steps.State:
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        judge = None
        if discriminator_tx is not None:
            judge = steps.create_model_state(discriminator, keys[1], image_shape, discriminator_tx)
        augmented = steps.create_model_state(augmenter, keys[0], image_shape, augmenter_tx, key)
        return state.replace(augmenter=augmented, discriminator=judge)

    return begin


def _augment_steps(config: Augmenter, form: str) -> tuple[Callable, Callable]:
    """Phase 2's step and evaluation, with a form of the max-entropy loss."""
    options = {"form": form, "target": config.target, "saturating": config.saturating}
    step = partial(steps.augment_step, loss_weight=config.loss_weight, **options)
    return step, partial(steps.augment_eval_step, **options)


def _freeze_augmenter(state: steps.State, key: Array) -> steps.State:
    """Without what only the augmenter's training needs; an augmenter stays, frozen."""
    del key
    return state.replace(discriminator=None, snapshots=None)


def fresh_optimizer(
    tx: optax.GradientTransformation, state: steps.State, key: Array
) -> steps.State:
    """The classifier under a new optimiser; an augmenter stays, frozen."""
    fresh = state.classifier.replace(tx=tx, opt_state=tx.init(state.classifier.params))
    return _freeze_augmenter(state.replace(classifier=fresh), key)
