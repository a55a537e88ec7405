"""Data augmentation that learns, per image, by back-propagation.

Affine maps and sampling (`maxent_aug.spatial`)
    affine_matrix, decompose_affine, invert_affine, affine_grid, grid_sample, warp_affine
Losses (`maxent_aug.losses`)
    entropy, max_entropy_loss, discriminator_loss, generator_loss, cross_entropy
Networks (`maxent_aug.models`)
    ResNet, ResNet18, ResNet34, ResNet50, ResNetSmall, Augmenter, Discriminator
Training your own (`maxent_aug.steps`)
    create_model_state, adversarial_step
What the augmenter did (`maxent_aug.diagnostics`)
    describe, picture_transform, collapse

Rooms imported by name: config, data, phases, programs, train, checkpoint, metrics, figures, report.
"""

from maxent_aug.diagnostics import collapse, describe, picture_transform
from maxent_aug.losses import (
    cross_entropy,
    discriminator_loss,
    entropy,
    generator_loss,
    max_entropy_loss,
)
from maxent_aug.models import (
    Augmenter,
    Discriminator,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNetSmall,
)
from maxent_aug.spatial import (
    affine_grid,
    affine_matrix,
    decompose_affine,
    grid_sample,
    invert_affine,
    warp_affine,
)
from maxent_aug.steps import adversarial_step, create_model_state

__all__ = [
    "Augmenter",
    "Discriminator",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNetSmall",
    "adversarial_step",
    "affine_grid",
    "affine_matrix",
    "collapse",
    "create_model_state",
    "cross_entropy",
    "decompose_affine",
    "describe",
    "discriminator_loss",
    "entropy",
    "generator_loss",
    "grid_sample",
    "invert_affine",
    "max_entropy_loss",
    "picture_transform",
    "warp_affine",
]
