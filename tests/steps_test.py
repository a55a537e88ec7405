"""One step a phase: who changes, who does not, and in which direction."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from maxent_aug import losses, models, steps

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGE_SHAPE = (8, 8, 1)
# Within the default ones several boxes suit images this small, and the start decides among them.
NARROW = models.AffineBounds()
OPTIONS = {"form": "intended", "target": 0.3, "saturating": True}


@pytest.fixture(scope="module")
def state():
    keys = jax.random.split(jax.random.key(0), 3)
    classifier = models.ResNet(3, stage_sizes=(1, 1), width=4)
    create = partial(steps.create_model_state, image_shape=IMAGE_SHAPE)
    return steps.State(
        classifier=create(classifier, keys[0], tx=optax.adam(0.01)),
        augmenter=create(models.Augmenter(), keys[1], tx=optax.adam(1e-3)),
        discriminator=create(models.Discriminator(width=4), keys[2], tx=optax.sgd(0.1)),
    )


@pytest.fixture(scope="module")
def batch():
    labels = jnp.arange(24) % 3
    noise = jax.random.normal(jax.random.key(1), (24, *IMAGE_SHAPE))
    # A bright row whose place gives the class away.
    return noise * 0.3 + 2 * jax.nn.one_hot(2 * labels + 1, 8)[:, :, None, None], labels


KEY = jax.random.key(2)

classifier_step = jax.jit(partial(steps.classifier_step, key=KEY))
augment_step = jax.jit(partial(steps.augment_step, key=KEY, loss_weight=2.0, **OPTIONS))


def test_phases_1_and_3_change_the_classifier_alone(state, batch):
    for before in (state, state.replace(augmenter=None, discriminator=None)):
        after, metrics = classifier_step(before, *batch)
        chex.assert_trees_all_equal(after.augmenter, before.augmenter)
        chex.assert_trees_all_equal(after.discriminator, before.discriminator)
        assert changed(after.classifier.params, before.classifier.params)
        assert changed(after.classifier.batch_stats, before.classifier.batch_stats)
        chex.assert_tree_all_finite(metrics)


def test_a_new_state_is_the_same_within_a_program_and_for_each_of_several_keys():
    module, tx = models.Discriminator(width=4), optax.sgd(0.1)
    keys = jax.random.split(jax.random.key(0), 2)

    def create(key):
        return steps.create_model_state(module, key, IMAGE_SHAPE, tx)

    expected = create(keys[1])
    inside = jax.jit(lambda: (create(keys[1]), jax.vmap(create)(keys)))()
    mapped = jax.vmap(create)(keys)
    assert jax.eval_shape(create, keys[1]).params == jax.eval_shape(lambda: expected.params)
    for found in (inside[0], *(jax.tree.map(lambda x: x[1], x) for x in (inside[1], mapped))):
        chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5)


def test_phase_2_changes_augmenter_and_discriminator_alone(state, batch):
    after, metrics = augment_step(state, *batch)
    chex.assert_trees_all_equal(after.classifier, state.classifier)  # batch statistics included
    assert changed(after.augmenter.params, state.augmenter.params)
    assert changed(after.discriminator.params, state.discriminator.params)
    chex.assert_tree_all_finite(metrics)


def changed(after, before):
    return any(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(np.not_equal(a, b))), after, before))
    )


def test_jit_equals_eager(state, batch):
    eager, eager_metrics = steps.augment_step(state, *batch, KEY, loss_weight=2.0, **OPTIONS)
    jitted, jitted_metrics = augment_step(state, *batch)
    chex.assert_trees_all_close(eager_metrics, jitted_metrics, rtol=1e-4, atol=1e-5)
    discriminators = eager.discriminator.params, jitted.discriminator.params
    chex.assert_trees_all_close(*discriminators, rtol=1e-3, atol=1e-5)


def test_the_classifier_learns(state, batch):
    first = None
    for _ in range(30):
        state, metrics = classifier_step(state, *batch)
        first = first or float(metrics["loss"])
    assert float(metrics["loss"]) < 0.3 * first
    values = jax.jit(steps.eval_step)(state, *batch, KEY)
    assert float(values["accuracy"].mean()) > 0.9


@pytest.fixture(scope="module")
def stochastic():
    key = jax.random.key(5)
    module = models.StochasticAugmenter(NARROW, "bilinear", start_width=0.5, share=1.0)
    return steps.create_model_state(module, key, IMAGE_SHAPE, optax.adam(1e-2), key)


def test_what_the_classifier_has_not_seen_is_as_uncertain_as_the_rest_on_average(state, batch):
    given = []

    def record(_, first, key=None, uncertainty=None, chosen=None, method=None):
        if method == "partition":
            return 2, 3
        given.append((uncertainty, chosen))
        return first, None

    images, labels = batch
    augmenter = steps.ModelState.create(apply_fn=record, params={}, tx=optax.sgd(1.0))
    steps.frozen_step(steps.State(state.classifier, augmenter), images, labels, KEY)
    ((uncertainty, chosen),) = given
    wanted = np.arange(len(images)) % (len(images) // 2) < 3
    np.testing.assert_array_equal(chosen, wanted)
    own = losses.uncertainty(state.classifier(images))
    np.testing.assert_allclose(uncertainty[wanted], own[wanted], rtol=1e-4)
    np.testing.assert_allclose(uncertainty[~wanted], np.mean(own[wanted]), rtol=1e-4)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_joint_phase_changes_classifier_and_augmenter(state, stochastic, batch, share):
    module = models.StochasticAugmenter(NARROW, "bilinear", start_width=0.5, share=share)
    before = steps.State(state.classifier, stochastic.replace(apply_fn=module.apply))
    images, labels = batch
    unseen = images[:8] + 0.1
    step = jax.jit(steps.joint_step)
    after, metrics = step(before, images, labels, KEY, unseen)
    assert changed(after.classifier.params, before.classifier.params)
    assert changed(after.augmenter.params, before.augmenter.params)
    chex.assert_tree_all_finite((after.classifier.params, after.augmenter.params, metrics))
    # The augmenter learns from the unseen images alone.
    match = jax.jit(partial(steps.matching_step, classify=state.classifier))
    matched, _ = match(before.augmenter, unseen, key=jax.random.split(KEY)[1])
    chex.assert_trees_all_close(after.augmenter.params, matched.params, rtol=1e-4, atol=1e-6)
    # The classifier is that of a step with the augmenter frozen, and of a plain step on its images.
    key, count = jax.random.split(KEY)[0], len(images)
    frozen, _ = jax.jit(steps.frozen_step)(before, images, labels, key)
    groups, number = module.apply({}, count, method="partition")
    assert groups * number == share * count
    chosen = np.arange(count) % (count // groups) < number
    uncertainty = losses.uncertainty(state.classifier(images))
    augmented, theta = stochastic(images, key, uncertainty, chosen)
    np.testing.assert_array_equal(np.any(np.abs(theta - np.eye(2, 3)) > 1e-4, axis=(1, 2)), chosen)
    plain, _ = classifier_step(steps.State(state.classifier), augmented, labels)
    for found in (after, frozen):
        difference = jax.tree.map(jnp.subtract, plain.classifier.params, found.classifier.params)
        assert optax.tree.norm(difference) < 1e-3 * optax.tree.norm(plain.classifier.params)


def test_an_augmenter_that_does_not_learn_waits_as_it_is(state, stochastic, batch):
    """And whether it learns may be known to the program or to the device alone."""
    images, labels = batch
    before = steps.State(state.classifier, stochastic)
    step = jax.jit(steps.joint_step)
    learned, metrics = step(before, images, labels, KEY, images[:8])
    assert 0 < metrics["uncertainty_unseen"] < 1
    waited, kept = step(learned, images, labels, KEY, None)
    chex.assert_trees_all_equal(waited.augmenter.params, learned.augmenter.params)
    assert waited.augmenter.step == 1 and waited.classifier.step == 2
    assert set(kept) == set(metrics)
    remembered = ("uncertainty_augmented", "uncertainty_unseen", "certainty_weight", "half_width")
    for name in remembered:
        assert float(kept[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    traced = jax.jit(
        lambda state, learns: steps.joint_step(
            state, images, labels, KEY, images[:8], learns=learns
        )
    )
    for start, learns, expected in ((before, True, learned), (learned, False, waited)):
        found, _ = traced(start, jnp.array(learns))
        for network in ("classifier", "augmenter"):
            close = getattr(found, network).params, getattr(expected, network).params
            chex.assert_trees_all_close(*close, rtol=1e-3, atol=1e-4)


def test_a_replay_has_the_augmenter_of_the_same_time(state, stochastic, batch):
    """Four updates in two snapshots: the second and the fourth; afterwards the last."""
    images, labels = batch
    stack = jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), stochastic.params)
    joint = partial(steps.joint_step, unseen=images[:8])
    plain_step, record = (
        jax.jit(step, compiler_options={"xla_cpu_use_fusion_emitters": True})  # as for users
        for step in (joint, partial(steps.recorded_step, step=joint, updates=4))
    )
    at = steps.State(state.classifier, stochastic, snapshots=stack)
    augmenters = []
    for i in range(4):
        plain, _ = plain_step(at.replace(snapshots=None), images, labels, jax.random.key(i))
        at, _ = record(at, images, labels, jax.random.key(i))
        assert not changed(plain, at.replace(snapshots=None))
        augmenters.append(at.augmenter)
    for index, time in enumerate((1, 3)):
        kept = jax.tree.map(lambda x, i=index: x[i], at.snapshots)
        assert not changed(kept, augmenters[time].params)
    replay = jax.jit(partial(steps.replayed_step, updates=4))
    again = steps.State(state.classifier, at.augmenter, snapshots=at.snapshots)
    step = jax.jit(steps.frozen_step)
    for time in (1, 1, 3, 3, 3):
        by_hand, _ = step(again.replace(augmenter=augmenters[time]), images, labels, KEY)
        again, _ = replay(again, images, labels, KEY)
        chex.assert_trees_all_close(by_hand.classifier.params, again.classifier.params, rtol=1e-5)
        assert not changed((again.augmenter, again.snapshots), (at.augmenter, at.snapshots))


def test_one_box_for_all_is_each_images_own_only_while_these_are_alike(state, stochastic, batch):
    evaluate = jax.jit(steps.joint_eval_step)
    weights = state.classifier.params
    weights = weights | {"Dense_0": jax.tree.map(lambda x: 20 * x, weights["Dense_0"])}
    classifier = state.classifier.replace(params=weights)  # a new one is as uncertain of all images
    new = evaluate(steps.State(classifier, stochastic), *batch, KEY)
    np.testing.assert_allclose(new["same_box_entropy"], losses.entropy(new["logits_after"]), 1e-4)
    assert new["same_box_accuracy"].mean() == new["augmented_accuracy"].mean()
    kernel = stochastic.params["output_layer"]["kernel"]
    noise = jax.random.normal(KEY, kernel.shape)
    params = jax.tree.map(lambda x: noise if x is kernel else x, stochastic.params)
    own = evaluate(steps.State(classifier, stochastic.replace(params=params)), *batch, KEY)
    assert np.std(own["half_width"], axis=0).max() > 0.05
    difference = own["same_box_entropy"] - losses.entropy(own["logits_after"])
    assert np.abs(difference).max() > 1e-3


BRIGHT = jnp.zeros((24, *IMAGE_SHAPE)).at[:, 2:6, 2:6].set(0.12)


def by_light(images):
    """Of two classes, the less light is left in the frame's middle the less certain."""
    weight = jnp.zeros(IMAGE_SHAPE).at[2:6, 2:6].set(1.0)
    light = (images * weight).sum((1, 2, 3))
    return jnp.stack([light, -light], -1)


def tolerated(images, light=0.9):
    """The tolerance that makes images as uncertain as with so much of their light."""
    before, after = (losses.uncertainty(by_light(x)).mean() for x in (images, images * light))
    return float(after / before - 1)


def test_matching_finds_the_same_widths_from_wherever_it_starts():
    """Those at which augmented images are as uncertain as they may be."""
    found, options = [], {"classify": by_light, "strictness": 30.0}
    step = jax.jit(partial(steps.matching_step, tolerance=tolerated(BRIGHT), **options))
    for start_width in (0.1, 0.5, 0.9):
        module = models.StochasticAugmenter(NARROW, start_width=start_width, share=1.0)
        augmenter = steps.create_model_state(module, KEY, IMAGE_SHAPE, optax.adam(2e-2), KEY)
        path = []
        for index in range(400):
            augmenter, metrics = step(augmenter, BRIGHT, key=jax.random.fold_in(KEY, index))
            path.append([float(metrics["uncertainty_augmented"]), float(metrics["half_width"])])
        found.append(np.mean(path[-100:], axis=0))
    entropies, half_widths = np.transpose(found)
    target = float(losses.entropy(by_light(BRIGHT * 0.9)).mean())
    np.testing.assert_allclose(entropies, np.full(3, target), rtol=0.08)
    assert np.ptp(half_widths) < 0.03
    assert np.all((half_widths > 0.3) & (half_widths < 0.8))


def test_images_that_can_bear_more_get_wider_boxes():
    images = BRIGHT * jnp.where(jnp.arange(24) % 2, 0.6, 1.8)[:, None, None, None]
    module = models.StochasticAugmenter(share=1.0)
    augmenter = steps.create_model_state(module, KEY, IMAGE_SHAPE, optax.adam(2e-2), KEY)
    step = jax.jit(partial(steps.matching_step, classify=by_light, tolerance=tolerated(images)))
    for index in range(300):
        augmenter, _ = step(augmenter, images, key=jax.random.fold_in(KEY, index))
    uncertainty = losses.entropy(by_light(images))
    half_width = augmenter(uncertainty, method="box").half_width.mean(-1)
    assert half_width[1::2].max() + 0.1 < half_width[::2].min()
    swapped = augmenter(uncertainty[::-1], method="box").half_width.mean(-1)
    assert np.abs(swapped - half_width).max() > 0.05


def test_what_costs_no_certainty_is_opened_widest():
    """The pictures are round, so that a rotation changes next to nothing; a shift loses light."""
    y, x = jnp.mgrid[-3.5:4, -3.5:4]
    images = jnp.tile(0.4 * jnp.exp(-(x**2 + y**2) / 4)[..., None], (24, 1, 1, 1))
    module = models.StochasticAugmenter(share=1.0, padding_mode="zeros")
    augmenter = steps.create_model_state(module, KEY, IMAGE_SHAPE, optax.adam(2e-2), KEY)
    step = jax.jit(partial(steps.matching_step, classify=by_light, tolerance=0.1))
    for index in range(300):
        augmenter, _ = step(augmenter, images, key=jax.random.fold_in(KEY, index))
    uncertainty = losses.uncertainty(by_light(images))
    half_width = models.AffineBounds(*augmenter(uncertainty, method="box").half_width.mean(0))
    assert half_width.rotation > 0.8
    assert max(half_width.tx, half_width.ty) < 0.5


@pytest.mark.parametrize(
    ("light", "tolerance"), [(0.0, 0.1), (0.5, 0.0), (1.0, 0.1), (1.0, 1.0), (5.0, 0.1), (100, 0.1)]
)
def test_certainty_weighs_the_more_the_more_uncertain_images_are(stochastic, light, tolerance):
    """And no step outweighs all others, where the classifier is certain of whatever it is shown."""
    step = jax.jit(partial(steps.matching_step, classify=by_light, tolerance=tolerance))
    after, metrics = step(stochastic, BRIGHT * light, key=KEY)
    chex.assert_tree_all_finite((after.params, metrics))
    ratio = float(metrics["uncertainty_augmented"]) / max(
        1e-6, float(metrics["uncertainty_unseen"])
    )
    weight = float(metrics["certainty_weight"])
    assert weight == pytest.approx(1 / (1 + np.exp(-10 * (ratio - 1 - tolerance))), abs=1e-3)
    assert (weight > 0.5) == (ratio > 1 + tolerance) and (weight == 1) == (light == 5)
    second_moment = after.opt_state[0].nu["output_layer"]["bias"]
    assert np.all(np.sqrt(second_moment / 1e-3) < 20.0)


def test_boxes_come_back_from_their_bounds():
    """Where widths have no gradient of their own, and certainty has all the weight."""
    module = models.StochasticAugmenter(share=1.0)
    augmenter = steps.create_model_state(module, KEY, IMAGE_SHAPE, optax.adam(0.1), KEY)
    augmenter.params["output_layer"]["bias"] = jnp.full(6, 20.0)
    step = jax.jit(partial(steps.matching_step, classify=by_light))
    for index in range(300):
        augmenter, metrics = step(augmenter, BRIGHT, key=jax.random.fold_in(KEY, index))
        if index == 0:
            assert metrics["half_width"] > 0.999 and metrics["certainty_weight"] > 0.99
    assert metrics["half_width"] < 0.5


def of_three(images):
    """`by_light` with a third class."""
    return jnp.pad(by_light(images), ((0, 0), (0, 1)))


def test_running_uncertainties_begin_with_the_first_step(stochastic, batch):
    images, _ = batch
    step = jax.jit(partial(steps.matching_step, classify=of_three, memory=0.75))
    unseen = [images[:4] * scale for scale in (0.05, 0.2)]
    expected = [float(losses.entropy(of_three(x)).mean() / np.log2(3)) for x in unseen]
    first, metrics = step(stochastic, unseen[0], key=KEY)
    assert float(metrics["uncertainty_unseen"]) == pytest.approx(expected[0], rel=1e-4)
    second, metrics = step(first, unseen[1], key=KEY)
    running = 0.75 * expected[0] + 0.25 * expected[1]
    assert float(metrics["uncertainty_unseen"]) == pytest.approx(running, rel=1e-4)
    assert float(second.batch_stats["unseen"]) == pytest.approx(running, rel=1e-4)


def test_matching_in_a_scan_is_that_in_a_loop(stochastic):
    unseen, keys = jnp.split(BRIGHT, 3), jax.random.split(KEY, 3)

    def step(augmenter, each):
        return steps.matching_step(augmenter, each[0], by_light, each[1])

    scanned, _ = jax.jit(partial(jax.lax.scan, step))(stochastic, (jnp.stack(unseen), keys))
    looped = stochastic
    for each in zip(unseen, keys, strict=True):
        looped, _ = jax.jit(step)(looped, each)
    chex.assert_trees_all_close(scanned.params, looped.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(scanned.batch_stats, looped.batch_stats, rtol=1e-5)


@pytest.fixture(scope="module")
def fitted(state, batch):
    for _ in range(30):
        state, _ = classifier_step(state.replace(augmenter=None), *batch)
    return state


@pytest.mark.parametrize("form", ["printed", "intended", "gap"])
def test_the_sign_decides_whether_the_augmenter_makes_images_harder(state, fitted, batch, form):
    """The finding about the paper's formula, in small: its printed sign lowers the entropy."""
    start = state.replace(classifier=fitted.classifier)
    options = OPTIONS | {"form": form}
    step = jax.jit(partial(steps.augment_step, key=KEY, loss_weight=2.0, **options))
    after = start
    for _ in range(40):
        after, metrics = step(after, *batch)
    before = losses.entropy(start.classifier(batch[0])).mean()
    change = float(metrics["entropy"] - before)
    assert change < -0.005 if form == "printed" else change > 0.05


def test_phase_3_trains_on_the_augmented_images(state, batch):
    images, labels = batch
    shifted = jnp.eye(2, 3).at[0, 2].set(0.5)
    params = jax.tree.map(jnp.copy, state.augmenter.params)
    params["Localization_0"]["Dense_1"]["bias"] = shifted.ravel()
    moved = state.replace(augmenter=state.augmenter.replace(params=params))
    augmented, theta = moved.augmenter(images)
    np.testing.assert_allclose(theta, np.broadcast_to(shifted, theta.shape), atol=1e-6)
    on_augmented, _ = classifier_step(moved, images, labels)
    by_hand, _ = classifier_step(moved.replace(augmenter=None), augmented, labels)
    chex.assert_trees_all_close(
        on_augmented.classifier.batch_stats, by_hand.classifier.batch_stats, rtol=1e-4, atol=1e-5
    )


def test_evaluation_agrees_with_the_step_before_any_update(state, batch):
    images, labels = batch
    values = jax.jit(partial(steps.augment_eval_step, **OPTIONS))(state, images, labels, KEY)
    chex.assert_tree_shape_prefix(values, (24,))
    _, metrics = augment_step(state, images, labels)
    for name in ("generator_loss", "max_entropy_loss"):
        np.testing.assert_allclose(values[name].mean(), metrics[name], rtol=1e-4)
    np.testing.assert_allclose(values["logits_before"], values["logits_after"], atol=1e-4)
    plain = jax.jit(steps.eval_step)(state, images, labels, KEY)
    np.testing.assert_allclose(plain["loss"], values["loss"], rtol=1e-4)


def test_the_discriminator_learns_to_tell_a_shift(state, batch):
    images, labels = batch
    params = jax.tree.map(jnp.copy, state.augmenter.params)
    params["Localization_0"]["Dense_1"]["bias"] = jnp.eye(2, 3).at[:, 2].set(0.8).ravel()
    frozen = state.augmenter.replace(params=params, tx=optax.set_to_zero(), opt_state=())
    frozen = frozen.replace(opt_state=frozen.tx.init(params))
    after = state.replace(augmenter=frozen)
    for _ in range(60):
        after, metrics = augment_step(after, images, labels)
    assert float(metrics["discriminator_loss"]) < 0.5 * 2 * np.log(2)


def test_normalize_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    mean, sd = np.float32([0.4]), np.float32([0.25])
    normal = steps.normalize(images, mean, sd)
    assert normal.dtype == jnp.float32
    np.testing.assert_array_equal(steps.denormalize(normal, mean, sd), images)
    np.testing.assert_allclose(normal[0, 0, 0, 0], -1.6, rtol=1e-6)
    np.testing.assert_array_equal(steps.denormalize(jnp.full((1, 1, 1, 1), 99.0), mean, sd), 255)
    with jax.enable_x64(True):
        for given in (0.4, [0.4], np.array([0.4])):
            assert steps.normalize(images, given, 1).dtype == jnp.float32
    for wrong in (np.ones(2), np.ones((2, 1, 1, 1))):
        for change in (steps.normalize, steps.denormalize):
            with pytest.raises(ValueError, match=r"mean must be .*\[C\] with C = 1"):
                change(images, wrong, sd)
            with pytest.raises(ValueError, match="sd must be"):
                change(images, mean, wrong)


class Plain(nn.Module):
    """Somebody's own classifier: dropout, no statistics."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(16)(images[..., 0].mean(2))))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("phase", ["alone", "joint"])
def test_a_classifier_may_have_dropout_and_no_statistics(stochastic, batch, phase):
    classifier = steps.create_model_state(Plain(), KEY, IMAGE_SHAPE, optax.adam(1e-2))
    state, step = steps.State(classifier), steps.classifier_step
    if phase == "joint":
        state = state.replace(augmenter=stochastic)
        step = partial(steps.joint_step, unseen=batch[0][:8])
    step = jax.jit(step)
    one, other = (step(state, *batch, key=jax.random.key(i))[0].classifier for i in range(2))
    assert any(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True)
    )
    for index in range(60):
        state, metrics = step(state, *batch, key=jax.random.fold_in(KEY, index))
    assert metrics["loss"] < 0.8
    chex.assert_trees_all_equal(state.classifier(batch[0]), state.classifier(batch[0]))


class Normed(nn.Module):
    """A network with statistics of batch normalisation."""

    network: nn.Module

    @nn.compact
    def __call__(self, images, *inputs):
        return self.network(nn.BatchNorm(use_running_average=True)(images), *inputs)


def test_networks_of_phase_2_may_have_statistics(state, batch):
    create = partial(steps.create_model_state, image_shape=IMAGE_SHAPE, tx=optax.sgd(0.1))
    networks = [
        create(Normed(network), KEY)
        for network in (models.Augmenter(), models.Discriminator(width=4))
    ]
    augmenter, discriminator, metrics = steps.adversarial_step(
        *networks, batch[0], state.classifier
    )
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["discriminator_loss"])
    for before, after in zip(networks, (augmenter, discriminator), strict=True):
        chex.assert_trees_all_equal(before.batch_stats, after.batch_stats)
        assert after.step == 1


@pytest.mark.parametrize(
    "classify",
    [
        lambda images: images.mean((1, 2, 3)),
        lambda images: images.mean((1, 2))[:2],
        lambda images: (images.mean((1, 2)), images.mean((1, 2))),
    ],
)
def test_what_are_no_logits_is_refused(state, stochastic, batch, classify):
    images = batch[0]
    with pytest.raises(ValueError, match=r"must return logits \[B, m\] with B = 24, got"):
        steps.adversarial_step(state.augmenter, None, images, classify)
    with pytest.raises(ValueError, match="classifier must return logits"):
        steps.matching_step(stochastic, images, classify, KEY)


def test_matching_needs_a_stochastic_augmenter(state, batch):
    with pytest.raises(ValueError, match="a state of a StochasticAugmenter"):
        steps.matching_step(state.augmenter, batch[0], state.classifier, KEY)
    with pytest.raises(ValueError, match="a state of a StochasticAugmenter"):
        steps.joint_step(state, *batch, KEY, None)


def test_two_outputs_are_refused(batch):
    class TwoOutputs(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(3)(images.mean((1, 2))), images

    classifier = steps.create_model_state(TwoOutputs(), KEY, IMAGE_SHAPE, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"must return logits .* got tuple"):
        steps.classifier_step(steps.State(classifier), *batch, KEY)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tolerance": np.nan}, "tolerance must be a number from -1 to 1e.06, got nan"),
        ({"strictness": -1}, "strictness must be a number from 0 .* got -1"),
        ({"memory": 1.5}, "memory must be a number from 0 to 1, got 1.5"),
        ({"memory": None}, "memory .* got None"),
    ],
)
def test_numbers_of_matching(stochastic, state, batch, options, named):
    with pytest.raises(ValueError, match=named):
        steps.matching_step(stochastic, batch[0], state.classifier, KEY, **options)


def test_matching_refuses_no_images(stochastic, state, batch):
    """Whose mean uncertainty, NaN, would be remembered for ever."""
    with pytest.raises(ValueError, match=r"unseen must hold an image or more, got \(0, "):
        steps.matching_step(stochastic, batch[0][:0], state.classifier, KEY)


def test_a_tolerance_may_be_traced(stochastic, state, batch):
    def learn(tolerance):
        return steps.matching_step(
            stochastic, batch[0], state.classifier, KEY, tolerance=tolerance
        )[1]

    chex.assert_trees_all_close(jax.jit(learn)(0.2), jax.jit(partial(learn, 0.2))(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8, 3), (8, 8), (8.0, 8, 3), 8])
def test_a_state_needs_an_image_shape(shape):
    with pytest.raises(ValueError, match="image_shape must be"):
        steps.create_model_state(models.Discriminator(), KEY, shape, optax.sgd(0.1))


def test_a_state_keeps_all_variables_or_says_so():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, images):
            self.sow("intermediates", "mean", images.mean())
            self.variable("cache", "count", jnp.zeros, ())
            return nn.Dense(3)(images.mean((1, 2)))

    with pytest.raises(ValueError, match=r"variables \['cache'\]"):
        steps.create_model_state(Counting(), KEY, IMAGE_SHAPE, optax.sgd(0.1))


def test_the_state_keeps_its_types(state, batch):
    """A weak type that a step made strong would compile every program twice."""
    after, _ = augment_step(state, *batch)
    after, _ = classifier_step(after, *batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    weak = jax.tree.map(lambda x: jnp.asarray(x).weak_type, state)
    assert not any(jax.tree.leaves(weak))


def test_losses_are_learnt_to_be_ranked(batch):
    """Images of pure noise, with labels at random, keep a larger loss than the others."""
    images, labels = batch
    noisy = jnp.arange(24) % 2 == 0
    images = jnp.where(noisy[:, None, None, None], images * 0.01, images)
    module = models.LossPredictor(models.ResNet(3, stage_sizes=(1, 1), width=4), hidden=16)
    state = steps.State(
        steps.create_model_state(module, jax.random.key(0), IMAGE_SHAPE, optax.adam(3e-3))
    )
    step = jax.jit(partial(steps.loss_prediction_step, key=KEY, backbone_updates=30))
    first = None
    order = jnp.concatenate([jnp.arange(0, 24, 2), jnp.arange(1, 24, 2)])  # pairs of both kinds
    for _ in range(60):
        state, metrics = step(state, images[order], labels[order])
        first = first or float(metrics["ranking_loss"])
    assert float(metrics["ranking_loss"]) < 0.5 * first
    variables = {
        "params": state.classifier.params,
        "batch_stats": state.classifier.batch_stats,
    }
    _, predicted = module.apply(variables, images, method="with_loss")
    assert predicted[noisy].mean() > predicted[~noisy].mean()
