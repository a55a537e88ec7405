"""Odd data, odd numbers, damaged files: named, or harmless."""

import dataclasses
import pickle
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import active_learning, cli, compare, search
from experiments.named_policies import named_policy
from maxent_aug import (
    augmenter_file,
    checkpoint,
    config,
    data,
    losses,
    models,
    phases,
    programs,
    steps,
    train,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
EXAMPLES = 40
SHORT = small_run.short(1, 1, 1)


def planted(**arrays):
    """The 48 digits of a small run with other arrays in place of theirs."""
    good = small_run.data()
    put = {name: jax.device_put(a, getattr(good, name).sharding) for name, a in arrays.items()}
    return good.replace(**put)


def one(array, value):
    """With a value in place of the sixth."""
    return np.where(np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)) == 5, value, array)


@pytest.mark.campaign
@pytest.mark.parametrize("which", ["all zeros", "one of zeros", "all of one class"])
def test_poor_data_are_harmless(tmp_path, monkeypatch, which):
    """Every figure stays finite, in every phase."""
    images, labels = (
        np.asarray(a) for a in (small_run.data().train_images, small_run.data().train_labels)
    )
    made = {
        "all zeros": planted(train_images=0 * images),
        "one of zeros": planted(train_images=one(images, np.uint8(0))),
        "all of one class": planted(train_labels=np.full_like(labels, 3)),
    }
    monkeypatch.setattr(small_run, "data", lambda _: made[which])
    final = small_run.go(tmp_path, config=SHORT)
    _, lines = small_run.outcome(tmp_path, final)
    assert len(lines) == 4
    for line in lines:
        assert all(isinstance(v, str) or np.isfinite(v) for v in line.values()), line


@pytest.mark.parametrize("which", ["NaN in all", "label out of range"])
def test_impossible_data_are_named(tmp_path, monkeypatch, which):
    """Past all checks of data, which hold no NaN, since they are bytes, and no such label."""
    good = small_run.data()
    made = {
        "NaN in all": planted(mean=np.full_like(good.mean, np.nan)),
        "label out of range": planted(
            train_labels=one(np.asarray(good.train_labels), 10).astype(np.int32)
        ),
    }
    monkeypatch.setattr(small_run, "data", lambda _: made[which])
    with pytest.raises(train.NonFiniteLoss, match=r"in phase pretrain, epoch 1, step \d, seed 0"):
        small_run.go(tmp_path, config=SHORT)
    assert not list(tmp_path.rglob("sha256.json"))


@pytest.mark.parametrize(
    "loss",
    [
        *[partial(losses.max_entropy_loss, form=form) for form in losses.LOSS_FORMS],
        *[partial(losses.cross_entropy, labels=jnp.int32(label)) for label in range(3)],
        partial(losses.cross_entropy, labels=jnp.array([0.0, 0.5, 0.5])),
        lambda logits: losses.discriminator_loss(logits, -logits),
        lambda logits: losses.generator_loss(logits, saturating=True),
        lambda logits: losses.generator_loss(logits, saturating=False),
    ],
)
def test_logits_of_1e38_are_harmless(loss):
    for logits in ([1e38, -1e38, 0.0], [-1e38] * 3, [1e38] * 3):
        value, slope = jax.value_and_grad(lambda x: loss(x).max())(jnp.array(logits))
        assert np.isfinite(value) and np.isfinite(slope).all(), logits


IMAGES, SHAPE = 1437, (8, 8, 1)  # digits
# From what each field allows, and well beyond it.
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 32, 64, 1000, 1e-45, 1e-8, 1e-3, 0.05, 0.1, 0.5, 0.95, 1.0]),
    st.sampled_from([1e3, 1e6, 1e12, 1e30, 3.4e38, 1e300, -1e-45, float("nan"), float("inf")]),
    st.sampled_from([10**6, 2**31 - 1, 2**31, 2**32, 10**12, 2**63, 10**38, 10**400]),
    st.floats(),
    st.floats(0, 1),
    st.integers(-2, 2**70),
)


def network(settings):
    return phases.make_classifier(settings, 10)


def legs_of_paper(settings):
    return phases.schedule(settings, network(settings), SHAPE)


def legs_of_comparison(settings):
    rows = {name: compare._row(name, 10) for name in ("flip", "printed", "learned")}
    steps_per_epoch = IMAGES // settings.batch_size
    legs = phases.comparison(settings, network(settings), rows, SHAPE, steps_per_epoch)
    return sum(legs.values(), ())


def legs_of_ablation(settings):
    factors = config.Factors(loss_forms=("intended",), draws=("stochastic",))
    replaced = dataclasses.replace(settings, factors=factors)
    pretrain, baseline, variants = phases.ablation(replaced, network(settings), SHAPE)
    return (pretrain, baseline, *sum(variants.values(), ()))


def legs_of_active_learning(settings):
    sizes = active_learning._sizes(settings, IMAGES)[:2]
    digits = small_run.digits(0, 48)
    return active_learning._legs(settings, digits, sizes, "learning_loss")


def legs_of_search(settings):
    bounds = phases.affine_bounds(search.draw(settings.bounds, 0))
    trials = {"trial-00": named_policy("half_affine", 10, bounds)}
    steps_per_epoch = IMAGES // settings.batch_size
    legs = phases.search(settings, network(settings), trials, SHAPE, steps_per_epoch)
    return tuple(legs.values())


def legs_of_learning(settings):
    steps_per_epoch = IMAGES // settings.batch_size
    policy = programs.unchanged
    return phases.learning(settings, network(settings), policy, SHAPE, steps_per_epoch)


EXPERIMENTS = {
    "paper": (config.PRESETS, legs_of_paper),
    "compare": (config.COMPARISON_PRESETS, legs_of_comparison),
    "ablation": (config.ABLATION_PRESETS, legs_of_ablation),
    "search": (config.SEARCH_PRESETS, legs_of_search),
    "learn": (config.LEARNING_PRESETS, legs_of_learning),
    "active_learning": (config.ACTIVE_LEARNING_PRESETS, legs_of_active_learning),
}


def replaced(settings, name, value):
    """With a value in place of the field's of this dotted name."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(
        settings, **{first: replaced(getattr(settings, first), rest, value) if rest else value}
    )


def check_first_step(leg, state):
    """The first step of a phase, on four images, and the state after it are finite."""
    data, key = small_run.data(), jax.random.key(1)
    images = steps.normalize(data.train_images[:4], data.mean, data.sd)
    unseen = {"unseen": images[:3]} if leg.unseen.share else {}
    state, found = leg.step(state, images, data.train_labels[:4], key, **unseen)
    for leaf in jax.tree.leaves((state, found)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), (leg.name, found)


@pytest.mark.campaign
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_number_is_refused_at_once_or_the_first_steps_are_finite(experiment, monkeypatch):
    """One, two or three fields at a time; the first step of each phase, from untrained networks."""
    monkeypatch.setattr(models, "ResNetSmall", partial(models.ResNet, stage_sizes=(1,), width=4))
    presets, make_legs = EXPERIMENTS[experiment]
    fields = {n: f for n, f, v in cli._fields(presets["quick"]) if type(v) in (int, float)}
    kinds = {n: type(v) for n, _, v in cli._fields(presets["quick"])}
    counts = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(sorted(fields)), NUMBERS, min_size=1, max_size=3))
    @example({"config.epochs.train": 10**12})
    @example({"config.epochs.first": 10**12})
    @example({"config.augmenter.loss_weight": 3e38})
    @example({"config.augmenter.loss_weight": 1e6})
    @example({"config.learned.strictness": 50.0, "config.learned.learning_rate": 1e6})
    def check(values):
        assume(values.keys() <= fields.keys())
        chosen = presets["quick"]
        try:
            for name, value in values.items():
                value = kinds[name](value)
                cli._check(name, fields[name], value)
                chosen = replaced(chosen, name.removeprefix("config."), value)
        except (ValueError, OverflowError, cli.UsageError):  # the first two as the flags' parser
            counts["refused"] += 1
            return
        try:
            legs = make_legs(chosen) if chosen.batch_size <= IMAGES else ()  # load_data's check
        except cli.UsageError:
            legs = ()
        counts["finite" if legs else "refused"] += 1
        states = {None: None}
        for leg in legs:
            states[leg] = leg.begin(states[leg.follows], jax.random.key(0))
            check_first_step(leg, states[leg])

    check()
    print(dict(counts))
    assert min(counts["refused"], counts["finite"]) > EXAMPLES / 20


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["deleted", "truncated", "zeroed"])
def test_each_file_of_the_newest_checkpoint_in_turn(finished, tmp_path, caplog, how):
    """The run goes on from the one before, says so, and ends in the same bits."""
    workdir, expected = finished
    last = Path("checkpoints") / "seed0" / small_run.phases()[-1].name
    newest, before = (last / str(step) for step in checkpoint.saved_steps(workdir / last))
    files = [p.relative_to(workdir) for p in (workdir / newest).rglob("*") if p.is_file()]
    assert len(files) > 5
    for number, name in enumerate(files):
        copy = shutil.copytree(workdir, tmp_path / str(number))
        content = (copy / name).read_bytes()
        changed = {"truncated": content[: len(content) // 2], "zeroed": bytes(len(content))}
        (copy / name).write_bytes(changed[how]) if how in changed else (copy / name).unlink()
        if how in changed and changed[how] == content:
            continue  # an empty file
        caplog.clear()
        final = small_run.go(copy)
        unfinished = how == "deleted" and name.name == checkpoint.DIGESTS  # as a kill leaves it
        said = "was not finished, removed" if unfinished else "is damaged, skipped"
        assert caplog.text.count(f"checkpoint {copy / newest} {said}") == 1, name
        assert small_run.outcome(copy, final) == expected, name
        assert (copy / before).exists() and (copy / newest).exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, outcome) of a small run."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, small_run.outcome(workdir, small_run.go(workdir))


@pytest.mark.campaign
def test_no_pickle_is_loaded(finished, tmp_path):
    """Of checkpoints, prepared data, pictures or an augmenter's file."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    for label in "ab":
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8), number).save(tmp_path / "pictures" / label / f"{number}.png")
    (tmp_path / "data").mkdir()
    data.load("digits", "test", tmp_path / "data")
    module, key = models.StochasticAugmenter(hidden=4), jax.random.key(0)
    params = module.init(key, jnp.zeros((1, *SHAPE)), key)["params"]
    path, ones = tmp_path / "augmenter.npz", np.ones(1, np.float32)
    augmenter_file.save_augmenter(path, module, params, mean=ones, sd=ones, image_shape=SHAPE)
    loaded, watching = [], True

    def hook(name, arguments):
        if watching and name == "pickle.find_class":
            loaded.append(arguments)

    sys.addaudithook(hook)
    pickle.loads(pickle.dumps(Path))
    assert loaded.pop() and not loaded
    small_run.go(workdir)
    data.load("digits", "test", tmp_path / "data")
    data.load("folder", "train", tmp_path / "pictures")
    augmenter_file.load_augmenter(path)
    watching = False  # a hook stays for ever
    assert not loaded
