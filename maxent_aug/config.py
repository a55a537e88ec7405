"""What an experiment can be told, and the named presets: values only, no logic.

Each field carries its help text and what is allowed; the command line is made from them.
Where the paper leaves a choice open, the help says "ours".
"""

from dataclasses import dataclass, field
from typing import Any

from maxent_aug.losses import LOSS_FORMS

# Of rates and weights: far below what overflows float32 in the first step.
LARGE = 1e6


def _field(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with help; a number may be bounded by low <=, above <, <= high."""
    allowed = {"low": low, "above": above, "high": high, "choices": choices}
    return field(default=default, metadata={"help": help, **allowed})


@dataclass(frozen=True)
class Data:
    name: str = _field(
        "cifar10",
        "a tensorflow-datasets name, as name/config:version, with image and label; or digits; or "
        "folder: your own pictures in --data_dir, in train/CLASS and test/CLASS, or in CLASS",
    )
    image_size: int = _field(
        0,
        "pixels a side: each picture is cropped to its middle square, which is scaled to this "
        "without distortion; 0 leaves them as they are, which must be all of one size",
        low=0,
    )
    test_fraction: float = _field(
        0.2,
        "of a folder without train and test: the share of each class that is tested on",
        above=0,
        high=0.9,
    )
    split_seed: int = _field(
        0, "of a folder without train and test: which pictures are tested on", low=0
    )
    train_examples: int = _field(
        0, "training images, a stratified subset fixed by the seed; 0 takes all", low=0
    )
    held_out: int = _field(
        0,
        "training images, other ones, that are tested on in place of the test images, to choose "
        "settings by; 0: the test images",
        low=0,
    )
    rotated: float = _field(
        0.0,
        "degrees by which each picture, of training and test, is rotated at most, to either side, "
        "once and for all: data that have no upright, or less of it",
        low=0,
        high=180,
    )


@dataclass(frozen=True)
class Epochs:
    pretrain: int = _field(100, "of phase 1", low=1)
    augment: int = _field(50, "of phase 2", low=1)
    finetune: int = _field(100, "of phase 3, and of the baseline beside it", low=1)


@dataclass(frozen=True)
class Classifier:
    architecture: str = _field(
        "ResNet18",
        "the classifier; ResNetSmall has 0.15 M weights",
        choices=("ResNet18", "ResNet34", "ResNet50", "ResNetSmall"),
    )
    learning_rate: float = _field(0.1, "Adam's, in phase 1", above=0, high=LARGE)
    finetune_learning_rate: float = _field(
        0.01, "Adam's, in phase 3 and the baseline", above=0, high=LARGE
    )


@dataclass(frozen=True)
class Augmenter:
    learning_rate: float = _field(1e-4, "Adam's, in phase 2", above=0, high=LARGE)
    loss_weight: float = _field(
        2.0, "lambda, the weight of the max-entropy loss", low=0, high=LARGE
    )
    target: float = _field(0.3, "wanted H / log2 m, for the form target", low=0, high=1)
    saturating: bool = _field(True, "log(1 - D) as in the paper; false: the non-saturating -log D")
    padding_mode: str = _field(
        "zeros",
        "outside the image (ours; zeros is the data set's mean colour)",
        choices=("zeros", "border", "reflection"),
    )


@dataclass(frozen=True)
class PaperAugmenter(Augmenter):
    loss_forms: tuple[str, ...] = _field(
        ("printed", "intended"),
        "forms of the max-entropy loss, a branch each, separated by commas",
        choices=LOSS_FORMS,
    )


@dataclass(frozen=True)
class Discriminator:
    learning_rate: float = _field(1e-4, "SGD's, in phase 2", above=0, high=LARGE)


@dataclass(frozen=True)
class Training:
    """What every experiment that trains can be told."""

    data: Data = Data()
    batch_size: int = _field(128, "images a training step, over all devices (ours)", low=1)
    eval_batch_size: int = _field(1000, "images an evaluation step, over all devices", low=1)
    compute_dtype: str = _field(
        "float32",
        "of the classifier's activations; weights and statistics stay float32",
        choices=("float32", "bfloat16"),
    )
    steps_per_call: int = _field(
        0,
        "training steps a compiled call; 0: 1 on a CPU, 100 on an accelerator; 1 in a stream",
        low=0,
    )
    checkpoint_every: int = _field(1, "epochs between checkpoints; a phase's end has one", low=1)
    evaluate_every: int = _field(1, "epochs between evaluations; a phase's end has one", low=1)


@dataclass(frozen=True)
class Config(Training):
    """Of the paper's protocol."""

    epochs: Epochs = Epochs()
    classifier: Classifier = Classifier()
    augmenter: PaperAugmenter = PaperAugmenter()
    discriminator: Discriminator = Discriminator()


@dataclass(frozen=True)
class Factors:
    loss_forms: tuple[str, ...] = _field(
        LOSS_FORMS,
        "forms of the max-entropy loss",
        choices=LOSS_FORMS,
    )
    discriminators: tuple[str, ...] = _field(
        ("discriminator", "alone"),
        "with the discriminator's terms, or without",
        choices=("discriminator", "alone"),
    )
    thetas: tuple[str, ...] = _field(
        ("free", "bounded"),
        "theta itself, or six coordinates within bounds",
        choices=("free", "bounded"),
    )
    draws: tuple[str, ...] = _field(
        ("deterministic", "stochastic"),
        "one transform for an image, or noise of a learned width about it",
        choices=("deterministic", "stochastic"),
    )


@dataclass(frozen=True)
class Ablation(Training):
    """Of all variants of the paper's phase 2."""

    factors: Factors = Factors()
    epochs: Epochs = Epochs()
    classifier: Classifier = Classifier()
    augmenter: Augmenter = Augmenter()
    discriminator: Discriminator = Discriminator()


@dataclass(frozen=True)
class ComparedEpochs:
    train: int = _field(200, "of the classifier, in every row", low=2)
    augment: int = _field(
        20, "of phase 2 of rows with the paper's augmenter, half-way through their training", low=1
    )


@dataclass(frozen=True)
class ScheduledClassifier:
    architecture: str = _field(
        "ResNet18",
        "the classifier; ResNetSmall has 0.15 M weights",
        choices=("ResNet18", "ResNet34", "ResNet50", "ResNetSmall"),
    )
    learning_rate: float = _field(0.1, "SGD's first; falls to 0 as a cosine", above=0, high=LARGE)
    momentum: float = _field(0.9, "Nesterov's", low=0, high=1)
    weight_decay: float = _field(
        5e-4, "of all weights, as in the published recipe", low=0, high=LARGE
    )


@dataclass(frozen=True)
class MatchingAugmenter:
    learning_rate: float = _field(
        3e-3, "Adam's; constant; times the square root of interval", above=0, high=LARGE
    )
    unseen: float = _field(
        0.05,
        "share of the training images that the classifier does not train on while the augmenter "
        "learns from them: transformed, they are to be about as uncertain as they are",
        above=0,
        high=0.5,
    )
    together: float = _field(
        0.9,
        "share of the epochs in which augmenter and classifier learn together; in the rest the "
        "classifier alone learns, from all training images, the augmenter frozen",
        above=0,
        high=1,
    )
    every: int = _field(
        8, "the augmenter learns from one unseen image for so many that are trained on", low=1
    )
    interval: int = _field(
        1,
        "steps of the classifier for each of the augmenter, then from so many times the images",
        low=1,
        high=1000,
    )
    share: float = _field(0.5, "of the images that get an affine transform", above=0, high=1)
    others_shift: float = _field(
        0.125,
        "by which the other images are shifted at most, a share of the width and of the height; by "
        "whole pixels",
        low=0,
        high=1,
    )
    start_width: float = _field(
        0.5, "half-width of a new augmenter's boxes, a share of the bounds", low=0.05, high=0.95
    )
    tolerance: float = _field(
        0.0,
        "about how much more uncertain unseen images may be when transformed, in parts of what "
        "they are without",
        low=0,
        high=LARGE,
    )
    strictness: float = _field(
        10.0,
        "how steeply the weight of certainty grows with what transformed unseen images are more "
        "uncertain than is tolerated, in parts of what they are without a transform",
        low=0,
        high=50,
    )
    color: bool = _field(
        True, "change brightness, contrast, saturation and hue of all images, if of three channels"
    )
    interpolation: str = _field(
        "bicubic",
        "between the pixels of what is transformed; bilinear blurs more",
        choices=("bilinear", "bicubic"),
    )
    padding_mode: str = _field(
        "reflection", "outside the image", choices=("zeros", "border", "reflection")
    )


@dataclass(frozen=True)
class Bounds:
    """The most that an affine transform may do, to either side, random or learned."""

    shift: float = _field(0.1875, "share of the width and of the height", low=0, high=1)
    rotation: float = _field(45.0, "degrees", low=0, high=180)
    scale: float = _field(1.5, "times", low=1, high=10)
    aspect: float = _field(1.4, "times, of width to height", low=1, high=10)
    shear: float = _field(0.5, "tangent of the angle", low=0, high=10)


@dataclass(frozen=True)
class ColorLimits:
    """The most that a learned change of colours may do, to either side."""

    brightness: float = _field(1.0, "standard deviations of the data's values", low=0, high=10)
    contrast: float = _field(2.0, "times", low=1, high=10)
    saturation: float = _field(3.0, "times", low=1, high=10)
    hue: float = _field(45.0, "degrees", low=0, high=180)


@dataclass(frozen=True)
class Comparison(Training):
    """Of all augmentations under one trainer."""

    epochs: ComparedEpochs = ComparedEpochs()
    classifier: ScheduledClassifier = ScheduledClassifier()
    augmenter: Augmenter = Augmenter()
    discriminator: Discriminator = Discriminator()
    learned: MatchingAugmenter = MatchingAugmenter()
    bounds: Bounds = Bounds()
    color_bounds: ColorLimits = ColorLimits()


@dataclass(frozen=True)
class SearchEpochs:
    train: int = _field(200, "of each trial's classifier", low=2)


@dataclass(frozen=True)
class Search(Training):
    """Of the bounds of random affine transforms."""

    policy: str = _field(
        "half_affine",
        "of all images, within each trial's bounds: one of experiments.compare's, + joins several, "
        ": two, for half of the images each",
    )
    trials: int = _field(20, "random bounds, uniform within config.bounds", low=1, high=1000)
    epochs: SearchEpochs = SearchEpochs()
    classifier: ScheduledClassifier = ScheduledClassifier()
    bounds: Bounds = Bounds()


@dataclass(frozen=True)
class LearningEpochs:
    train: int = _field(200, "of the classifier, in both phases", low=2)


@dataclass(frozen=True)
class Learning(Training):
    """Of a classifier and the augmenter that is learned with it."""

    policy: str = _field(
        "flip",
        "of all images, before the augmenter: one of experiments.compare's, + joins several; after "
        "a colon, of those that get no affine transform, in place of it",
    )
    epochs: LearningEpochs = LearningEpochs()
    classifier: ScheduledClassifier = ScheduledClassifier()
    learned: MatchingAugmenter = MatchingAugmenter()
    bounds: Bounds = Bounds()
    color_bounds: ColorLimits = ColorLimits()


PRESETS = {
    "paper": Config(),
    "cifar10_small": Config(
        data=Data(train_examples=5000),
        epochs=Epochs(pretrain=20, augment=8, finetune=8),
        # In so few steps Adam at 0.1 leaves the training set unfitted, and then there is no
        # collapse to be seen.
        classifier=Classifier("ResNetSmall", learning_rate=1e-3, finetune_learning_rate=1e-4),
        batch_size=50,
    ),
    "quick": Config(
        data=Data(name="digits"),
        epochs=Epochs(pretrain=5, augment=5, finetune=5),
        classifier=Classifier(architecture="ResNetSmall"),
        batch_size=64,
    ),
}


@dataclass(frozen=True)
class RoundEpochs:
    first: int = _field(200, "of the first round", low=1)
    later: int = _field(40, "of each later round, which goes on from the weights before", low=1)


@dataclass(frozen=True)
class Labels:
    first: int = _field(1000, "labelled images to begin with, drawn at random", low=1)
    query: int = _field(500, "images labelled after each round but the last", low=1)
    rounds: int = _field(8, "queries", low=1)
    candidates: int = _field(
        10_000, "unlabelled images, drawn at random, that a query chooses from; 0: all", low=0
    )


@dataclass(frozen=True)
class ActiveLearning(Training):
    """Of queries for labels."""

    labels: Labels = Labels()
    epochs: RoundEpochs = RoundEpochs()
    classifier: ScheduledClassifier = ScheduledClassifier()
    evaluate_every: int = _field(1000, "epochs between evaluations; a round's end has one", low=1)


COMPARISON_PRESETS = {
    # The recipe of DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552, with one cosine.
    "full": Comparison(evaluate_every=10, checkpoint_every=5),
    "small": Comparison(
        data=Data(train_examples=5000),
        epochs=ComparedEpochs(train=20, augment=4),
        classifier=ScheduledClassifier("ResNetSmall"),
        batch_size=50,
        evaluate_every=20,
        checkpoint_every=5,
    ),
    "quick": Comparison(
        data=Data(name="digits"),
        epochs=ComparedEpochs(train=4, augment=2),
        classifier=ScheduledClassifier("ResNetSmall"),
        batch_size=64,
        evaluate_every=2,
        checkpoint_every=2,
    ),
}

ABLATION_PRESETS = {
    "small": Ablation(
        data=Data(train_examples=5000),
        epochs=Epochs(pretrain=20, augment=5, finetune=5),
        classifier=Classifier("ResNetSmall", learning_rate=1e-3, finetune_learning_rate=1e-4),
        augmenter=Augmenter(learning_rate=1e-3),
        batch_size=50,
        checkpoint_every=5,
    ),
    "quick": Ablation(
        data=Data(name="digits"),
        epochs=Epochs(pretrain=5, augment=5, finetune=5),
        classifier=Classifier("ResNetSmall", learning_rate=1e-2, finetune_learning_rate=1e-3),
        augmenter=Augmenter(learning_rate=1e-3),
        batch_size=64,
        checkpoint_every=5,
    ),
}

SEARCH_PRESETS = {
    "full": Search(data=Data(held_out=5000), evaluate_every=200, checkpoint_every=5),
    "small": Search(
        data=Data(train_examples=5000, held_out=5000),
        epochs=SearchEpochs(20),
        classifier=ScheduledClassifier("ResNetSmall"),
        batch_size=50,
        evaluate_every=20,
        checkpoint_every=5,
    ),
    "quick": Search(
        data=Data(name="digits", held_out=300),
        trials=4,
        epochs=SearchEpochs(4),
        classifier=ScheduledClassifier("ResNetSmall"),
        batch_size=64,
        evaluate_every=4,
        checkpoint_every=2,
    ),
}

LEARNING_PRESETS = {
    "full": Learning(policy="flip_crop", evaluate_every=10, checkpoint_every=5),
    "small": Learning(
        data=Data(train_examples=5000),
        epochs=LearningEpochs(40),
        classifier=ScheduledClassifier("ResNetSmall"),
        batch_size=50,
        evaluate_every=5,
        checkpoint_every=5,
    ),
    "quick": Learning(
        data=Data(name="digits"),
        policy="identity",
        epochs=LearningEpochs(15),
        classifier=ScheduledClassifier("ResNetSmall"),
        learned=MatchingAugmenter(padding_mode="border"),
        batch_size=64,
        checkpoint_every=5,
    ),
}

ACTIVE_LEARNING_PRESETS = {
    "full": ActiveLearning(checkpoint_every=10),
    "small": ActiveLearning(
        labels=Labels(candidates=4000),
        epochs=RoundEpochs(first=30, later=2),
        classifier=ScheduledClassifier("ResNetSmall", learning_rate=0.05),
        batch_size=50,
        checkpoint_every=30,
    ),
    "quick": ActiveLearning(
        data=Data(name="digits"),
        labels=Labels(first=64, query=32, rounds=2, candidates=200),
        epochs=RoundEpochs(first=4, later=2),
        classifier=ScheduledClassifier("ResNetSmall", learning_rate=0.05),
        batch_size=32,
        checkpoint_every=4,
    ),
}
