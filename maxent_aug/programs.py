"""What runs on the devices: the data on all of them, and the compiled programs of an epoch.

Batches are divided along the mesh's one axis, "data"; networks are copied to every device. One
device and eight run the same program.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxent_aug import steps
from maxent_aug.data import Dataset, channel_statistics
from maxent_aug.stored import StoredImages, batches

NEVER = np.iinfo(np.int32).max
# Compiled programs are kept from one seed to the next, but not for ever.
keep_programs = lru_cache(maxsize=32)


def keep_freed_memory() -> None:
    """Tells glibc, where that is the C library, to keep freed memory, up to 2 GB, for what is next.

    By default it gives large arrays back to the system, which clears each page anew: a fifth of a
    training step of a small network on a CPU. For the whole process; call it before any work.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 2**31 - 1)


class Data(struct.PyTreeNode):
    """A data set on the device: uint8 images, int32 labels, the training images' statistics.

    Training images that are `stored` are not on the device, but come batch by batch.
    """

    train_images: Array | None
    train_labels: Array
    test_images: Array
    test_labels: Array
    mean: Array
    sd: Array
    stored: StoredImages | None = struct.field(pytree_node=False, default=None)


class Plan(struct.PyTreeNode):
    """What is random in an epoch: the order of the images, and the key of its steps.

    And, where a phase has them, the indices of the training images that are never trained on.
    """

    order: Array
    key: Array
    unseen: Array


class Unseen(NamedTuple):
    """A share of the training images that is not trained on, for an augmenter to learn from.

    How many of them it gets at a time, in one of `interval` steps of an epoch, the first of each.
    """

    share: float
    batch_size: int
    interval: int = 1

    def learns(self, i: Any) -> Any:
        """Whether an augmenter learns in step i of an epoch."""
        return i % self.interval == 0


ALL_SEEN = Unseen(0.0, 0)


# (key, uint8 images, labels, classify) -> (images of 0 to 255, labels or probabilities), for a
# batch; classify maps images of 0 to 255 to the logits of the classifier as it is.
Policy = Callable[[Array, Array, Array, Callable[[Array], Array]], tuple[Array, Array]]


def unchanged(
    key: Array, images: Array, labels: Array, classify: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The policy that leaves the images as they are."""
    del key, classify
    return images, labels


def divide(first: Policy, others: Policy, choose: Callable[[Array, int], Array]) -> Policy:
    """The first policy for the images that are chosen, the other one for the rest.

    Args:
      first, others: neither changes the labels.
      choose: (key, B) -> [B] bool.
    """

    def policy(
        key: Array, images: Array, labels: Array, classify: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        choice, *keys = jax.random.split(key, 3)
        results = [
            changes(key, images, labels, classify)[0]
            for changes, key in zip((first, others), keys, strict=True)
        ]
        chosen = choose(choice, len(images))
        return jnp.where(chosen[:, None, None, None], *results), labels

    return policy


def put(mesh: Mesh, *arrays: Any) -> tuple[Any, ...]:
    """Copies to all devices, explicitly, so that a transfer guard may forbid what is not meant.

    Several processes must give the same; each serves its own devices.
    """
    replicated = NamedSharding(mesh, P())
    if replicated.is_fully_addressable:
        return jax.device_put(arrays, replicated)

    def join(*copies: Array) -> Array:
        return jax.make_array_from_single_device_arrays(copies[0].shape, replicated, list(copies))

    # device_put would ask all processes about each array whether it is the same.
    return jax.tree.map(join, *(jax.device_put(arrays, device) for device in mesh.local_devices))


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Devices, by default all, along one axis, "data"."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def put_data(train: Dataset, test: Dataset, mesh: Mesh) -> Data:
    """Copies a data set to every device of the mesh, except for stored training images."""
    statistics = channel_statistics(train.images)
    rest = put(mesh, train.labels, test.images, test.labels, *statistics)
    if isinstance(train.images, StoredImages):
        return Data(None, *rest, stored=train.images)
    return Data(*put(mesh, train.images), *rest)


@keep_programs
def train_program(
    step: Callable,
    mesh: Mesh,
    batch_size: int,
    single_step: bool,
    policy: Policy = unchanged,
    unseen: Unseen = ALL_SEEN,
) -> Callable:
    """Compiles steps first..last - 1 of an epoch into one program; the state is donated.

    Where some images are unseen, the step gets some of them, drawn anew, as `unseen`, and, unless
    it always learns from them, whether it `learns`.

    With `single_step` the program is one step without a loop, since on a CPU XLA runs convolutions
    many times slower in a loop (jax issue 12868), and slower in a conditional. Only then do these
    arguments count: `learns`, static, and `given`, the images, if they are not on the device.
    """

    one_step = _one_step(step, mesh, batch_size, policy, unseen)

    @partial(
        jax.jit,
        donate_argnums=0,
        static_argnames="learns",
        out_shardings=NamedSharding(mesh, P()),
    )
    def run(
        state: Any,
        sums: Any,
        data: Data,
        plan: Plan,
        first: Array,
        last: Array,
        *given: Array,
        learns: bool = True,
    ) -> tuple[Any, Any]:
        if single_step:
            return one_step(first, state, sums, data, plan, learns, given)

        def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            learns_now = unseen.learns(i) if unseen.interval > 1 else True
            return one_step(i, *carry, data, plan, learns_now)

        return jax.lax.fori_loop(first, last, body, (state, sums))

    return run


def _one_step(
    step: Callable, mesh: Mesh, batch_size: int, policy: Policy, unseen: Unseen
) -> Callable:
    """Step i of an epoch, on its planned images, unless they are given.

    `learns` is a bool where the host knows it (False compiles no learning in), else an array.
    """

    def one_step(
        i: Array,
        state: Any,
        sums: Any,
        data: Data,
        plan: Plan,
        learns: Array | bool = True,
        given: tuple[Array, ...] = (),
    ) -> tuple[Any, Any]:
        indices, policy_key, step_key = _draw(plan, i, batch_size, unseen.batch_size)
        indices = [
            jax.lax.with_sharding_constraint(index, _division(mesh, len(index)))
            for index in indices
        ]
        resident = cast(Array, data.train_images)
        images, *others = given or [resident[index] for index in indices]

        def normalize(images: Array) -> Array:
            return steps.normalize(images, data.mean, data.sd)

        images, labels = policy(
            policy_key,
            images,
            data.train_labels[indices[0]],
            lambda images: state.classifier(normalize(images)),
        )
        also: dict[str, Any] = {}
        if unseen.batch_size:
            also["unseen"] = None if learns is False else normalize(others[0])
        if not isinstance(learns, bool):
            also["learns"] = learns
        state, metrics = _jitted(step)(state, normalize(images), labels, step_key, **also)
        return state, _add_up(sums, metrics, i)

    return one_step


def _add_up(sums: Any, metrics: steps.Metrics, i: Array) -> Any:
    """The epoch's sums with those of step i, which is bad if one of its metrics is not finite."""
    finite = jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
    bad = jnp.where(finite, NEVER, i)
    return {
        "metrics": jax.tree.map(jnp.add, sums["metrics"], metrics),
        "first_bad_step": jnp.minimum(sums["first_bad_step"], bad),
    }


def _draw(
    plan: Plan, i: Array, batch_size: int, unseen_batch_size: int
) -> tuple[list[Array], Array, Array]:
    """Of step i: the indices of its images, and of its unseen ones if any; two keys."""
    index = jax.lax.dynamic_slice(plan.order, (i * batch_size,), (batch_size,))
    policy_key, step_key = jax.random.split(jax.random.fold_in(plan.key, i))
    if not unseen_batch_size:
        return [index], policy_key, step_key
    draw_key, step_key = jax.random.split(step_key)
    unseen = jax.random.choice(draw_key, plan.unseen, (unseen_batch_size,))
    return [index, unseen], policy_key, step_key


def _division(mesh: Mesh, count: int) -> NamedSharding:
    """Of so many images among the devices, if these divide their number."""
    return NamedSharding(mesh, P("data") if count % mesh.size == 0 else P())


@keep_programs
def _indices_program(mesh: Mesh, batch_size: int, unseen_batch_size: int) -> Callable:
    """Compiles plan -> the indices of `_draw` of all steps of an epoch."""

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def indices(plan: Plan) -> list[Array]:
        each = jnp.arange(len(plan.order) // batch_size)
        return jax.vmap(lambda i: _draw(plan, i, batch_size, unseen_batch_size)[0])(each)

    return indices


def stream(
    images: StoredImages,
    mesh: Mesh,
    plan: Plan,
    batch_size: int,
    unseen: Unseen,
    first: int,
) -> Iterator[list[Array]]:
    """An epoch's batches from step `first` on, as `train_program` takes them.

    Each process reads what its devices need, of unseen images only for steps that learn from them.
    Raises OSError for an image that cannot be read.
    """
    indices = jax.device_get(_indices_program(mesh, batch_size, unseen.batch_size)(plan))
    order, counts = np.concatenate(indices, axis=1), [index.shape[1] for index in indices]
    # Of the columns of `order`: those of its images, those of its unseen ones, by device.
    kinds = [
        {
            device: columns[part]
            for device, part in _division(mesh, len(columns))
            .addressable_devices_indices_map(columns.shape)
            .items()
        }
        for columns in np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    ]

    def needed(number: int) -> np.ndarray:
        """The columns of this process, of the first so many kinds."""
        return np.unique(np.concatenate([c for kind in kinds[:number] for c in kind.values()]))

    mine = {number: needed(number) for number in (1, len(kinds))}
    numbers = [len(kinds) if unseen.learns(i) else 1 for i in range(len(order))]
    rows = [row[mine[number]] for row, number in zip(order, numbers, strict=True)]
    for number, pixels in zip(numbers[first:], batches(images, rows[first:]), strict=True):
        yield [
            _join(mesh, n, {d: pixels[np.searchsorted(mine[number], c)] for d, c in kind.items()})
            for n, kind in zip(counts[:number], kinds[:number], strict=True)
        ]


def _join(mesh: Mesh, count: int, parts: dict[Any, np.ndarray]) -> Array:
    """So many images, of which this process has the parts that its devices need."""
    on_devices = [jax.device_put(part, device) for device, part in parts.items()]
    shape = count, *on_devices[0].shape[1:]
    return jax.make_array_from_single_device_arrays(shape, _division(mesh, count), on_devices)


@keep_programs
def _maximum(mesh: Mesh) -> Callable:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def largest(mesh: Mesh, number: int) -> Array | int:
    """The largest of the processes' numbers, the same on all of them; not waited for."""
    if not mesh.is_multi_process:
        return number
    mine = [jax.device_put(np.array([number], np.int32), device) for device in mesh.local_devices]
    sharded = NamedSharding(mesh, P("data"))
    return _maximum(mesh)(jax.make_array_from_single_device_arrays((mesh.size,), sharded, mine))


def zero_sums(names: Iterable[str], mesh: Mesh) -> Any:
    """The accumulators of an epoch's training metrics, at zero."""
    sums = {
        "metrics": {name: np.zeros((), np.float32) for name in names},
        "first_bad_step": np.int32(NEVER),
    }
    return put(mesh, sums)[0]


def metric_names(
    step: Callable,
    mesh: Mesh,
    state: Any,
    image_shape: tuple[int, ...],
    batch_size: int,
    unseen_batch_size: int = 0,
) -> list[str]:
    """The names of the metrics that a step returns, traced as `train_program` will need it."""

    def images(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *image_shape), jnp.float32)

    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    arguments = (state, images(batch_size), labels, key)
    also = {"unseen": images(unseen_batch_size)} if unseen_batch_size else {}
    on_mesh = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    placed = jax.tree.map(lambda leaf: on_mesh(leaf.shape, leaf.dtype), (arguments, also))
    return list(jax.eval_shape(_jitted(step), *placed[0], **placed[1])[1])


@keep_programs
def _jitted(step: Callable) -> Callable:
    """The step, whose trace is kept from its metrics' names to its programs."""
    return jax.jit(step)


@keep_programs
def eval_program(eval_step: Callable, mesh: Mesh, batch_size: int) -> Callable:
    """Compiles an evaluation of batch_size images from `first` on; after the last, the first."""
    sharded = NamedSharding(mesh, P("data"))

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def run(state: Any, images: Array, labels: Array, mean: Array, sd: Array, first: Array) -> Any:
        index = (first + jnp.arange(batch_size)) % len(images)
        index = jax.lax.with_sharding_constraint(index, sharded)
        key = jax.random.fold_in(jax.random.key(0), first)
        return eval_step(state, steps.normalize(images[index], mean, sd), labels[index], key)

    return run


def evaluate(
    eval_step: Callable, state: Any, data: Data, mesh: Mesh, batch_size: int
) -> dict[str, np.ndarray]:
    """An evaluation of every test image: arrays [N, ...].

    What it draws depends on the batch size, not on the number of devices.
    """
    count = len(data.test_images)
    batch_size = min(batch_size, count)
    program = eval_program(eval_step, mesh, mesh.size * math.ceil(batch_size / mesh.size))
    batches = [
        program(state, data.test_images, data.test_labels, data.mean, data.sd, first)
        for first in put(mesh, *map(np.int32, range(0, count, batch_size)))
    ]

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part[:batch_size] for part in parts])[:count]

    return jax.tree.map(join, *jax.device_get(batches))


@keep_programs
def plan_program(mesh: Mesh) -> Callable:
    """Compiles (key of the order, key of the steps, seen, unseen, epoch) -> the epoch's `Plan`.

    An epoch has as many images as the training set: `seen`, reshuffled and repeated to fill it.
    """

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def plan(order_key: Array, step_key: Array, seen: Array, unseen: Array, epoch: Array) -> Plan:
        key, examples = jax.random.fold_in(order_key, epoch), len(seen) + len(unseen)
        rounds = math.ceil(examples / len(seen))
        keys = [key, *(jax.random.fold_in(key, i) for i in range(1, rounds))]
        order = jnp.concatenate([jax.random.permutation(k, seen) for k in keys])[:examples]
        return Plan(order, jax.random.fold_in(step_key, epoch), unseen)

    return plan
