"""Phases in order: the loop, checkpoints, metrics, signals.

A run is a tuple of phases. A phase starts from the final state of the one it follows, trains some
networks for some epochs, and ends in a checkpoint; so a run that was stopped anywhere goes on
from its newest checkpoint, and ends bit-equal to one that was never stopped.
"""

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from maxent_aug import checkpoint, diagnostics, metrics, processes, programs, steps
from maxent_aug.config import Training
from maxent_aug.data import stratified
from maxent_aug.metrics import MetricsWriter
from maxent_aug.phases import KINDS, Phase
from maxent_aug.progress import Progress
from maxent_aug.run_folder import RunFolderError, file_name


class NonFiniteLoss(Exception):
    """A loss or a weight is not finite; names phase, step and the last good checkpoint."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, and has saved its state."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM are noted in a list; a second one acts at once.

    One that is ignored, as by what a script starts in the background, stays so.
    """
    received: list[int] = []
    handlers = {int(s): signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    previous = {number: each for number, each in handlers.items() if each != signal.SIG_IGN}

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
        self._left: Counter[Phase] = Counter()
        # By kind: of a first epoch its training alone, of the fastest later one all.
        self._first: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        # In a phase's first epoch its programs are compiled; what that took, the last time.
        self._begun: set[Phase] = set()
        self._compilation = 0.0
        for phase in phases:
            self._left[phase] += phase.epochs * seeds

    def skip(self, phase: Phase, epochs: int) -> None:
        """Epochs that an earlier start of the run has done."""
        self._left[phase] -= epochs

    def tick(self, phase: Phase, seconds: float, training: float) -> None:
        """An epoch has ended: its seconds, and what the training of a whole one takes."""
        self._left[phase] -= 1
        if phase in self._begun:
            self._seconds[phase.kind] = min(seconds, self._seconds.get(phase.kind, math.inf))
        else:
            self._begun.add(phase)
            self._first[phase.kind] = training
            self._compilation = max(0.0, seconds - training)

    def seconds_left(self) -> float | None:
        """Until all phases have ended; None before the first epoch has."""
        known = self._first | self._seconds
        if not known:
            return None
        unknown = max(known.values())
        left = {phase: epochs for phase, epochs in self._left.items() if epochs > 0}
        return sum(
            epochs * known.get(phase.kind, unknown)
            + (0.0 if phase in self._begun else self._compilation)
            for phase, epochs in left.items()
        )


@dataclass(frozen=True)
class Run:
    """What the phases of one seed share: the folder's files, the data, the devices.

    Of several processes, each has one; only the first has a writer, and uses the folder.
    """

    config: Training
    workdir: Path
    data: programs.Data
    mesh: Mesh
    writer: MetricsWriter
    progress: Progress
    clock: Clock
    stop: list[int]  # signals received

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train_labels) // self.config.batch_size

    @property
    def steps_per_call(self) -> int:
        if self.data.stored:
            return 1
        default = 1 if jax.default_backend() == "cpu" else 100
        return self.config.steps_per_call or default


class Epoch(NamedTuple):
    """Where an epoch stands: networks, summed metrics, and steps done (0 at its start)."""

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
    step_key: Array
    seen: Array  # indices of the training images that are trained on, and of the others
    unseen: Array

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
    phase_key = jax.random.fold_in(jax.random.key(seed), KINDS[phase.kind])
    init_key, *keys = jax.random.split(phase_key, 3)
    begin = partial(phase.begin, start, init_key)
    folder = _folder(run, phase, seed)
    with processes.open_on_first(partial(checkpoint.open_manager, folder)) as manager:
        parts = _split(run, phase, seed)
        leg = Leg(run, phase, seed, manager, *programs.put(run.mesh, *keys, *parts))
        try:
            position, at = _resume_or_begin(leg, begin)
            run.clock.skip(phase, position // run.steps_per_epoch)
            for epoch in range(position // run.steps_per_epoch, phase.epochs):
                # Before the first step, and before it is compiled.
                if number := int(_signal(run)):
                    raise _interrupted(leg, epoch, at.step, number)
                at = _train_epoch(leg, epoch, at)
        finally:
            run.progress.end_line()
    return at.state


def _split(run: Run, phase: Phase, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training images that the phase trains on, and of its unseen ones, by class."""
    labels = jax.device_get(run.data.train_labels)
    share = phase.unseen.share
    count = max(1, round(share * len(labels))) if share else 0
    unseen = stratified(labels, count, seed)
    return np.setdiff1d(np.arange(len(labels)), unseen).astype(np.int32), unseen.astype(np.int32)


def _folder(run: Run, phase: Phase, seed: int) -> Path:
    return run.workdir / "checkpoints" / f"seed{seed}" / file_name(phase.name)


def _resume_or_begin(leg: Leg, begin: Callable[[], steps.State]) -> tuple[int, Epoch]:
    """The steps of the phase done so far, and where that is in their epoch."""
    run = leg.run
    abstract = jax.eval_shape(begin)
    sizes = run.config.batch_size, leg.phase.unseen.batch_size
    image_shape = run.data.test_images.shape[1:]
    names = programs.metric_names(leg.phase.step, run.mesh, abstract, image_shape, *sizes)
    sums = programs.zero_sums(names, run.mesh)
    like = {"state": abstract, "sums": sums}
    position, leaves = processes.on_first(partial(_restore, leg, like))
    if not leaves:
        state = programs.put(run.mesh, jax.device_get(begin()))[0]
        # Copied, since the state is donated while the next branch needs what it began with.
        return 0, Epoch(jax.tree.map(jnp.copy, state), sums, 0)
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
    state, sums = programs.put(run.mesh, tree["state"], tree["sums"])
    return position, Epoch(state, sums, position % run.steps_per_epoch)


def _restore(leg: Leg, like: Any) -> tuple[int, list[np.ndarray]]:
    """Reads the newest checkpoint, its number and arrays (0 and none); rewinds, checks metrics."""
    position, tree = checkpoint.restore_newest(leg.manager, like) or (0, None)
    epochs = position // leg.run.steps_per_epoch
    if epochs < leg.phase.epochs:
        leg.run.writer.rewind(leg.seed, leg.phase.branch, leg.phase.kind, epochs)
    _check_records(leg, epochs)
    return position, jax.tree.leaves(tree)


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
    last = epoch + 1 == phase.epochs
    record = _training_record(at)
    if last or (epoch + 1) % run.config.evaluate_every == 0:
        record |= _evaluation_record(run, phase, at.state)
    if not all(math.isfinite(v) for name, v in record.items() if name.endswith("loss")):
        raise _non_finite("the loss", leg, epoch, at.step)
    seconds = time.perf_counter() - started
    line = where | record | {"images_per_second": rate, "seconds": seconds}
    processes.on_first(lambda: run.writer.write(line))
    run.clock.tick(phase, seconds, run.steps_per_epoch * run.config.batch_size / rate)
    _show(run, phase, where, record, rate)
    end = Epoch(at.state, programs.zero_sums(at.sums["metrics"], run.mesh), 0)
    number = int(_signal(run))
    if last or number or (epoch + 1) % run.config.checkpoint_every == 0:
        _save(leg, epoch, end, at.step)
    if number:
        raise _interrupted(leg, epoch, at.step, number)
    return end


def _train_steps(leg: Leg, epoch: int, at: Epoch) -> tuple[Epoch, float]:
    """The rest of an epoch's steps: its end, and images/s."""
    run, phase = leg.run, leg.phase
    program = programs.train_program(
        phase.step,
        run.mesh,
        run.config.batch_size,
        run.steps_per_call == 1,
        phase.policy,
        phase.unseen,
    )
    index = programs.put(run.mesh, np.int32(epoch))[0]
    keys = leg.order_key, leg.step_key
    plan = programs.plan_program(run.mesh)(*keys, leg.seen, leg.unseen, index)
    stream = _stream(leg, plan, at.step)
    data = run.data.replace(stored=None)  # static: kept, it would compile anew for each seed
    timed_from, started = at.step, time.perf_counter()
    called: set[bool] = set()
    while at.step < run.steps_per_epoch:
        last = min(at.step + run.steps_per_call, run.steps_per_epoch)
        signal_number = _signal(run)  # asked before the steps, which reading it would wait for
        bounds = programs.put(run.mesh, np.int32(at.step), np.int32(last))
        # Where a call has more steps than one, the program knows which of them learn.
        learns = run.steps_per_call > 1 or phase.unseen.learns(at.step)
        inputs = at.state, at.sums, data, plan, *bounds, *next(stream)
        state, sums = program(*inputs, learns=learns)
        if learns not in called and last < run.steps_per_epoch:  # may compile: timed from its end
            jax.block_until_ready(sums)
            timed_from, started = last, time.perf_counter()
        called.add(learns)
        # Read one call late, so that the device never waits for the host.
        _check_finite(leg, epoch, at.sums)
        at = Epoch(state, sums, last)
        run.progress.update(
            **leg.where(epoch + 1), epochs=phase.epochs, seconds_left=run.clock.seconds_left()
        )
        if int(signal_number) and at.step < run.steps_per_epoch:
            _check_finite(leg, epoch, at.sums)
            _save(leg, epoch, at, at.step)
            raise _interrupted(leg, epoch, at.step, int(signal_number))
    _check_finite(leg, epoch, at.sums)
    seconds = time.perf_counter() - started
    return at, (at.step - timed_from) * run.config.batch_size / seconds


def _stream(leg: Leg, plan: programs.Plan, first: int) -> Iterator[Sequence[Array]]:
    """The images of each call from step `first` on: none where they are on the devices."""
    run = leg.run
    if run.data.stored is None:
        return repeat(())
    sizes = run.config.batch_size, leg.phase.unseen
    return programs.stream(run.data.stored, run.mesh, plan, *sizes, first)


def _save(leg: Leg, epoch: int, at: Epoch, step: int) -> None:
    """Saves under the number of the phase's steps done so far, `step` in this epoch."""
    position = epoch * leg.run.steps_per_epoch + step
    tree = {"state": at.state, "sums": at.sums}
    try:
        processes.on_first(lambda: checkpoint.save(leg.manager, position, tree))
    except checkpoint.NonFiniteError:
        raise _non_finite("a weight or the optimizer's state", leg, epoch, step) from None


def _signal(run: Run) -> Array | int:
    """The signal that any process got, 0 for none; all processes must ask at the same place."""
    return programs.largest(run.mesh, run.stop[0] if run.stop else 0)


def _interrupted(leg: Leg, epoch: int, step: int, number: int) -> Interrupted:
    place = f"phase {leg.phase.name}, epoch {epoch + 1}, step {step}, seed {leg.seed}"
    return Interrupted(f"stopped in {place}", number)


def _check_finite(leg: Leg, epoch: int, sums: Any) -> None:
    bad = int(jax.device_get(sums["first_bad_step"]))
    if bad != programs.NEVER:
        raise _non_finite("the loss, or another metric of the step,", leg, epoch, bad + 1)


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


def _training_record(at: Epoch) -> dict[str, float]:
    """Means over an epoch's steps."""
    totals = jax.device_get(at.sums["metrics"])
    return {f"train_{name}": float(total) / at.step for name, total in totals.items()}


def _evaluation_record(run: Run, phase: Phase, state: steps.State) -> dict[str, float]:
    """Means over the test images, and how far the augmenter has collapsed."""
    record: dict[str, float] = {}
    values = programs.evaluate(
        phase.eval_step, state, run.data, run.mesh, run.config.eval_batch_size
    )
    if "theta" in values:
        theta, before, after = (values.pop(k) for k in ("theta", "logits_before", "logits_after"))
        _, height, width, _ = run.data.test_images.shape
        theta, before, after = programs.put(run.mesh, theta, before, after)
        collapse = diagnostics.collapse(theta, (height, width), before, after)
        record = {name: float(value) for name, value in jax.device_get(collapse).items()}
        if "theta_again" in values:
            (again,) = programs.put(run.mesh, values.pop("theta_again"))
            draws = diagnostics.draws(theta, again, (height, width))
            record |= {name: float(value) for name, value in jax.device_get(draws).items()}
        if "half_width" in values:
            boxes = diagnostics.boxes(*programs.put(run.mesh, values.pop("half_width")))
            record |= {name: float(value) for name, value in jax.device_get(boxes).items()}
    return record | {f"test_{name}": float(value.mean()) for name, value in values.items()}


def _show(run: Run, phase: Phase, where: dict[str, Any], record: dict, rate: float) -> None:
    tested = "held-out" if run.config.data.held_out else "test"
    names = {"test_accuracy": tested, "train_accuracy": "train", "train_loss": "loss"}
    if phase.kind == "joint":
        names |= {"train_half_width": "half-width"}
    elif phase.kind == "augment":
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
        numbers={label: record[name] for name, label in names.items() if name in record},
        epoch_done=True,
    )
