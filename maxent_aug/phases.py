"""The phases of the paper as data: what each trains, how long, and from which phase's end."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from maxent_aug import models, programs, steps
from maxent_aug.config import Config

# All that is random in a phase is drawn from fold_in(key(seed), KINDS.index(kind)).
KINDS = ("pretrain", "augment", "finetune")


@dataclass(frozen=True)
class Phase:
    """One leg of a run: which networks are trained, how long, and from which phase's end."""

    branch: str
    kind: str
    epochs: int
    begin: Callable[..., steps.State]  # (state of the phase before or None, key) -> state
    step: Callable[..., tuple[steps.State, steps.Metrics]]
    eval_step: Callable[..., steps.Metrics]
    follows: "Phase | None" = None
    policy: programs.Policy = programs.unchanged

    @property
    def name(self) -> str:
        return self.kind if self.branch == self.kind else f"{self.branch}-{self.kind}"


def schedule(config: Config, image_shape: tuple[int, ...], num_classes: int) -> tuple[Phase, ...]:
    """The paper's protocol: pretrain, then the baseline, then phases 2 and 3 for each loss form.

    Args:
      config: the run's.
      image_shape: (H, W, C).
      num_classes: m.
    """
    pretrain = _pretrain(config, image_shape, num_classes)
    # Made once, so that the branches share their compiled programs.
    finetune_tx = optax.adam(config.classifier.finetune_learning_rate)
    begin_augment = _begin_augment(config, image_shape)
    phases = [pretrain, _finetune(config, "baseline", finetune_tx, pretrain)]
    for form in config.augmenter.loss_forms:
        augment = _augment(config, form, begin_augment, pretrain)
        phases += [augment, _finetune(config, form, finetune_tx, augment)]
    return tuple(phases)


def _pretrain(config: Config, image_shape: tuple[int, ...], num_classes: int) -> Phase:
    """Phase 1, or the first half of the baseline."""
    architecture = getattr(models, config.classifier.architecture)
    classifier = architecture(num_classes, dtype=jnp.dtype(config.compute_dtype))
    tx = optax.adam(config.classifier.learning_rate)

    def begin(_: None, key: Array) -> steps.State:
        return steps.State(steps.create_model_state(classifier, key, image_shape, tx))

    train_classifier = steps.classifier_step, steps.eval_step
    return Phase("pretrain", "pretrain", config.epochs.pretrain, begin, *train_classifier)


def _begin_augment(config: Config, image_shape: tuple[int, ...]) -> Callable[..., steps.State]:
    """Adds a new augmenter and a new discriminator."""
    augmenter = models.Augmenter(padding_mode=config.augmenter.padding_mode)
    augmenter_tx = optax.adam(config.augmenter.learning_rate)
    discriminator = models.Discriminator()
    discriminator_tx = optax.sgd(config.discriminator.learning_rate)

    def begin(state: steps.State, key: Array) -> steps.State:
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        create = partial(steps.create_model_state, image_shape=image_shape)
        return state.replace(
            augmenter=create(augmenter, keys[0], tx=augmenter_tx),
            discriminator=create(discriminator, keys[1], tx=discriminator_tx),
        )

    return begin


def _augment(config: Config, form: str, begin: Callable[..., steps.State], follows: Phase) -> Phase:
    """Phase 2, with a form of the max-entropy loss."""
    target, saturating = config.augmenter.target, config.augmenter.saturating
    options = {"form": form, "target": target, "saturating": saturating}
    step = partial(steps.augment_step, loss_weight=config.augmenter.loss_weight, **options)
    eval_step = partial(steps.augment_eval_step, **options)
    return Phase(form, "augment", config.epochs.augment, begin, step, eval_step, follows)


def _finetune(
    config: Config, branch: str, tx: optax.GradientTransformation, follows: Phase
) -> Phase:
    """Phase 3, or the second half of the baseline: a fresh optimiser, and no discriminator."""

    def begin(state: steps.State, key: Array) -> steps.State:
        del key
        fresh = state.classifier.replace(tx=tx, opt_state=tx.init(state.classifier.params))
        return state.replace(classifier=fresh, discriminator=None)

    train_classifier = steps.classifier_step, steps.eval_step
    return Phase(branch, "finetune", config.epochs.finetune, begin, *train_classifier, follows)
