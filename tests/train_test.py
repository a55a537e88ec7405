"""Runs that survive: whatever stops one, it ends bit-equal to one that was never stopped."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from maxent_aug import checkpoint, metrics, models, phases, programs, steps, train
from maxent_aug.config import ComparedEpochs, Comparison, MatchingAugmenter
from maxent_aug.run_folder import RunFolderError

STEPS = 3  # an epoch
ROOT = Path(__file__).parent.parent


class Watcher:
    """Copies a folder whenever a file in it is about to be made, moved or removed."""

    def __init__(self):
        self.workdir = self.copies = None
        sys.addaudithook(self.event)

    def event(self, name, args):
        interesting = name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        if self.workdir and interesting and str(self.workdir) in str(args[0]):
            self.copy()

    def copy(self):
        workdir, self.workdir = self.workdir, None  # copying makes events, too
        shutil.copytree(workdir, self.copies / f"{len(list(self.copies.iterdir())):04}")
        self.workdir = workdir


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(outcome, folder, copies of the folder as kills at all moments would leave it)."""
    watcher = Watcher()
    workdir, watcher.copies = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("copies")
    watcher.workdir = workdir
    with pytest.MonkeyPatch.context() as patch:
        write = metrics.MetricsWriter.write

        def write_and_copy(self, record):
            write(self, record)
            watcher.copy()

        patch.setattr(metrics.MetricsWriter, "write", write_and_copy)
        final = small_run.go(workdir)
    watcher.workdir = None
    return small_run.outcome(workdir, final), workdir, sorted(watcher.copies.iterdir())


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """The finished run in a folder of its own."""
    return Path(shutil.copytree(uninterrupted[1], tmp_path / "run"))


def check_equal(workdir, final, expected):
    digests, lines = small_run.outcome(workdir, final)
    assert digests == expected[0]
    assert lines == expected[1]


def test_a_kill_at_any_moment_changes_nothing(uninterrupted, tmp_path):
    """What SIGKILL leaves is the files of a moment; MAXENT_KILLS=all tries each."""
    expected, _, copies = uninterrupted
    assert len(copies) > 50
    wanted = os.environ.get("MAXENT_KILLS", "6")
    chosen = np.random.default_rng(0).permutation(len(copies))
    for number in chosen if wanted == "all" else chosen[: int(wanted)]:
        workdir = tmp_path / str(number)
        shutil.copytree(copies[number], workdir)
        check_equal(workdir, small_run.go(workdir), expected)
        assert not list(workdir.glob("**/*tmp*"))


@pytest.mark.parametrize("updates", [1, STEPS + 1, 2 * STEPS + 3, 19, 27])
def test_a_signal_saves_at_once(uninterrupted, tmp_path, updates, request):
    """In each phase, in the middle of an epoch and at its end."""
    number = signal.SIGTERM if updates % 2 else signal.SIGINT
    if number == signal.SIGINT:  # ignored where these tests run in the background
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))
    done = 0

    def update(**_):
        nonlocal done
        done += 1
        if done == updates:
            os.kill(os.getpid(), number)

    with pytest.raises(train.Interrupted, match=r"stopped in phase .*, epoch \d, step \d") as error:
        small_run.go(tmp_path, update=update)
    assert error.value.signal_number == number
    assert done <= updates + 1  # the epoch's end is told, too
    check_equal(tmp_path, small_run.go(tmp_path), uninterrupted[0])


def test_a_signal_before_the_first_step_stops_before_it_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "train_program", lambda *_, **__: pytest.fail("compiled"))
    real = checkpoint.restore_newest

    def restore(manager, like):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(manager, like)

    monkeypatch.setattr(checkpoint, "restore_newest", restore)
    with pytest.raises(train.Interrupted, match="phase pretrain, epoch 1, step 0"):
        small_run.go(tmp_path)


def test_a_process_killed_while_it_writes_a_checkpoint(tmp_path, uninterrupted):
    """SIGTERM to a real command line, then SIGKILL during a write; then to the end from here."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    workdir = tmp_path / "run"
    epochs = [f"--config.epochs.{kind}=2" for kind in ("pretrain", "augment", "finetune")]
    command = [sys.executable, "tests/small_run.py", "--preset=quick", f"--workdir={workdir}"]
    command += ["--nocompilation_cache"]

    def start():
        return subprocess.Popen(
            command + epochs,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start()
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped in phase pretrain, epoch 1" in errors
    assert "run the same command to resume" in errors
    assert errors.count("\n") == 1
    process = start()
    while process.poll() is None and not list(workdir.glob("checkpoints/*/*/*tmp*")):
        pass
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    check_equal(workdir, small_run.go(workdir), uninterrupted[0])


def files_of_newest(workdir, phase):
    folder = workdir / "checkpoints" / "seed0" / phase
    newest = folder / str(checkpoint.saved_steps(folder)[0])
    return newest, sorted(p for p in newest.rglob("*") if p.is_file())


def damage(path, how):
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(bytes(len(content)))


@pytest.mark.parametrize("how", ["deleted", "truncated", "zeroed"])
def test_damage_to_the_newest_checkpoint(copy, uninterrupted, how, caplog):
    """A phase that others follow, all of its files at once."""
    newest, files = files_of_newest(copy, "pretrain")
    for path in files:
        damage(path, how)
    check_same_but_order(copy, uninterrupted[0])
    said = "was not finished, removed" if how == "deleted" else "is damaged, skipped"
    assert f"checkpoint {newest} {said}" in caplog.text
    caplog.clear()
    check_same_but_order(copy, uninterrupted[0])
    assert not caplog.text


def check_same_but_order(workdir, expected):
    """A phase that is trained again writes its lines after those of later phases."""
    digests, lines = small_run.outcome(workdir, small_run.go(workdir))
    assert digests == expected[0]
    assert sorted(map(str, lines)) == sorted(map(str, expected[1]))


def test_all_checkpoints_damaged(copy):
    for step in (copy / "checkpoints" / "seed0" / "intended-augment").iterdir():
        shutil.rmtree(step / "default")
    for _ in range(2):
        with pytest.raises(checkpoint.CheckpointError, match="intended-augment can be read; del"):
            small_run.go(copy)


def test_a_deleted_phase_is_trained_again(copy, uninterrupted):
    shutil.rmtree(copy / "checkpoints" / "seed0" / "intended-augment")
    check_same_but_order(copy, uninterrupted[0])


def test_metrics_removed_or_damaged_under_a_finished_run(copy):
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    with pytest.raises(RunFolderError, match="lacks epoch 1 of phase pretrain, seed 0; put"):
        small_run.go(copy)
    path.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(RunFolderError, match="lacks epoch 2 of phase baseline-finetune"):
        small_run.go(copy)
    path.write_text("".join([*lines[:3], "{broken\n", *lines[4:]]))
    with pytest.raises(metrics.MetricsError, match="line 4"):
        small_run.go(copy)


def test_more_seeds_go_on_with_the_new_ones_only(copy, uninterrupted):
    before = (copy / "metrics.jsonl").read_text()
    small_run.go(copy, seeds=2)
    after = (copy / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert [r["seed"] for r in metrics.read(copy / "metrics.jsonl")] == [0] * 8 + [1] * 8


def test_a_loss_that_is_not_finite_stops_the_run(copy):
    pretrain, baseline = small_run.phases()[:2]
    tx = optax.adam(1e30)

    def begin(start, key):
        state = baseline.begin(start, key)
        optimizer = tx.init(state.classifier.params)
        return state.replace(classifier=state.classifier.replace(tx=tx, opt_state=optimizer))

    folder = copy / "checkpoints" / "seed0"
    shutil.rmtree(folder / "baseline-finetune")
    legs = (pretrain, dataclasses.replace(baseline, begin=begin))
    place = r"is not finite in phase baseline-finetune, epoch 1, step \d, seed 0"
    words = f"{place}; last good checkpoint: {folder / 'pretrain' / '6'}; "
    for _ in range(2):
        with pytest.raises(train.NonFiniteLoss, match=words):
            small_run.go(copy, legs=legs)
    assert not checkpoint.saved_steps(folder / "baseline-finetune")


def spoil(grads, state, params=None):
    """An optimiser that keeps the weights, but for one step that makes them NaN."""
    del params
    count, bad_step = state
    updates = jax.tree.map(lambda g: jnp.where(count + 1 == bad_step, jnp.nan, 0 * g), grads)
    return updates, (count + 1, bad_step)


SPOILER = optax.GradientTransformation(lambda _: (), spoil)


@pytest.mark.parametrize("interrupt", [False, True])
@pytest.mark.parametrize("bad_step", [2, STEPS, STEPS + 1])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, bad_step, interrupt):
    """The loss of the step that spoils them was finite."""
    pretrain = small_run.phases()[0]

    def begin(start, key):
        classifier = pretrain.begin(start, key).classifier
        count = jnp.zeros((), jnp.int32), jnp.int32(bad_step)
        return steps.State(classifier.replace(tx=SPOILER, opt_state=count))

    def update(**_):
        nonlocal done
        done += 1
        if interrupt and done == bad_step + (bad_step > STEPS):  # an epoch's end counts, too
            os.kill(os.getpid(), signal.SIGTERM)

    done = 0
    phase = dataclasses.replace(pretrain, begin=begin)
    with pytest.raises(train.NonFiniteLoss, match=r"phase pretrain, epoch \d, step \d"):
        small_run.go(tmp_path, update=update, legs=(phase,))
    expected = [STEPS] if bad_step > STEPS else []
    assert checkpoint.saved_steps(tmp_path / "checkpoints" / "seed0" / "pretrain") == expected


def begin_all():
    """Each phase with a state to start it from, untrained."""
    states = {None: None}
    for phase in small_run.phases():
        states[phase] = phase.begin(states[phase.follows], jax.random.key(0))
    return states


def run_steps(phase, state, devices, count, calls=None, batch_size=16):
    """`count` steps in one call, or single ones: (state, sums)."""
    mesh, data = small_run.mesh(devices), small_run.data(devices)
    replicated = jax.NamedSharding(mesh, jax.P())
    unseen, sizes = phase.unseen, (batch_size, phase.unseen.batch_size)
    names = programs.metric_names(phase.step, mesh, state, (8, 8, 1), *sizes)
    sums = programs.zero_sums(names, mesh)
    order = np.arange(20 * 16, dtype=np.int32) % 48
    plan = programs.Plan(order, jax.random.key(0), np.arange(0, 48, 5, dtype=np.int32))
    plan = jax.device_put(plan, replicated)
    state = jax.device_put(jax.tree.map(jnp.copy, state), replicated)
    options = phase.policy, unseen
    program = programs.train_program(phase.step, mesh, batch_size, calls is None, *options)
    for first in range(0, count, calls or 1):
        last = min(first + (calls or 1), count)
        bounds = jax.device_put((np.int32(first), np.int32(last)), replicated)
        learns = calls is not None or bool(unseen.learns(first))
        state, sums = program(state, sums, data, plan, *bounds, learns=learns)
    return jax.device_get((state, sums))


@pytest.mark.parametrize("index", [0, 2, 3])
def test_one_device_and_eight_agree(index):
    """Over 20 steps, to float32 rounding."""
    phase = small_run.phases()[index]
    state = begin_all()[phase]
    if phase.kind == "augment":
        # Adam divides by its own noise where a gradient is near zero, and the noise differs.
        tx = optax.adam(1e-3, eps=1e-3)
        augmenter = state.augmenter.replace(tx=tx, opt_state=tx.init(state.augmenter.params))
        state = state.replace(augmenter=augmenter)
    one, eight = (run_steps(phase, state, devices, 20) for devices in (1, 8))
    chex.assert_trees_all_close(one[1], eight[1], rtol=1e-5, atol=1e-5)
    assert_states_close(one[0], eight[0], 1e-5)


def joint(interval=1):
    """Classifier and augmenter together: the learned row of a comparison."""
    options = {"learning_rate": 1e-2, "interval": interval}
    learned = MatchingAugmenter(unseen=0.2, every=2, share=0.5, **options)
    config = Comparison(epochs=ComparedEpochs(train=2), batch_size=16, learned=learned)
    tiny = models.ResNet(10, stage_sizes=(1,), width=4)
    rows = {"learned": phases.Row(programs.unchanged, "learned")}
    joint, rest = phases.comparison(config, tiny, rows, (8, 8, 1), STEPS)["learned"]
    assert joint.epochs + rest.epochs == 2 and rest.unseen.share == 0
    return joint


def test_a_joint_phase_on_one_device_and_eight():
    phase = joint()
    state = phase.begin(None, jax.random.key(0))
    tx = optax.adam(1e-3, eps=1e-3)  # as above
    augmenter = state.augmenter.replace(tx=tx, opt_state=tx.init(state.augmenter.params))
    state = state.replace(augmenter=augmenter)
    one, eight = (run_steps(phase, state, devices, 5) for devices in (1, 8))
    chex.assert_trees_all_close(one[1], eight[1], rtol=1e-3, atol=1e-3)
    assert_states_close(one[0], eight[0])
    assert small_run.digest(one[0].augmenter.params) != small_run.digest(augmenter.params)


def test_devices_share_the_images_that_are_transformed():
    """Each of eight sees an eighth of the 16 of 32 in the forward pass for their uncertainty."""
    phase, mesh = joint(), small_run.mesh(8)
    state = programs.put(mesh, jax.device_get(phase.begin(None, jax.random.key(0))))[0]
    images = jax.device_put(
        jnp.zeros((32, 8, 8, 1)), jax.sharding.NamedSharding(mesh, jax.P("data"))
    )
    labels, key = programs.put(mesh, np.zeros(32, np.int32), jax.random.key(1))
    step = jax.jit(steps.frozen_step).lower(state, images, labels, key)
    convolutions = re.findall(r"= f32\[(\d+),[\d,]*\]\S* convolution", step.compile().as_text())
    assert "2" in convolutions and "4" in convolutions
    assert not {"16", "32"} & set(convolutions)


@pytest.mark.parametrize("unseen", [0, 3, 12, 30])
def test_what_is_unseen_is_never_trained_on(unseen):
    mesh = small_run.mesh()
    hidden = np.sort(np.random.default_rng(0).permutation(48)[:unseen]).astype(np.int32)
    seen = np.setdiff1d(np.arange(48), hidden).astype(np.int32)
    keys = jax.random.key(1), jax.random.key(2)
    plan = programs.plan_program(mesh)
    orders = [np.asarray(plan(*keys, seen, hidden, epoch).order) for epoch in range(3)]
    for order in orders:
        assert len(order) == 48
        assert set(order) == set(seen)
        counts = np.bincount(order, minlength=48)[seen]
        assert counts.max() - counts.min() <= 1
    assert np.any(orders[0] != orders[1])
    np.testing.assert_array_equal(plan(*keys, seen, hidden, 0).unseen, hidden)


def test_unseen_images_are_a_share_of_each_class():
    phase, labels = joint(), np.asarray(small_run.digits(0, 48).labels)
    run = mock.Mock(data=small_run.data())
    seen, unseen = train._split(run, phase, seed=3)
    assert sorted([*seen, *unseen]) == list(range(48))
    assert len(unseen) == 10
    share = np.bincount(labels, minlength=10) * 10 / 48
    assert np.all(np.abs(np.bincount(labels[unseen], minlength=10) - share) <= 1)
    assert np.any(unseen != train._split(run, phase, seed=4)[1])


def assert_states_close(a, b, tolerance=1e-3):
    """By the norm: where a gradient is near zero Adam divides by its own noise."""
    for name in ("classifier", "augmenter", "discriminator"):
        if getattr(a, name) is not None:
            x, y = (jax.flatten_util.ravel_pytree(getattr(s, name).params)[0] for s in (a, b))
            assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(x)
    chex.assert_trees_all_close(
        a.classifier.batch_stats, b.classifier.batch_stats, rtol=1e-3, atol=1e-4
    )


def test_a_run_goes_on_with_another_number_of_devices(uninterrupted, tmp_path):
    stops = iter([signal.SIGTERM])

    def update(**_):
        for number in stops:
            os.kill(os.getpid(), number)

    with pytest.raises(train.Interrupted):
        small_run.go(tmp_path, update=update, legs=small_run.phases()[:1])
    final = small_run.go(tmp_path, devices=8, legs=small_run.phases()[:1])
    expected = small_run.go(uninterrupted[1])
    states = (jax.device_get(states[0, "pretrain"]) for states in (final, expected))
    assert_states_close(*states)


@pytest.mark.parametrize("make", [0, 2, partial(joint, 2)])
def test_a_loop_of_steps_equals_single_steps(make):
    phase = make() if callable(make) else small_run.phases()[make]
    state = phase.begin(None, jax.random.key(0)) if callable(make) else begin_all()[phase]
    single, looped = (run_steps(phase, state, 1, STEPS, calls) for calls in (None, 2))
    chex.assert_trees_all_close(single[1], looped[1], rtol=1e-3, atol=1e-5)
    assert_states_close(single[0], looped[0])


def test_phases_change_only_what_they_train(uninterrupted):
    final = small_run.go(uninterrupted[1])
    pretrain, augment, finetune = (
        final[0, name] for name in ("pretrain", "intended-augment", "intended-finetune")
    )
    chex.assert_trees_all_equal(augment.classifier, pretrain.classifier)
    chex.assert_trees_all_equal(finetune.augmenter, augment.augmenter)
    assert finetune.discriminator is None
    assert small_run.digest(finetune.classifier) != small_run.digest(augment.classifier)
    stats = (s.classifier.batch_stats for s in (augment, finetune))
    assert small_run.digest(next(stats)) != small_run.digest(next(stats))


@pytest.fixture
def compilations():
    """Names of what JAX compiles, or finds in its cache on disk, in a test: a list that grows."""
    names = []

    def listen(event, *_, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_compilation_a_phase_also_after_resume(tmp_path, compilations):
    """Of a run, of one that is stopped in each phase and resumed, and of a second seed."""

    def update(epoch_done=False, **where):
        place = where["branch"], where["phase"]
        if not epoch_done and where["epoch"] == 2 and place not in stopped:
            stopped.add(place)
            os.kill(os.getpid(), signal.SIGTERM)

    small_run.go(tmp_path / "first")
    # Of a phase's steps, and of its evaluation; some phases share theirs.
    assert sum("run" in name for name in compilations) <= 2 * len(small_run.phases())
    compilations.clear()
    stopped = set()
    for _ in small_run.phases():
        with pytest.raises(train.Interrupted):
            small_run.go(tmp_path, update=update)
    small_run.go(tmp_path, seeds=2)
    assert not compilations
    jax.jit(lambda: 0)()
    assert len(compilations) == 1


@pytest.mark.parametrize("together", [False, True])
def test_an_epoch_makes_no_implicit_transfer(tmp_path, monkeypatch, together):
    legs = (joint(),) if together else small_run.phases()
    real = train._train_epoch

    def guarded(*args):
        with jax.transfer_guard("disallow"):
            return real(*args)

    monkeypatch.setattr(train, "_train_epoch", guarded)
    small_run.go(tmp_path, legs=legs)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 25, 10**12])
def test_evaluation_covers_every_image(devices, batch_size):
    """Equal to a loop over the 25 images, one at a time; no two have the same draw."""
    data = small_run.data(devices)

    def values(state, images, labels, key):
        drawn = jax.random.uniform(key, (len(images), 2))
        return {"sum": images.sum((1, 2, 3)) * state, "label": labels, "drawn": drawn}

    got = programs.evaluate(values, np.float32(2), data, small_run.mesh(devices), batch_size)
    images = jax.device_get(data.test_images).astype(np.float32) / 255
    mean, sd = jax.device_get((data.mean, data.sd))
    expected = [2 * ((image - mean) / sd).sum() for image in images]
    np.testing.assert_allclose(got["sum"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got["label"], small_run.digits(100, 125).labels)
    keys = [jax.random.fold_in(jax.random.key(0), first) for first in range(0, 25, batch_size)]
    drawn = [jax.random.uniform(key, (min(batch_size, 25), 2)) for key in keys]
    np.testing.assert_array_equal(got["drawn"], np.concatenate(drawn)[:25])
    assert len(np.unique(got["drawn"])) == 50


def test_the_rate_is_of_the_steps_that_are_timed(tmp_path, monkeypatch):
    """Where a call of several steps is waited for, as in a loop on a GPU: not of the first, too."""

    def slow_program(*_):
        def program(state, sums, data, plan, first, last, learns):
            assert learns
            time.sleep(0.1 * int(last - first))
            return state, sums

        return program

    monkeypatch.setattr(programs, "train_program", slow_program)
    config = dataclasses.replace(small_run.CONFIG, steps_per_call=2)
    small_run.go(tmp_path, config=config, legs=small_run.phases()[:1])
    images = config.batch_size
    for record in metrics.read(tmp_path / "metrics.jsonl"):
        assert images / 0.2 < record["images_per_second"] <= images / 0.1


def test_the_rate_leaves_out_each_program_s_first_call(tmp_path, monkeypatch):
    """A step that learns and one that does not are two programs on a CPU, compiled in turn."""
    compiled, told = set(), []

    def slow_program(*_):
        def program(state, sums, data, plan, first, last, learns):
            time.sleep(0.1 if learns in compiled else 0.5)
            compiled.add(learns)
            told.append(learns)
            return state, sums

        return program

    monkeypatch.setattr(programs, "train_program", slow_program)
    small_run.go(tmp_path, legs=(joint(2),))
    assert told == [True, False, True]
    images = small_run.CONFIG.batch_size
    (record,) = metrics.read(tmp_path / "metrics.jsonl")
    assert images / 0.2 < record["images_per_second"] <= images / 0.1


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.stop_on_signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
        assert received == [] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_clock():
    legs = pretrain, _, augment, finetune = small_run.phases()
    clock = train.Clock(legs, 1)
    assert clock.seconds_left() is None
    clock.tick(pretrain, 60.0, 1.0)  # compiled, as three others will be
    assert clock.seconds_left() == 7 * 1.0 + 3 * 59.0
    clock.tick(pretrain, 2.0, 1.0)
    clock.skip(augment, 2)
    assert clock.seconds_left() == 4 * 2.0 + 2 * 59.0
    clock.tick(finetune, 10.0, 0.5)
    assert clock.seconds_left() == 3 * 0.5 + 9.5
    clock.tick(finetune, 3.0, 0.5)
    assert clock.seconds_left() == 2 * 3.0 + 9.5
