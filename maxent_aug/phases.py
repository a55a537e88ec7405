"""The phases of the paper as data: what each trains, how long, and from which phase's end."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from maxent_aug import models, steps
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
    classifier = getattr(models, config.classifier.architecture)(
        num_classes, dtype=jnp.dtype(config.compute_dtype)
    )
    augmenter = models.Augmenter(padding_mode=config.augmenter.padding_mode)
    discriminator = models.Discriminator()
    pretrain_tx = optax.adam(config.classifier.learning_rate)
    finetune_tx = optax.adam(config.classifier.finetune_learning_rate)
    augmenter_tx = optax.adam(config.augmenter.learning_rate)
    discriminator_tx = optax.sgd(config.discriminator.learning_rate)

    def create(module: nn.Module, key: Array, tx: optax.GradientTransformation) -> Any:
        return steps.create_model_state(module, key, image_shape, tx)

    def begin_pretrain(_: steps.State | None, key: Array) -> steps.State:
        return steps.State(create(classifier, key, pretrain_tx))

    def begin_augment(state: steps.State, key: Array) -> steps.State:
        return state.replace(
            augmenter=create(augmenter, jax.random.fold_in(key, 0), augmenter_tx),
            discriminator=create(discriminator, jax.random.fold_in(key, 1), discriminator_tx),
        )

    def begin_finetune(state: steps.State, key: Array) -> steps.State:
        del key
        fresh = state.classifier.replace(
            tx=finetune_tx, opt_state=finetune_tx.init(state.classifier.params)
        )
        return state.replace(classifier=fresh, discriminator=None)

    def finetune(branch: str, follows: Phase) -> Phase:
        return Phase(
            branch,
            "finetune",
            config.epochs.finetune,
            begin_finetune,
            steps.classifier_step,
            steps.eval_step,
            follows,
        )

    def augment(form: str, follows: Phase) -> Phase:
        options = {
            "form": form,
            "target": config.augmenter.target,
            "saturating": config.augmenter.saturating,
        }
        return Phase(
            form,
            "augment",
            config.epochs.augment,
            begin_augment,
            partial(steps.augment_step, loss_weight=config.augmenter.loss_weight, **options),
            partial(steps.augment_eval_step, **options),
            follows,
        )

    pretrain = Phase(
        "pretrain",
        "pretrain",
        config.epochs.pretrain,
        begin_pretrain,
        steps.classifier_step,
        steps.eval_step,
    )
    phases = [pretrain, finetune("baseline", pretrain)]
    for form in config.augmenter.loss_forms:
        learned = augment(form, pretrain)
        phases += [learned, finetune(form, learned)]
    return tuple(phases)
