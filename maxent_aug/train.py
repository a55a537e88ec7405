"""Phases in order: the loop, sharding, checkpoints, metrics.

A run is a tuple of phases. A phase starts from the final state of the one it follows, trains some
networks for some epochs, and ends in a checkpoint; so a run that was stopped anywhere goes on
from its newest checkpoint, and ends bit-equal to one that was never stopped.
"""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
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

from maxent_aug import checkpoint, diagnostics, models, steps
from maxent_aug.config import Config
from maxent_aug.data import Dataset, channel_statistics
from maxent_aug.metrics import MetricsWriter
from maxent_aug.progress import Progress

# All that is random in a phase is drawn from fold_in(key(seed), KINDS.index(kind)).
KINDS = ("pretrain", "augment", "finetune")
NEVER = np.iinfo(np.int32).max


class NonFiniteLoss(Exception):
    """A loss was not finite; the message names the phase, the step and the last good checkpoint."""


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
    begin: Callable[[steps.State | None, Array], steps.State]
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


def make_mesh() -> Mesh:
    """All devices along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def put_data(train: Dataset, test: Dataset, mesh: Mesh) -> Data:
    """Copies a data set to every device of the mesh."""
    mean, sd = channel_statistics(train.images)
    data = Data(train.images, train.labels, test.images, test.labels, mean, sd)
    return jax.device_put(data, NamedSharding(mesh, P()))


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


@cache
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
        bad = jnp.where(jnp.isfinite(metrics["loss"]), NEVER, i)
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
        return jax.lax.fori_loop(
            first, last, lambda i, carry: one_step(i, *carry, data, order), (state, sums)
        )

    return run


def zero_sums(phase: Phase, state: Any, data: Data, mesh: Mesh) -> Any:
    """The accumulators of an epoch's training metrics, at zero."""
    image = jax.ShapeDtypeStruct((1, *data.train_images.shape[1:]), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    _, metrics = jax.eval_shape(phase.step, state, image, label)
    sums = {
        "metrics": {name: np.zeros((), np.float32) for name in metrics},
        "first_bad_step": np.int32(NEVER),
    }
    return jax.device_put(sums, NamedSharding(mesh, P()))


@cache
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
        program(state, data.test_images, data.test_labels, data.mean, data.sd, np.int32(first))
        for first in range(0, count, batch_size)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *jax.device_get(batches))


@cache
def _order_program(mesh: Mesh, examples: int) -> Callable:
    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def order(key: Array, epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), examples)

    return order


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM are noted in a list; a second one acts at once."""
    received: list[int] = []
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

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
      NonFiniteLoss: on a loss that is not finite; nothing is saved then.
      Interrupted: after a signal, when the state has been saved.
      CheckpointError: if the phase has checkpoints, and none can be read.
    """
    replicated = NamedSharding(run.mesh, P())
    phase_key = jax.random.fold_in(jax.random.key(seed), KINDS.index(phase.kind))
    init_key, order_key = jax.random.split(phase_key)
    # Copied, since the state is donated while the next branch needs `start`.
    state = jax.tree.map(jnp.copy, jax.device_put(phase.begin(start, init_key), replicated))
    nothing = zero_sums(phase, state, run.data, run.mesh)
    order_program = _order_program(run.mesh, len(run.data.train_images))
    folder = run.workdir / "checkpoints" / f"seed{seed}" / phase.name
    with checkpoint.open_manager(folder) as manager:
        fresh = {"state": state, "sums": nothing}
        position, tree = checkpoint.restore_newest(manager, fresh) or (0, fresh)
        first_epoch, step = divmod(position, run.steps_per_epoch)
        run.clock.skip(phase.kind, first_epoch)
        if first_epoch == phase.epochs:
            return tree["state"]
        run.writer.rewind(seed, phase.branch, phase.kind, first_epoch)
        at = Epoch(tree["state"], tree["sums"], step)
        for epoch in range(first_epoch, phase.epochs):
            started = time.perf_counter()
            where = {"seed": seed, "branch": phase.branch, "phase": phase.kind, "epoch": epoch + 1}
            order = order_program(order_key, np.int32(epoch))
            at, rate = _train_epoch(run, phase, where, at, order, manager)
            record = _record(run, phase, at)
            if not math.isfinite(record["test_loss"]):
                raise _non_finite(phase, where, run.steps_per_epoch, manager)
            seconds = time.perf_counter() - started
            run.writer.write(where | record | {"images_per_second": rate, "seconds": seconds})
            run.clock.tick(phase.kind, seconds)
            _show(run, phase, where, record, rate)
            at = Epoch(at.state, nothing, 0)
            last = epoch + 1 == phase.epochs
            if last or run.stop or (epoch + 1) % run.config.checkpoint_every == 0:
                _save(manager, (epoch + 1) * run.steps_per_epoch, at)
            if run.stop:
                raise Interrupted(f"stopped in {phase.name} after epoch {epoch + 1}", run.stop[0])
    return at.state


def _train_epoch(
    run: Run, phase: Phase, where: dict[str, Any], at: Epoch, order: Array, manager: Any
) -> tuple[Epoch, float]:
    """The rest of an epoch: its end, and images/s."""
    replicated = NamedSharding(run.mesh, P())
    batch_size = run.config.batch_size
    program = train_program(phase.step, run.mesh, batch_size, run.steps_per_call == 1)
    first, started = at.step, time.perf_counter()
    while at.step < run.steps_per_epoch:
        last = min(at.step + run.steps_per_call, run.steps_per_epoch)
        bounds = jax.device_put((np.int32(at.step), np.int32(last)), replicated)
        state, sums = program(at.state, at.sums, run.data, order, *bounds)
        if at.step == first:  # the call that compiles
            started = time.perf_counter()
        # Read one call late, so that the device never waits for the host.
        _check_finite(at.sums, phase, where, manager)
        at = Epoch(state, sums, last)
        run.progress.update(**where, epochs=phase.epochs, seconds_left=run.clock.seconds_left())
        if run.stop and at.step < run.steps_per_epoch:
            _check_finite(at.sums, phase, where, manager)
            _save(manager, (where["epoch"] - 1) * run.steps_per_epoch + at.step, at)
            place = f"{phase.name}, epoch {where['epoch']}, step {at.step}"
            raise Interrupted(f"stopped in {place}", run.stop[0])
    _check_finite(at.sums, phase, where, manager)
    seconds = time.perf_counter() - started
    return at, (at.step - first) * batch_size / seconds


def _save(manager: Any, position: int, at: Epoch) -> None:
    """Saves under the number of the phase's steps done so far."""
    checkpoint.save(manager, position, {"state": at.state, "sums": at.sums})


def _record(run: Run, phase: Phase, at: Epoch) -> dict[str, float]:
    """An epoch's metrics: means over its training steps and over the test images."""
    totals = jax.device_get(at.sums["metrics"])
    record = {f"train_{name}": float(total) / at.step for name, total in totals.items()}
    values = evaluate(phase.eval_step, at.state, run.data, run.mesh, run.config.eval_batch_size)
    if "theta" in values:
        theta, before, after = (values.pop(k) for k in ("theta", "logits_before", "logits_after"))
        size = run.data.test_images.shape[1:3]
        collapse = jax.jit(diagnostics.collapse, static_argnums=1)(theta, size, before, after)
        record |= {name: float(value) for name, value in collapse.items()}
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


def _check_finite(sums: Any, phase: Phase, where: dict[str, Any], manager: Any) -> None:
    bad = int(sums["first_bad_step"])
    if bad != NEVER:
        raise _non_finite(phase, where, bad + 1, manager)


def _non_finite(phase: Phase, where: dict[str, Any], step: int, manager: Any) -> NonFiniteLoss:
    newest = manager.latest_step()
    kept = "none" if newest is None else Path(manager.directory) / str(newest)
    return NonFiniteLoss(
        f"the loss is not finite in phase {phase.name}, epoch {where['epoch']}, step {step}, "
        f"seed {where['seed']}; last good checkpoint: {kept}; try a smaller learning rate"
    )
