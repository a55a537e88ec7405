"""Phases in order: the loop, sharding, checkpoints, metrics.

A run is a tuple of phases. A phase starts from the final state of the one it follows, trains some
networks for some epochs, and ends in a checkpoint; so a run that was stopped anywhere goes on
from its newest checkpoint, and ends bit-equal to one that was never stopped.
"""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxent_aug import checkpoint, diagnostics, metrics, models, steps
from maxent_aug.config import Config
from maxent_aug.data import Dataset, channel_statistics
from maxent_aug.metrics import MetricsWriter
from maxent_aug.progress import Progress
from maxent_aug.run_folder import RunFolderError

# All that is random in a phase is drawn from fold_in(key(seed), KINDS.index(kind)).
KINDS = ("pretrain", "augment", "finetune")
NEVER = np.iinfo(np.int32).max
# Compiled programs are kept from one seed to the next, but not for ever.
keep_programs = lru_cache(maxsize=32)


class NonFiniteLoss(Exception):
    """A loss or a weight is not finite; names phase, step and the last good checkpoint."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, and has saved its state."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


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


class Data(struct.PyTreeNode):
    """A data set on the device: uint8 images, int32 labels, the training images' statistics."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array
    mean: Array
    sd: Array


def _put(mesh: Mesh, *arrays: Any) -> tuple[Any, ...]:
    """Copies to all devices, explicitly, so that a transfer guard may forbid what is not meant."""
    return jax.device_put(arrays, NamedSharding(mesh, P()))


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Devices, by default all, along one axis, "data"."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def put_data(train: Dataset, test: Dataset, mesh: Mesh) -> Data:
    """Copies a data set to every device of the mesh."""
    mean, sd = channel_statistics(train.images)
    return Data(*_put(mesh, train.images, train.labels, test.images, test.labels, mean, sd))


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


@keep_programs
def train_program(step: Callable, mesh: Mesh, batch_size: int, unrolled: bool) -> Callable:
    """Compiles steps first..last - 1 of an epoch into one program; the state is donated.

    With `unrolled` it is a single step: XLA runs convolutions inside a loop many times slower on
    a CPU (jax issue 12868).
    """
    sharded = NamedSharding(mesh, P("data"))

    def one_step(i: Array, state: Any, sums: Any, data: Data, order: Array) -> tuple[Any, Any]:
        index = jax.lax.dynamic_slice(order, (i * batch_size,), (batch_size,))
        index = jax.lax.with_sharding_constraint(index, sharded)
        images = steps.normalize(data.train_images[index], data.mean, data.sd)
        state, metrics = step(state, images, data.train_labels[index])
        finite = jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
        bad = jnp.where(finite, NEVER, i)
        return state, {
            "metrics": jax.tree.map(jnp.add, sums["metrics"], metrics),
            "first_bad_step": jnp.minimum(sums["first_bad_step"], bad),
        }

    @partial(jax.jit, donate_argnums=0, out_shardings=NamedSharding(mesh, P()))
    def run(
        state: Any, sums: Any, data: Data, order: Array, first: Array, last: Array
    ) -> tuple[Any, Any]:
        if unrolled:
            return one_step(first, state, sums, data, order)

        def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            return one_step(i, carry[0], carry[1], data, order)

        return jax.lax.fori_loop(first, last, body, (state, sums))

    return run


def zero_sums(names: Iterable[str], mesh: Mesh) -> Any:
    """The accumulators of an epoch's training metrics, at zero."""
    sums = {
        "metrics": {name: np.zeros((), np.float32) for name in names},
        "first_bad_step": np.int32(NEVER),
    }
    return _put(mesh, sums)[0]


def _metric_names(phase: Phase, state: Any, data: Data) -> list[str]:
    image = jax.ShapeDtypeStruct((1, *data.train_images.shape[1:]), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    return list(jax.eval_shape(phase.step, state, image, label)[1])


@keep_programs
def eval_program(eval_step: Callable, mesh: Mesh, batch_size: int) -> Callable:
    """Compiles an evaluation of batch_size images from `first` on; the last image pads."""
    sharded = NamedSharding(mesh, P("data"))

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def run(state: Any, images: Array, labels: Array, mean: Array, sd: Array, first: Array) -> Any:
        index = jnp.minimum(first + jnp.arange(batch_size), len(images) - 1)
        index = jax.lax.with_sharding_constraint(index, sharded)
        return eval_step(state, steps.normalize(images[index], mean, sd), labels[index])

    return run


def evaluate(
    eval_step: Callable, state: Any, data: Data, mesh: Mesh, batch_size: int
) -> dict[str, np.ndarray]:
    """An evaluation of every test image: arrays [N, ...]."""
    count = len(data.test_images)
    batch_size = mesh.size * math.ceil(min(batch_size, count) / mesh.size)
    program = eval_program(eval_step, mesh, batch_size)
    batches = [
        program(state, data.test_images, data.test_labels, data.mean, data.sd, first)
        for first in _put(mesh, *map(np.int32, range(0, count, batch_size)))
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *jax.device_get(batches))


@keep_programs
def _order_program(mesh: Mesh, examples: int) -> Callable:
    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def order(key: Array, epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), examples)

    return order


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM are noted in a list; a second one acts at once."""
    received: list[int] = []
    previous = {int(s): signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Clock:
    """How long the epochs that are left will take."""

    def __init__(self, phases: tuple[Phase, ...], seeds: int) -> None:
        self._left: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}  # of the fastest epoch of each kind of phase
        for phase in phases:
            self._left[phase.kind] += phase.epochs * seeds

    def skip(self, kind: str, epochs: int) -> None:
        """Epochs that an earlier start of the run has done."""
        self._left[kind] -= epochs

    def tick(self, kind: str, seconds: float) -> None:
        """An epoch has ended."""
        self._left[kind] -= 1
        self._seconds[kind] = min(seconds, self._seconds.get(kind, math.inf))

    def seconds_left(self) -> float | None:
        """Until all phases have ended; None before the first epoch has."""
        if not self._seconds:
            return None
        unknown = max(self._seconds.values())
        return sum(n * self._seconds.get(kind, unknown) for kind, n in self._left.items())


@dataclass(frozen=True)
class Run:
    """What the phases of one seed share: the folder's files, the data, the devices."""

    config: Config
    workdir: Path
    data: Data
    mesh: Mesh
    writer: MetricsWriter
    progress: Progress
    clock: Clock
    stop: list[int]  # signals received

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train_images) // self.config.batch_size

    @property
    def steps_per_call(self) -> int:
        default = 1 if jax.default_backend() == "cpu" else 100
        return self.config.steps_per_call or default


class Epoch(NamedTuple):
    """The middle of an epoch: networks, sums of the metrics of the steps so far, their number."""

    state: steps.State
    sums: Any
    step: int


@dataclass(frozen=True)
class Leg:
    """A phase under way: the run and the seed it belongs to, and its checkpoints."""

    run: Run
    phase: Phase
    seed: int
    manager: Any
    order_key: Array

    def where(self, epoch: int) -> dict[str, Any]:
        """What a record of metrics is filed under; epochs count from 1."""
        phase = self.phase
        return {"seed": self.seed, "branch": phase.branch, "phase": phase.kind, "epoch": epoch}


def train_phase(run: Run, phase: Phase, seed: int, start: steps.State | None) -> steps.State:
    """Trains a phase to its end, from its newest checkpoint if it has one.

    Args:
      run: folder, data, devices.
      phase: what to train.
      seed: of the run; with the kind of phase it fixes initial weights and the order of images.
        Branches share it, so that they are paired.
      start: final state of the phase that this one follows, or None.

    Returns:
      The phase's final state.

    Raises:
      NonFiniteLoss: on a loss or a weight that is not finite; nothing is saved then.
      Interrupted: after a signal, when the state has been saved.
      CheckpointError: if the phase has checkpoints, and none can be read.
      RunFolderError: if metrics.jsonl lacks epochs that the checkpoint has behind it.
    """
    phase_key = jax.random.fold_in(jax.random.key(seed), KINDS.index(phase.kind))
    init_key, order_key = jax.random.split(phase_key)
    begin = partial(phase.begin, start, init_key)
    with checkpoint.open_manager(_folder(run, phase, seed)) as manager:
        leg = Leg(run, phase, seed, manager, *_put(run.mesh, order_key))
        try:
            position, at = _resume_or_begin(leg, begin)
            run.clock.skip(phase.kind, position // run.steps_per_epoch)
            for epoch in range(position // run.steps_per_epoch, phase.epochs):
                if run.stop:  # before the first step, and before it is compiled
                    raise _interrupted(leg, epoch, at.step)
                at = _train_epoch(leg, epoch, at)
        finally:
            run.progress.end_line()
    return at.state


def _folder(run: Run, phase: Phase, seed: int) -> Path:
    return run.workdir / "checkpoints" / f"seed{seed}" / phase.name


def _resume_or_begin(leg: Leg, begin: Callable[[], steps.State]) -> tuple[int, Epoch]:
    """The steps of the phase done so far, and where that is in their epoch."""
    run, phase = leg.run, leg.phase
    replicated = NamedSharding(run.mesh, P())
    abstract = jax.eval_shape(begin)
    sums = zero_sums(_metric_names(phase, abstract, run.data), run.mesh)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        {"state": abstract, "sums": sums},
    )
    found = checkpoint.restore_newest(leg.manager, like)
    if found is None:
        run.writer.rewind(leg.seed, phase.branch, phase.kind, 0)
        # Copied, since the state is donated while the next branch needs `start`.
        return 0, Epoch(jax.tree.map(jnp.copy, _put(run.mesh, begin())[0]), sums, 0)
    position, tree = found
    epochs, step = divmod(position, run.steps_per_epoch)
    if epochs < phase.epochs:
        run.writer.rewind(leg.seed, phase.branch, phase.kind, epochs)
    _check_records(leg, epochs)
    return position, Epoch(tree["state"], tree["sums"], step)


def _check_records(leg: Leg, epochs: int) -> None:
    """Raises RunFolderError unless metrics.jsonl has the epochs that a checkpoint has behind it."""
    path, key = leg.run.writer.path, leg.where(0) | {"epoch": None}
    records = metrics.read(path) if path.exists() else []
    there = {r["epoch"] for r in records if {k: r[k] for k in key} | {"epoch": None} == key}
    missing = set(range(1, epochs + 1)) - there
    if missing:
        folder = _folder(leg.run, leg.phase, leg.seed)
        raise RunFolderError(
            f"{path} lacks epoch {min(missing)} of phase {leg.phase.name}, seed {leg.seed}; put "
            f"the file back, or delete {folder} to train the phase again"
        )


def _train_epoch(leg: Leg, epoch: int, at: Epoch) -> Epoch:
    """The rest of an epoch, its evaluation, its line of metrics, its checkpoint; epochs from 0."""
    run, phase, where = leg.run, leg.phase, leg.where(epoch + 1)
    started = time.perf_counter()
    at, rate = _train_steps(leg, epoch, at)
    record = _record(run, phase, at)
    if not all(math.isfinite(v) for name, v in record.items() if name.endswith("loss")):
        raise _non_finite("the loss", leg, epoch, at.step)
    seconds = time.perf_counter() - started
    run.writer.write(where | record | {"images_per_second": rate, "seconds": seconds})
    run.clock.tick(phase.kind, seconds)
    _show(run, phase, where, record, rate)
    end = Epoch(at.state, zero_sums(at.sums["metrics"], run.mesh), 0)
    last = epoch + 1 == phase.epochs
    if last or run.stop or (epoch + 1) % run.config.checkpoint_every == 0:
        _save(leg, epoch, end, at.step)
    if run.stop:
        raise _interrupted(leg, epoch, at.step)
    return end


def _train_steps(leg: Leg, epoch: int, at: Epoch) -> tuple[Epoch, float]:
    """The rest of an epoch's steps: its end, and images/s."""
    run, phase = leg.run, leg.phase
    program = train_program(
        phase.step, run.mesh, run.config.batch_size, unrolled=run.steps_per_call == 1
    )
    order_program = _order_program(run.mesh, len(run.data.train_images))
    order = order_program(leg.order_key, *_put(run.mesh, np.int32(epoch)))
    first, started = at.step, time.perf_counter()
    while at.step < run.steps_per_epoch:
        last = min(at.step + run.steps_per_call, run.steps_per_epoch)
        bounds = _put(run.mesh, np.int32(at.step), np.int32(last))
        state, sums = program(at.state, at.sums, run.data, order, *bounds)
        if at.step == first:  # the call that compiles
            started = time.perf_counter()
        # Read one call late, so that the device never waits for the host.
        _check_finite(leg, epoch, at.sums)
        at = Epoch(state, sums, last)
        run.progress.update(
            **leg.where(epoch + 1), epochs=phase.epochs, seconds_left=run.clock.seconds_left()
        )
        if run.stop and at.step < run.steps_per_epoch:
            _check_finite(leg, epoch, at.sums)
            _save(leg, epoch, at, at.step)
            raise _interrupted(leg, epoch, at.step)
    _check_finite(leg, epoch, at.sums)
    seconds = time.perf_counter() - started
    return at, (at.step - first) * run.config.batch_size / seconds


def _save(leg: Leg, epoch: int, at: Epoch, step: int) -> None:
    """Saves under the number of the phase's steps done so far, `step` in this epoch."""
    position = epoch * leg.run.steps_per_epoch + step
    try:
        checkpoint.save(leg.manager, position, {"state": at.state, "sums": at.sums})
    except checkpoint.NonFiniteError:
        raise _non_finite("a weight or the optimizer's state", leg, epoch, step) from None


def _interrupted(leg: Leg, epoch: int, step: int) -> Interrupted:
    place = f"phase {leg.phase.name}, epoch {epoch + 1}, step {step}, seed {leg.seed}"
    return Interrupted(f"stopped in {place}", leg.run.stop[0])


def _check_finite(leg: Leg, epoch: int, sums: Any) -> None:
    bad = int(jax.device_get(sums["first_bad_step"]))
    if bad != NEVER:
        raise _non_finite("the loss", leg, epoch, bad + 1)


def _non_finite(what: str, leg: Leg, epoch: int, step: int) -> NonFiniteLoss:
    kept, phase = "none", leg.phase
    while kept == "none" and phase is not None:
        folder = _folder(leg.run, phase, leg.seed)
        kept = next((str(folder / str(n)) for n in checkpoint.saved_steps(folder)), kept)
        phase = phase.follows
    return NonFiniteLoss(
        f"{what} is not finite in phase {leg.phase.name}, epoch {epoch + 1}, step {step}, "
        f"seed {leg.seed}; last good checkpoint: {kept}; try a smaller learning rate in a new "
        "workdir"
    )


def _record(run: Run, phase: Phase, at: Epoch) -> dict[str, float]:
    """An epoch's metrics: means over its training steps and over the test images."""
    totals = jax.device_get(at.sums["metrics"])
    record = {f"train_{name}": float(total) / at.step for name, total in totals.items()}
    values = evaluate(phase.eval_step, at.state, run.data, run.mesh, run.config.eval_batch_size)
    if "theta" in values:
        theta, before, after = (values.pop(k) for k in ("theta", "logits_before", "logits_after"))
        size = run.data.test_images.shape[1:3]
        theta, before, after = _put(run.mesh, theta, before, after)
        collapse = diagnostics.collapse(theta, size, before, after)
        record |= {name: float(value) for name, value in jax.device_get(collapse).items()}
    return record | {f"test_{name}": float(value.mean()) for name, value in values.items()}


def _show(run: Run, phase: Phase, where: dict[str, Any], record: dict, rate: float) -> None:
    names = {"train_loss": "loss", "train_accuracy": "train", "test_accuracy": "test"}
    if phase.kind == "augment":
        names = {
            "distance_from_identity": "from identity",
            "spread": "spread",
            "entropy_after": "bits",
        }
    run.progress.update(
        **where,
        epochs=phase.epochs,
        images_per_second=rate,
        seconds_left=run.clock.seconds_left(),
        numbers={label: record[name] for name, label in names.items()},
        epoch_done=True,
    )
