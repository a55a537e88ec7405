"""Data augmentation that learns, per image, by back-propagation.

Affine maps and sampling (`maxent_aug.spatial`)
    affine_matrix, decompose_affine, invert_affine, affine_grid, grid_sample, warp_affine,
    AffineBounds, bounded_affine
Changes of colour (`maxent_aug.color`)
    adjust_color, ColorBounds
Losses (`maxent_aug.losses`)
    entropy, uncertainty, max_entropy_loss, discriminator_loss, generator_loss, cross_entropy
Fixed augmentations (`maxent_aug.policies`)
    identity, flip, flip_crop, random_affine, cutout, color_jitter, mixup, cutmix, rand_augment,
    trivial_augment, auto_augment, entropy_magnitude, entropy_strength, compose, either, with_labels
Their operations, as in Pillow (`maxent_aug.operations`)
    OPERATIONS, apply_operations
Networks (`maxent_aug.models`)
    ResNet, ResNet18, ResNet34, ResNet50, ResNetSmall, Augmenter, StochasticAugmenter, Discriminator
Training your own (`maxent_aug.steps`)
    State, create_model_state, normalize, denormalize, classifier_step, adversarial_step,
    matching_step, joint_step
A learned augmenter in a file (`maxent_aug.augmenter_file`)
    save_augmenter, load_augmenter, export_augmenter
What the augmenter did (`maxent_aug.diagnostics`)
    describe, picture_transform, collapse, boxes

Modules imported by name: config, data, preparation, pictures, stored, phases, programs, train,
checkpoint, run_folder, metrics, progress, processes, figures, report.
"""

from maxent_aug.augmenter_file import export_augmenter, load_augmenter, save_augmenter
from maxent_aug.color import ColorBounds, adjust_color
from maxent_aug.diagnostics import boxes, collapse, describe, picture_transform
from maxent_aug.losses import (
    cross_entropy,
    discriminator_loss,
    entropy,
    generator_loss,
    max_entropy_loss,
    uncertainty,
)
from maxent_aug.models import (
    Augmenter,
    Discriminator,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    ResNetSmall,
    StochasticAugmenter,
)
from maxent_aug.operations import OPERATIONS, apply_operations
from maxent_aug.policies import (
    auto_augment,
    color_jitter,
    compose,
    cutmix,
    cutout,
    either,
    entropy_magnitude,
    entropy_strength,
    flip,
    flip_crop,
    identity,
    mixup,
    rand_augment,
    random_affine,
    trivial_augment,
    with_labels,
)
from maxent_aug.spatial import (
    AffineBounds,
    affine_grid,
    affine_matrix,
    bounded_affine,
    decompose_affine,
    grid_sample,
    invert_affine,
    warp_affine,
)
from maxent_aug.steps import (
    State,
    adversarial_step,
    classifier_step,
    create_model_state,
    denormalize,
    joint_step,
    matching_step,
    normalize,
)

__all__ = [
    "OPERATIONS",
    "AffineBounds",
    "Augmenter",
    "ColorBounds",
    "Discriminator",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNetSmall",
    "State",
    "StochasticAugmenter",
    "adjust_color",
    "adversarial_step",
    "affine_grid",
    "affine_matrix",
    "apply_operations",
    "auto_augment",
    "bounded_affine",
    "boxes",
    "classifier_step",
    "collapse",
    "color_jitter",
    "compose",
    "create_model_state",
    "cross_entropy",
    "cutmix",
    "cutout",
    "decompose_affine",
    "denormalize",
    "describe",
    "discriminator_loss",
    "either",
    "entropy",
    "entropy_magnitude",
    "entropy_strength",
    "export_augmenter",
    "flip",
    "flip_crop",
    "generator_loss",
    "grid_sample",
    "identity",
    "invert_affine",
    "joint_step",
    "load_augmenter",
    "matching_step",
    "max_entropy_loss",
    "mixup",
    "normalize",
    "picture_transform",
    "rand_augment",
    "random_affine",
    "save_augmenter",
    "trivial_augment",
    "uncertainty",
    "warp_affine",
    "with_labels",
]
