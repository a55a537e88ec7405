"""Speed of warp, policies, training step, stream and start, beside what could be used instead.

Of each case it is first checked that all contenders compute the same; then they are timed in turn,
one repetition each after an untimed one (but not of a start), compiled before and blocked on
after. Run it again in the same folder to add cases to benchmark.json; those that it has are shown
and not measured again.

  pip install -e '.[bench]'
  python -m experiments.benchmark --suite=warp
  python -m experiments.benchmark --suite=step --only="ResNetSmall float32" --batch=100
"""

import argparse
import datetime
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from experiments import cli, peers
from maxent_aug import affine_matrix, data, policies, programs, run_folder, steps, warp_affine
from maxent_aug.config import Classifier, Config, PaperAugmenter
from maxent_aug.phases import make_classifier, schedule

SUITES = ("warp", "step", "stream", "startup", "policies")
GRADIENTS = ("forward", "theta gradient", "theta and image gradients")
DRAWN_POLICIES = {
    "trivial_augment": (policies.trivial_augment, policies.draw_trivial_augment),
    "rand_augment": (policies.rand_augment, policies.draw_rand_augment),
    "auto_augment": (policies.auto_augment, policies.draw_auto_augment),
}
POLICIES: dict[str, Callable[..., Any]] = {
    "identity": policies.identity,
    "flip": policies.flip,
    "flip_crop": policies.flip_crop,
    "random_affine": policies.random_affine,
    "cutout": policies.cutout,
    "color_jitter": policies.color_jitter,
    "mixup": lambda key, images: policies.mixup(
        key, images, jnp.arange(len(images)) % 10, num_classes=10
    ),
    "cutmix": lambda key, images: policies.cutmix(
        key, images, jnp.arange(len(images)) % 10, num_classes=10
    ),
    **{name: policy for name, (policy, _) in DRAWN_POLICIES.items()},
    "entropy_magnitude": lambda key, images: policies.entropy_magnitude(
        key, images, jnp.linspace(0, 1, len(images))
    ),
}
# The quick preset of the paper, up to the end of its first training step, whose loss it prints.
FIRST_STEP = """
import os, jax
from experiments import cli, paper
from maxent_aug import programs
from maxent_aug.config import PRESETS
compiled = programs.train_program
def first_step(*arguments, **options):
    def run(*inputs, **learns):
        state, sums = jax.block_until_ready(compiled(*arguments, **options)(*inputs, **learns))
        print(sums["metrics"]["loss"], flush=True)
        os._exit(0)
    return run
programs.train_program = first_step
cli.run("paper", PRESETS, paper.main)
"""


class BenchmarkError(Exception):
    """Contenders do not compute the same, or do not run."""


@dataclass(frozen=True)
class Case:
    """Contenders with the same work.

    Attributes:
      name: begins with the suite.
      batch: images a call; None where there are none.
      reference: the contender whose results and whose time the others are compared with.
      tolerance: allowed difference, as a share of the largest value of the reference.
      prepare: makes the contenders.
      other_work: contenders whose results are not compared, for orientation.
      checked_calls: the first calls, whose results are compared; they compile, too.
      images_moved: read or written, of each of the batch; for the share of a copy's bandwidth.
    """

    name: str
    batch: int | None
    reference: str
    tolerance: float
    prepare: Callable[[], dict[str, peers.Contender]]
    other_work: tuple[str, ...] = ()
    checked_calls: int = 2
    images_moved: int | None = None


def cases(batch: int | None, scratch: Path) -> Iterator[Case]:
    """All cases.

    Args:
      batch: images a call, instead of each case's own.
      scratch: a folder for the files of startup.
    """
    shapes = [(512, 32, 3), (64, 96, 3), (64, 224, 3), (512, 32, 1)]
    if jax.default_backend() != "cpu":
        shapes.append((65536, 32, 3))  # more than the caches hold
    variants = [(*shape, "float32", "bilinear", "zeros") for shape in shapes]
    variants.append((512, 32, 3, "bfloat16", "bilinear", "zeros"))
    variants += [
        (512, 32, 3, "float32", "bilinear", padding) for padding in ("border", "reflection")
    ]
    variants += [(512, 32, 3, "float32", "bicubic", padding) for padding in ("zeros", "reflection")]
    for variant in variants:
        yield from (_warp_case(batch, *variant, False, gradients) for gradients in range(3))
    yield _warp_case(batch, 512, 32, 3, "float32", "bilinear", "zeros", True, 0)
    on_gpu = jax.default_backend() == "gpu"
    for architecture in ("ResNetSmall", "ResNet18"):
        for precision in ("float32", "tf32", "bfloat16") if on_gpu else ("float32", "bfloat16"):
            yield _step_case(architecture, precision, batch)
    yield _stream_case(batch or 32, scratch)
    yield from _policy_cases(batch or 512)
    yield Case("startup, quick preset", None, "first start", 0.0, partial(starts, scratch), (), 1)


def _warp_case(
    batch: int | None,
    own_batch: int,
    size: int,
    channels: int,
    dtype: str,
    mode: str,
    padding: str,
    inside: bool,
    gradients: int,
) -> Case:
    batch, where = batch or own_batch, "within the frame" if inside else ""
    words = [f"{size}x{size}x{channels}", dtype, mode, padding, where]
    words = [word for word in words if word not in ("float32", "bilinear", "zeros", "")]
    return Case(
        f"warp, {' '.join(words)} {GRADIENTS[gradients]}, batch {batch}",
        batch,
        "jax.scipy" if mode == "bilinear" else "ours, matmul",
        1e-2 if dtype == "bfloat16" else 1e-4,  # one rounding of bfloat16 is up to 2^-8
        partial(warps, (batch, size, size, channels), dtype, mode, padding, inside, gradients),
        ("copy",),
        images_moved=2 + gradients,
    )


def warps(
    shape: tuple[int, ...], dtype: str, mode: str, padding: str, inside: bool, gradients: int
) -> dict[str, peers.Contender]:
    """Affine warps of a batch of images by a theta for each.

    Args:
      shape: [B, H, W, C].
      dtype: of the images; positions are float32.
      mode, padding: mode and padding_mode of `warp_affine`; for bicubic, jax.scipy and dm_pix have
        nothing, and OpenCV rounds its weights.
      inside: all positions are inside the image, where dm_pix's frame is no other than ours.
      gradients: 0, 1 for theta's, 2 for theta's and the image's beside it.
    """
    image, theta, cotangent = _warp_inputs(shape, inside)
    arrays = jnp.asarray(theta), *(jnp.asarray(x, dtype) for x in (image, cotangent))
    run = partial(_jax_warp, arrays=arrays, gradients=gradients)
    sampling = {"mode": mode, "padding_mode": padding}

    def ours(theta: jax.Array, image: jax.Array, method: str) -> jax.Array:
        return warp_affine(image, theta, mode=mode, padding_mode=padding, method=method)

    found = {"ours, gather": run(partial(ours, method="gather"))}
    if jax.default_backend() != "cpu" or shape[1] <= 32:  # its cost: the square of the pixels
        found["ours, matmul"] = run(partial(ours, method="matmul"))
    found |= peers.torch_warps(theta, image, cotangent, dtype, sampling, gradients)
    if mode == "bilinear":
        found["jax.scipy"] = run(partial(peers.scipy_warp, mode=peers.PADDING[padding][0]))
        if gradients == 0 and dtype == "float32":
            found |= peers.opencv_warps(theta, image, peers.PADDING[padding][1])
        if inside and (dm_pix := peers.peer("dm_pix")):
            found["dm_pix"] = run(partial(peers.dm_pix_warp, dm_pix))
    found["copy"] = partial(jax.jit(lambda image: (image + 1,)), arrays[1])
    return found


def _warp_inputs(shape: tuple[int, ...], inside: bool) -> tuple[np.ndarray, ...]:
    """image, theta, cotangent of the result; float32."""
    random = np.random.default_rng(0)
    image, cotangent = random.normal(size=(2, *shape)).astype(np.float32)
    theta = affine_matrix(
        rotation=random.uniform(-0.5, 0.5, shape[0]),
        log_scale=random.uniform(-0.25, 0.25, shape[0]) - 0.8 * inside,
        shear=random.uniform(-0.1, 0.1, shape[0]),
        translation=random.uniform(-0.1, 0.1, (shape[0], 2)),
    )
    # A position close to a pixel's centre or edge may round to either side, where slopes differ.
    x, y = peers.positions(np.asarray(theta, np.float64), shape[1:3])
    safe = np.all([np.abs(2 * p - np.round(2 * p)) > 2e-3 for p in (x, y)], axis=0)
    return image, np.asarray(theta), cotangent * safe[..., None]


def _jax_warp(warp: Callable[..., jax.Array], *, arrays: Any, gradients: int) -> peers.Contender:
    def run(theta: jax.Array, image: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        if gradients == 0:
            return (warp(theta, image),)
        if gradients == 1:
            out, vjp = jax.vjp(lambda theta: warp(theta, image), theta)
        else:
            out, vjp = jax.vjp(warp, theta, image)
        return out, *vjp(cotangent)

    return partial(jax.jit(run), *arrays)


def _step_case(architecture: str, precision: str, batch: int | None) -> Case:
    batch = batch or (32 if jax.default_backend() == "cpu" else 128)
    return Case(
        f"step, {architecture} {precision}, batch {batch}",
        batch,
        "plain step",
        {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 5e-2}[precision],
        partial(training_steps, architecture, precision, batch),
        ("phase 2",),
    )


def training_steps(
    architecture: str, precision: str, batch: int, size: int = 32
) -> dict[str, peers.Contender]:
    """A step of each phase, and of phase 1 in PyTorch, on images [batch, size, size, 3].

    The images and weights are the same. A new augmenter is the identity, so that phase 3 must
    have phase 1's losses.
    """
    config = Config(
        classifier=Classifier(architecture, learning_rate=1e-3, finetune_learning_rate=1e-3),
        augmenter=PaperAugmenter(loss_forms=("intended",)),
        compute_dtype=precision.replace("tf32", "float32"),
    )
    key, random = jax.random.key(0), np.random.default_rng(0)
    images = random.normal(size=(batch, size, size, 3)).astype(np.float32)
    labels = random.integers(0, 10, batch, np.int32)
    pretrain, _, augment, finetune = schedule(config, make_classifier(config, 10), images.shape[1:])
    plain = pretrain.begin(None, key)
    learned = augment.begin(plain, key)
    tuned = finetune.begin(learned, key)
    found = {}
    with jax.default_matmul_precision("float32" if precision == "float32" else "default"):
        for name, phase, state in (
            ("plain step", pretrain, plain), ("phase 2", augment, learned),
            ("phase 3", finetune, tuned),
        ):  # fmt: skip
            step = partial(phase.step, key=key)
            found[name] = _jax_step(step, state, images, labels)
    return found | peers.torch_steps(plain.classifier, images, labels, precision)


def _jax_step(
    step: Callable, state: steps.State, images: ArrayLike, labels: ArrayLike
) -> peers.Contender:
    state, images, labels = jax.tree.map(jnp.array, (state, images, labels))  # a copy to donate
    program = jax.jit(step, donate_argnums=0).lower(state, images, labels).compile()

    def run() -> tuple[jax.Array]:
        nonlocal state
        state, values = program(state, images, labels)
        return (values["loss"],)

    return run


def _stream_case(batch: int, scratch: Path) -> Case:
    steps = 704 // batch
    return Case(
        f"stream, digits scaled to 32x32, ResNetSmall, {steps} steps of {batch}",
        steps * batch,
        "resident",
        0.0,
        partial(streams, scratch, batch, steps),
        ("reading alone",),
    )


def streams(scratch: Path, batch: int, count: int) -> dict[str, peers.Contender]:
    """The first steps of an epoch, of images on the device and of images read from disk."""
    folder = scratch / "stream"
    folder.mkdir()
    load = partial(data.load, "digits", data_dir=folder, image_size=32)
    train, stored, test = load(split="train"), load(split="train", most_bytes=0), load(split="test")
    mesh, key = programs.make_mesh(), jax.random.key(0)
    config = Config(classifier=Classifier("ResNetSmall", learning_rate=1e-3))
    phase, *_ = schedule(config, make_classifier(config, 10), test.images.shape[1:])
    state = programs.put(mesh, phase.begin(None, key))[0]
    program = programs.train_program(phase.step, mesh, batch, True)
    on_device = programs.put_data(train, test, mesh)
    names = programs.metric_names(phase.step, mesh, state, test.images.shape[1:], batch)
    order = np.arange(len(train.labels), dtype=np.int32)
    inputs = programs.put(mesh, key, key, order, np.zeros(0, np.int32), np.int32(0))
    plan = programs.plan_program(mesh)(*inputs)

    def read() -> Iterator[Sequence[jax.Array]]:
        return programs.stream(stored.images, mesh, plan, batch, programs.ALL_SEEN, 0)

    def epoch(read: Callable[[], Iterator[Sequence[jax.Array]]]) -> tuple[jax.Array]:
        at, sums = jax.tree.map(jnp.copy, state), programs.zero_sums(names, mesh)
        for i, images in enumerate(itertools.islice(read(), count)):
            bounds = programs.put(mesh, np.int32(i), np.int32(i + 1))
            at, sums = program(at, sums, on_device, plan, *bounds, *images)
        return (sums["metrics"]["loss"],)

    return {
        "resident": partial(epoch, lambda: itertools.repeat(())),
        "streamed": partial(epoch, read),
        "reading alone": lambda: tuple(itertools.islice(read(), count))[-1:],
    }


def _policy_cases(batch: int) -> Iterator[Case]:
    """Policies of operations beside Pillow, then every policy."""
    shape, where = (batch, 32, 32, 3), f"32x32x3, batch {batch}"
    for name in ("trivial_augment", "rand_augment", "auto_augment"):
        prepare = partial(drawn_policies, name, shape)
        # With operations in turn, the next one may enlarge a difference of one level: not compared.
        other_work = () if name == "trivial_augment" else ("ours", "keras")
        yield Case(f"policies, {name} {where}", batch, "Pillow", 1.01 / 255, prepare, other_work)
    every = partial(every_policy, shape)
    yield Case(f"policies, every one {where}", batch, "identity", 0.0, every, (*POLICIES,)[1:])


def drawn_policies(name: str, shape: tuple[int, ...]) -> dict[str, peers.Contender]:
    """A policy that draws operations, on uint8 images, and Pillow with the same ones drawn."""
    policy, draw = DRAWN_POLICIES[name]
    key, images = jax.random.key(0), _levels(shape)
    found = {"ours": _jax_policy(policy, images)}
    found["Pillow"] = peers.pillow_policy(images, *jax.device_get(draw(key, shape)))
    if name == "rand_augment":
        found |= peers.keras_rand_augment(jnp.asarray(images), n=2, factor=0.3)
    return found


def every_policy(shape: tuple[int, ...]) -> dict[str, peers.Contender]:
    """Images a second of every policy, on uint8 images."""
    return {name: _jax_policy(policy, _levels(shape)) for name, policy in POLICIES.items()}


def _jax_policy(policy: Callable[..., Any], images: np.ndarray) -> peers.Contender:
    run = jax.jit(lambda key, images: tuple(jax.tree.leaves(policy(key, images))))
    return partial(run, jax.random.key(0), jnp.asarray(images))


def _levels(shape: tuple[int, ...]) -> np.ndarray:
    """Images of smooth and of noisy parts, uint8."""
    random = np.random.default_rng(0)
    ramp = np.linspace(30, 200, shape[2])[:, None] * random.uniform(0.2, 1, (shape[0], 1, 1, 3))
    return (ramp + random.uniform(0, 40, shape)).astype(np.uint8)


def starts(scratch: Path) -> dict[str, peers.Contender]:
    """Processes that end after their first training step, with an empty and a full cache."""
    cache, folder = scratch / "cache", scratch / "data"
    folder.mkdir()
    for split in ("train", "test"):
        data.load("digits", split, folder)  # prepared before the clock runs

    def start() -> tuple[Any]:
        run = scratch / "run"
        shutil.rmtree(run, ignore_errors=True)
        arguments = ["--preset=quick", f"--workdir={run}", f"--data_dir={folder}"]
        done = subprocess.run(
            [sys.executable, "-c", FIRST_STEP, *arguments],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise BenchmarkError(f"experiments.paper ended with exit code {done.returncode}")
        return (np.float32(done.stdout.split()[-1]),)

    def first() -> tuple[Any]:
        shutil.rmtree(cache, ignore_errors=True)
        return start()

    return {"first start": first, "second start": start}


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """Checks and times a case: its entry in benchmark.json.

    Raises:
      BenchmarkError: if a contender's results are not the reference's.
    """
    contenders = case.prepare()
    difference = _compare(case, contenders)
    calls = 20 if case.batch and jax.default_backend() != "cpu" else 1
    # A library's threads may still spin, and its data fill the caches, as the next one begins.
    seconds = _interleaved(contenders, repetitions, calls, untimed=1 if case.batch else 0)
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    others = (*peers.PEERS, "jax.scipy", "Pillow")
    rivals = [m for name, m in medians.items() if name.split(",")[0] in others]
    rows = {}
    for name, median in medians.items():
        rows[name] = {
            "difference": difference.get(name),
            "median_s": median,
            "quartiles_s": np.percentile(seconds[name], [25, 75]).tolist(),
            "images_per_s": case.batch and case.batch / median,
            "speed_to_fastest_peer": min(rivals) / median if rivals else None,
            "time_to_reference": median / medians[case.reference],
        }
        if case.images_moved:
            share = case.images_moved / 2 * medians["copy"] / median
            rows[name]["share_of_copy_bandwidth"] = share
    return {
        "batch": case.batch, "repetitions": repetitions, "calls": calls,
        "reference": case.reference, "tolerance": case.tolerance,
        "load_average": os.getloadavg()[0], "contenders": rows,
    }  # fmt: skip


def _compare(case: Case, contenders: dict[str, peers.Contender]) -> dict[str, float]:
    """Each contender's largest difference, as a share of the reference's largest value."""
    results = {}
    for name, run in contenders.items():
        calls = [[_array(x) for x in run()] for _ in range(case.checked_calls)]
        results[name] = [x for call in calls for x in call]
    reference, difference = results[case.reference], {}
    for name in contenders.keys() - set(case.other_work):
        pairs = zip(results[name], reference, strict=True)
        difference[name] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        if not difference[name] <= case.tolerance:  # NaN is one, too
            raise BenchmarkError(
                f"{case.name}: {name} and {case.reference} differ by {difference[name]:.1e} of the "
                f"largest value, {case.tolerance:.0e} is allowed; nothing was timed"
            )
    return difference


def _array(x: Any) -> np.ndarray:
    """Of any library, float32, channels last; a copy."""
    if hasattr(x, "detach"):
        x = x.detach().float().cpu().numpy()
        x = np.moveaxis(x, 1, -1) if x.ndim == 4 else x
    return np.array(x, np.float32)


def _interleaved(
    contenders: dict[str, peers.Contender], repetitions: int, calls: int, untimed: int = 0
) -> dict[str, list[float]]:
    """Seconds [repetitions] a call, of so many calls that are waited for together.

    Untimed ones go before them.
    """
    torch = peers.peer("PyTorch")
    torch_on_gpu = torch and peers.torch_device(torch) == "cuda"
    wait = torch.cuda.synchronize if torch and torch_on_gpu else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, run in contenders.items():
            for _ in range(untimed):
                jax.block_until_ready(run())
            wait()
            started = time.perf_counter()
            for _ in range(calls - 1):
                run()
            jax.block_until_ready(run())
            wait()
            seconds[name].append((time.perf_counter() - started) / calls)
    return seconds


def environment() -> dict[str, Any]:
    """Versions (None for a peer that is not installed), device, threads."""
    found = run_folder.environment()
    for name in peers.PEERS:
        found["versions"][name] = getattr(peers.peer(name), "__version__", None)
    variables = ("XLA_FLAGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    threads = {"all but those of 1 thread": os.cpu_count()}
    return found | {"threads": threads | {name: os.environ.get(name) for name in variables}}


def main(options: argparse.Namespace) -> None:
    """Measures what the folder's benchmark.json lacks of what is asked for, and shows it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    programs.keep_freed_memory()  # of all contenders
    with tempfile.TemporaryDirectory() as scratch:
        wanted = [c for c in cases(options.batch, Path(scratch)) if _is_wanted(c, options)]
        if not wanted:
            raise cli.UsageError(f"--only={options.only!r} is in the name of no case of the suite")
        where = environment()
        identity = {"experiment": "benchmark", "repetitions": options.repetitions, **where}
        with run_folder.open_run_folder(options.workdir, identity):
            print(_about(where))
            if (load := os.getloadavg()[0]) > 0.5:
                print(f"warning: others use this machine (load {load:.1f}); threads suffer most")
            for case in wanted:
                _show(case.name, _measured(case, options, where))
            print(f"\nbenchmark.json and charts in {options.workdir}")


def _is_wanted(case: Case, options: argparse.Namespace) -> bool:
    return options.suite in (case.name.split(",")[0], "all") and options.only in case.name


def _about(where: dict[str, Any]) -> str:
    """Hardware, versions, threads, and which peers are missing; three lines."""
    lines = [where["device"]]
    for part in ("versions", "threads"):
        lines.append(", ".join(f"{k} {v}" for k, v in where[part].items() if v is not None))
    missing = [name for name in peers.PEERS if where["versions"][name] is None]
    if missing:
        lines.append(f"not installed: {', '.join(missing)} (pip install -e '.[bench]')")
    return "\n".join(lines)


def _measured(case: Case, options: argparse.Namespace, where: dict[str, Any]) -> dict[str, Any]:
    """A case's entry in benchmark.json; measured, written and drawn if it is not there."""
    path = options.workdir / "benchmark.json"
    try:
        result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
        if case.name in result["cases"]:
            return result["cases"][case.name]
    except (ValueError, TypeError, KeyError):
        raise run_folder.RunFolderError(f"{path} is damaged; put it back or delete it") from None
    entry = measure(case, options.repetitions)
    entry["command"] = shlex.join(["python", "-m", "experiments.benchmark", *options.arguments])
    entry["date"] = datetime.date.today().isoformat()
    result = {**where, "cases": result["cases"] | {case.name: entry}}
    run_folder.write_json(path, result)
    suite = case.name.split(",")[0]
    own = {k: v for k, v in result["cases"].items() if k.startswith(f"{suite},")}
    _chart(own, _about(where)).savefig(options.workdir / f"{suite}.png")
    return entry


def _show(name: str, entry: dict[str, Any]) -> None:
    """A case's part of the table."""
    n, reference = entry["repetitions"], entry["reference"]
    print(f"\n{name}: median (quartiles) of {n}; load {entry['load_average']:.1f}")
    print(
        f"  {'':<18}{'ms':>26}{'images/s':>12}{'x fastest peer':>16}{'time / ' + reference:>20}"
        f"{'difference':>12}{'copy bandwidth':>16}"
    )
    for contender, row in entry["contenders"].items():
        low, high = (1e3 * q for q in row["quartiles_s"])
        times = f"{1e3 * row['median_s']:,.2f} ({low:,.2f}, {high:,.2f})"
        print(
            f"  {contender:<18}{times:>26}{_cell(row['images_per_s'], ',.0f'):>12}"
            f"{_cell(row['speed_to_fastest_peer'], '.2f'):>16}{row['time_to_reference']:>20.2f}"
            f"{_cell(row['difference'], '.1e'):>12}"
            f"{_cell(row.get('share_of_copy_bandwidth'), '.0%'):>16}",
            flush=True,
        )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _chart(entries: dict[str, dict[str, Any]], about: str) -> Any:
    """Bars of images/s, or of seconds where there are no images, with their quartiles."""
    from matplotlib.figure import Figure  # matplotlib writes a cache of fonts

    images = all(entry["batch"] for entry in entries.values())
    bars = sum(len(entry["contenders"]) + 2 for entry in entries.values())
    figure = Figure(figsize=(9, 1.5 + 0.2 * bars), dpi=100, layout="constrained")
    axes, y, labels = figure.subplots(), 0, {}
    for name, entry in entries.items():
        axes.text(
            0.0, y, f" {name}", transform=axes.get_yaxis_transform(), weight="bold", va="center"
        )
        for contender, row in entry["contenders"].items():
            y += 1
            labels[y] = contender
            values = [row["median_s"], *row["quartiles_s"]]
            median, *quartiles = (entry["batch"] / v if images else v for v in values)
            ours = contender.startswith("ours") or contender == entry["reference"] != "jax.scipy"
            axes.barh(y, median, color="#0072B2" if ours else "#999999")
            axes.plot(quartiles, [y, y], color="black")
        y += 2
    axes.set(yticks=list(labels), yticklabels=labels.values(), ylim=(y - 1, -1), xscale="log")
    axes.set_xlabel("images/s" if images else "seconds")
    figure.suptitle(about, fontsize=7, wrap=True)
    return figure


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed (a whole number, at least 1)")
    return int(text)


def run(arguments: Sequence[str]) -> None:
    """The command line; exit codes as in `cli.run`."""
    parser = cli.Parser("python -m experiments.benchmark", __doc__)
    parser.add_argument("--suite", choices=(*SUITES, "all"), required=True)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--repetitions", type=_positive, default=15)
    parser.add_argument("--batch", type=_positive, help="images a call, instead of the cases' own")
    parser.add_argument("--only", default="", help="a part of the names of the wanted cases")
    options = parser.parse_args(arguments, argparse.Namespace(arguments=arguments))
    cli.catch_interrupts()
    try:
        cli.start_devices()
        main(options)
    except (cli.UsageError, run_folder.RunFolderError) as error:
        cli.fail(error, 2)
    except (BenchmarkError, OSError) as error:
        cli.fail(error, 1)
    except KeyboardInterrupt:
        print(f"stopped; run the same command to go on, in {options.workdir}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run(sys.argv[1:])
