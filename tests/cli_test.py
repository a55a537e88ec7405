"""Wrong input: one line that names it, exit code 2, and nothing on disk has changed."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from experiments import (
    ablation,
    active_learning,
    cli,
    compare,
    learn,
    paper,
    run_inputs,
    run_outputs,
    search,
)
from maxent_aug import config, data, models, phases, run_folder, train
from maxent_aug.config import PRESETS, Config

ROOT = Path(__file__).parent.parent
TINY = partial(models.ResNet, stage_sizes=(1,), width=4)
HUGE = str(10**12)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Digits, prepared."""
    folder = tmp_path_factory.mktemp("data")
    data.load("digits", "test", folder)
    return folder


@pytest.fixture(scope="module")
def images(data_dir):
    return tuple(data.load("digits", split, data_dir) for split in ("train", "test"))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, data_dir):
    """Runs a command line up to the end of load_data: (exit code, stdout, stderr, settings)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "exit", sys.exit)
    monkeypatch.setattr(app, "_run_init", lambda argv, parser: parser(argv))  # no log handlers
    reached = []

    def main(settings):
        run_inputs.load_data(settings.config, settings.data_dir)
        reached.append(settings)

    def call(*arguments, experiment="paper", presets=PRESETS, main=main):
        saved = flags.FLAGS.flag_values_dict(), {n: f.present for n, f in all_flags()}
        monkeypatch.setattr(sys, "argv", ["paper.py", *arguments])
        try:
            with pytest.raises(SystemExit) as stopped:
                cli.run(experiment, presets, main)
        finally:
            for name in saved[0]:
                if name in flags.FLAGS:  # not another experiment's
                    flags.FLAGS[name].value, flags.FLAGS[name].present = (s[name] for s in saved)
        out, errors = capsys.readouterr()
        return stopped.value.code or 0, out, errors, reached

    return call


def all_flags():
    return [(name, flags.FLAGS[name]) for name in flags.FLAGS]


def snapshot(*folders):
    return {p: p.stat().st_mtime_ns for f in folders for p in [f, *f.rglob("*")]}


NUMBERS = {name: value for name, _, value in cli._fields(Config()) if type(value) in (int, float)}
WRONG = [
    *[(f"--{name}={value}",) for name in NUMBERS for value in ("nan", "-1", "inf", "ten", "")],
    *[(f"--{name}=0",) for name in NUMBERS if "learning_rate" in name or "epochs" in name],
    *[(f"--{name}=1e39",) for name, value in NUMBERS.items() if type(value) is float],
    *[(f"--{name}=1{'0' * 400}",) for name in NUMBERS],
    ("--config.batch_size=0",),
    ("--config.batch_size=12",),  # not a multiple of 8 devices
    ("--config.batch_size=1440",),
    (f"--config.batch_size={HUGE}",),
    ("--config.eval_batch_size=0",),
    ("--config.checkpoint_every=0",),
    ("--config.augmenter.target=1.5",),
    ("--config.data.train_examples=9",),
    ("--config.data.train_examples=1438",),
    ("--config.data.held_out=9",),
    ("--config.data.held_out=1437",),
    ("--config.data.held_out=1438",),
    ("--config.batch_size=64", "--config.data.held_out=1400"),
    ("--config.data.train_examples=1038", "--config.data.held_out=400"),
    ("--config.batch_size=64", "--config.data.train_examples=32"),
    (f"--config.data.train_examples={HUGE}",),
    ("--config.data.rotated=181",),
    ("--config.data.name=",),
    ("--config.data.name=no_such_data",),
    ("--config.data.name=../digits",),
    ("--config.data.name=digits:9.9.9",),
    ("--config.data.name=folder",),
    ("--config.data.name=folder", "--data_dir=no/such/folder"),
    ("--config.data.name=folder", "--data_dir=."),
    ("--config.data.name=folder:1.0.0",),
    ("--config.data.test_fraction=0",),
    ("--config.data.test_fraction=1",),
    (f"--config.data.image_size={HUGE}",),
    ("--data_dir=no/such/folder",),
    ("--config.classifier.architecture=ResNet19",),
    ("--config.classifier.architecture=resnet18",),
    ("--config.compute_dtype=float16",),
    ("--config.augmenter.loss_forms=",),
    ("--config.augmenter.loss_forms=printed,printed",),
    ("--config.augmenter.loss_forms=printed,wrong",),
    ("--config.augmenter.padding_mode=wrap",),
    ("--config.augmenter.saturating=perhaps",),
    ("--seeds=0",),
    ("--seeds=-1",),
    ("--seeds=1.5",),
    ("--seeds=many",),
    ("--cpu_devices=-1",),
    (f"--cpu_devices={HUGE}",),
    ("--distributed",),
    ("--process_id=0",),
    ("--coordinator_address=localhost", "--distributed"),
    ("--coordinator_address=localhost:65536", "--distributed"),
    ("--coordinator_address=8476", "--distributed"),
    ("--coordinator_address=:8476", "--distributed"),
    ("--coordinator_address=", "--distributed"),
    ("--preset=fast",),
    ("--preset=",),
    ("--no_such_flag",),
    ("--config.classifer.learning_rate=0.1",),
    ("--config",),
    ("--seeds",),
    ("digits",),
    ("train", "--seeds=2"),
    ("--data_dir=",),
    ("--data_dir=~no_such_user/data",),
    ("--workdir=",),
    ("--workdir=~nobody-here/run",),
    ("--workdir=not\udcff-utf8",),
    (f"--workdir={'x' * 300}",),
    ("--workdir=/proc/version",),
    ("--workdir=/proc/version/below",),
]


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: ascii(" ".join(a))[1:60])
def test_wrong_input_takes_one_line_and_changes_nothing(command, arguments, tmp_path, data_dir):
    before = snapshot(tmp_path, data_dir)
    given = (
        arguments
        if any(a.startswith("--preset") for a in arguments)
        else ("--preset=quick", *arguments)
    )
    code, out, errors, reached = command(*given)
    assert (code, out, reached) == (2, "", [])
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    name = arguments[0].split("=")[0].removeprefix("--")
    assert name in errors or "config.data.name" in errors
    assert snapshot(tmp_path, data_dir) == before


EXPERIMENTS = {
    "paper": (paper, PRESETS),
    "compare": (compare, config.COMPARISON_PRESETS),
    "ablation": (ablation, config.ABLATION_PRESETS),
    "search": (search, config.SEARCH_PRESETS),
    "learn": (learn, config.LEARNING_PRESETS),
    "active_learning": (active_learning, config.ACTIVE_LEARNING_PRESETS),
}
OTHERS = [name for name in EXPERIMENTS if name != "paper"]


def wrong_values(experiment):
    """Arguments of an experiment with a value that a field does not allow, for each field."""
    for name, _, value in cli._fields(EXPERIMENTS[experiment][1]["quick"]):
        if isinstance(value, bool):
            texts = ["2", ""]
        elif isinstance(value, int | float):
            texts = ["nan", "inf", "-inf", "-1", "1e400", f"1{'0' * 400}", "ten", ""]
        elif isinstance(value, tuple):
            texts = ["", ",", f"{value[0]},{value[0]}", f"{value[0]},", value[0].upper()]
        else:
            texts = ["", "x", "a\nb", "x" * 5000, "../x"]
        for text in texts:
            yield f"--{name}={text}"


@pytest.fixture
def refused(command, tmp_path, data_dir, monkeypatch):
    """Runs an experiment that must refuse: its words. None trains further than this allows."""

    def call(experiment, *arguments):
        module, presets = EXPERIMENTS[experiment]
        before = snapshot(tmp_path, data_dir)
        given = ("--preset=quick", "--nocompilation_cache", *arguments)
        code, _, errors, _ = command(
            *given, experiment=experiment, presets=presets, main=module.main
        )
        assert code == 2, (given, errors)
        assert errors.startswith("error: ") and errors.count("\n") == 1, (given, errors)
        assert snapshot(tmp_path, data_dir) == before, given
        return errors

    monkeypatch.setattr(train, "_train_epoch", lambda *_: pytest.fail("not refused"))
    return call


@pytest.mark.parametrize("experiment", OTHERS)
def test_every_field_of_every_experiment_refuses(refused, experiment):
    for argument in wrong_values(experiment):
        assert argument.split("=")[0] in refused(experiment, argument)


@pytest.mark.parametrize(
    ("experiment", "argument"),
    [
        *[("compare", f"--policies={p}") for p in ("", "flop", "flip,flip", "flip+", "+", "Flip")],
        *[("compare", f"--policies={p}") for p in ("printed+intended", "flip,", "learned+learned")],
        *[("compare", f"--policies={p}") for p in ("learned+flip", "flip" + 50 * "+flip")],
        *[
            ("learn", f"--config.policy={p}")
            for p in ("+", "flip+", " flip", "learned", "flip,", ":flip", "flip:mixup")
        ],
        *[("active_learning", f"--strategies={s}") for s in ("", "margins", "margin,margin")],
        *[("active_learning", f"--config.batch_size={n}") for n in (0, 1)],
        ("search", "--config.trials=1001"),
        *[(e, f"--workdir=new{c}1") for e in OTHERS for c in "[*?"],
        *[("active_learning", f"--config.labels.first={n}") for n in (8, 1438, HUGE)],
        *[("active_learning", f"--config.labels.{f}={HUGE}") for f in ("query", "rounds")],
        *[(e, f"--config.learned.unseen={v}") for e in ("learn", "compare") for v in (0, 0.6, 1)],
        *[(e, f"--config.learned.share={v}") for e in ("learn", "compare") for v in (0, 1.1)],
        *[(e, "--config.epochs.train=1") for e in ("learn", "compare")],
        *[("ablation", f"--config.factors.draws={d}") for d in ("stochastic,stochastic", "both")],
        *[(e, f"--config.batch_size={HUGE}") for e in OTHERS],
        *[(e, "--config.data.train_examples=1438") for e in OTHERS],
        *[(e, "--config.data.held_out=1430") for e in OTHERS],
        *[(e, "--cpu_devices=-1") for e in OTHERS],
        *[(e, "--data_dir=no/such/folder") for e in OTHERS],
        *[(e, "--workdir=/dev/null/run") for e in OTHERS],
    ],
)
def test_wrong_input_of_the_other_experiments(refused, experiment, argument):
    words = refused(experiment, argument)
    name = argument.split("=")[0].removeprefix("--")
    assert name in words or name.rpartition(".")[0] in words or "batch_size" in words


def broken_line(line):
    return lambda run: (run / "metrics.jsonl").write_text(f"{line}\n{{}}\n")


DAMAGES = {
    "workdir is a file": lambda run: (shutil.rmtree(run), run.touch()),
    "of another experiment": lambda run: (run / "config.json").write_text('{"experiment": "x"}'),
    "config of zeros": lambda run: (run / "config.json").write_bytes(bytes(99)),
    "nested config": lambda run: (run / "config.json").write_text("[" * 10**5),
    "no config": lambda run: ((run / "config.json").unlink(), (run / "thesis.tex").touch()),
    "config is a folder": lambda run: replace_by_folder(run / "config.json"),
    "lock is a folder": lambda run: (run / ".lock").mkdir(),
    "metrics is a folder": lambda run: (run / "metrics.jsonl").mkdir(),
    "checkpoints is a file": lambda run: (run / "checkpoints").touch(),
    "metrics broken": broken_line("{broken"),
    "metrics of a list": broken_line("[1, 2]"),
    "metrics nested": broken_line("[" * 10**5),
    "metrics, epoch a list": broken_line('{"seed": 0, "branch": "", "phase": "", "epoch": [1]}'),
    "metrics, a text": broken_line(
        '{"seed": 0, "branch": "", "phase": "", "epoch": 1, "train_loss": "low"}'
    ),
    "metrics of zeros": lambda run: (run / "metrics.jsonl").write_bytes(bytes(50) + b"\n{}\n"),
}


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def fresh_run(experiment, run, images):
    """A folder as a run that was killed before its first epoch leaves it."""
    identity = cli.Settings(
        experiment, "quick", EXPERIMENTS[experiment][1]["quick"], run, None, 1
    ).identity
    run.mkdir()
    bound_to = identity | {"dataset": run_inputs._fingerprint(*images)}
    (run / "config.json").write_text(json.dumps(bound_to))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_damaged_run_folder(refused, tmp_path, images, experiment, damage, monkeypatch):
    monkeypatch.setattr(models, "ResNetSmall", TINY)
    run = tmp_path / "run"
    fresh_run(experiment, run, images)
    (run / ".lock").touch() if damage != "lock is a folder" else None
    DAMAGES[damage](run)
    assert "run" in refused(experiment, "--workdir=run")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_on_other_images(refused, tmp_path, images, experiment):
    train_set, test_set = images
    fresh_run(experiment, tmp_path / "run", (train_set, data.subset(test_set, 350, 0)))
    words = refused(experiment, "--workdir=run")
    assert "holds a run with dataset.test_images=350, this one has 360" in words
    shutil.rmtree(tmp_path / "run")
    relabelled = dataclasses.replace(train_set, labels=train_set.labels[::-1])
    fresh_run(experiment, tmp_path / "run", (relabelled, test_set))
    words = refused(experiment, "--workdir=run")
    assert "holds a run with dataset.labels=" in words
    assert "or the same images to resume" in words
    shutil.rmtree(tmp_path / "run")
    names = tuple(f"{name} again" for name in train_set.class_names)
    fresh_run(
        experiment, tmp_path / "run", (dataclasses.replace(train_set, class_names=names), test_set)
    )
    assert "holds a run with dataset.class_names=" in refused(experiment, "--workdir=run")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_folder_in_use(refused, tmp_path, images, experiment):
    fresh_run(experiment, tmp_path / "run", images)
    identity = json.loads((tmp_path / "run" / "config.json").read_text())
    with run_folder.open_run_folder(tmp_path / "run", identity):
        assert "in use by another process" in refused(experiment, "--workdir=run")


def test_a_misspelt_flag_gets_a_suggestion(command):
    errors = command("--preset=quick", "--config.batchsize=8")[2]
    assert "Did you mean: config.batch_size" in errors


def test_missing_data_are_named(command, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    before = snapshot(tmp_path)
    code, _, errors, _ = command("--preset=quick", "--config.data.name=mnist")
    assert code == 2
    assert "mnist" in errors
    assert errors.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["epochs.pretrain", "eval_batch_size", "checkpoint_every", "steps_per_call"]
)
def test_huge_numbers_are_harmless(command, name):
    code, _, errors, reached = command("--preset=quick", f"--config.{name}={HUGE}")
    assert (code, errors, len(reached)) == (0, "", 1)


def test_every_field_can_be_set_and_the_rest_is_the_presets(command):
    code, _, _, (settings,) = command(
        "--preset=quick",
        "--seeds=3",
        "--workdir=here",
        "--config.classifier.learning_rate=0.5",
        "--config.augmenter.loss_forms=gap,target",
        "--noconfig.augmenter.saturating",
        "--config.compute_dtype=bfloat16",
    )
    assert (code, settings.seeds, settings.workdir) == (0, 3, Path("here"))
    config, quick = settings.config, PRESETS["quick"]
    assert config.classifier.learning_rate == 0.5
    assert config.augmenter.loss_forms == ("gap", "target")
    assert not config.augmenter.saturating
    assert config.compute_dtype == "bfloat16"
    assert (config.epochs, config.data, config.batch_size) == (quick.epochs, quick.data, 64)


@pytest.mark.parametrize(
    ("given", "variables", "cores", "batch_size", "expected"),
    [
        ((), {}, 1, 128, 1),
        ((), {}, 2, 128, 2),
        ((), {}, 2, 25, 1),  # not divisible
        ((), {}, 2, 30, 1),  # fewer than 16 images each
        ((), {}, 64, 128, 8),
        ((), {}, 6, 128, 4),
        (("--cpu_devices=3",), {}, 2, 128, 3),
        (("--distributed",), {}, 2, 128, 1),
        ((), {"JAX_NUM_CPU_DEVICES": "3"}, 2, 128, None),
        ((), {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 2, 128, None),
    ],
)
def test_devices_made_of_a_cpu(monkeypatch, given, variables, cores, batch_size, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = dataclasses.replace(PRESETS["cifar10_small"], batch_size=batch_size)
    with flagsaver.as_parsed():
        flags.FLAGS(["paper.py", *given])
        assert cli._cpu_devices(config) == expected
        if cores > 1 and not given and not variables:
            assert cli._cpu_devices(dataclasses.replace(config, data=PRESETS["quick"].data)) == 1


def test_presets_pass_their_own_checks():
    for preset in PRESETS.values():
        for name, field, value in cli._fields(preset):
            cli._check(name, field, value)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (cli.UsageError("a\nb"), 2, "error: a b"),
        (run_folder.RunFolderError("a"), 2, "error: a"),
        (cli.CheckpointError("a"), 2, "error: a"),
        (cli.MetricsError("a"), 2, "error: a"),
        (train.NonFiniteLoss("a"), 1, "error: a"),
        (OSError(28, "No space left on device", "x"), 1, "error: [Errno 28] No space left"),
        (train.Interrupted("stopped in a", 15), 143, "stopped in a; run the same command to res"),
        (KeyboardInterrupt(), 130, "stopped at once; run the same command to resume, in runs/"),
    ],
)
def test_how_a_run_ends_is_said_in_a_line(command, error, code, words):
    def main(_):
        raise error

    got, _, errors, _ = command("--preset=quick", main=main)
    assert got == code
    assert errors.startswith(words)
    assert errors.count("\n") == 1


def test_another_config_is_refused_before_data_are_prepared(command, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    monkeypatch.setenv("TFDS_DATA_DIR", str(empty))
    identity = cli.Settings("paper", "quick", Config(), Path("run"), None, 1).identity
    with run_folder.open_run_folder(tmp_path / "run", identity):
        pass
    before = snapshot(tmp_path)
    code, _, errors, _ = command("--preset=quick", "--workdir=run")
    assert code == 2
    assert "run with config.data.name=cifar10, this one has digits" in errors
    assert snapshot(tmp_path) == before


def run_paper(tmp_path, *arguments):
    environment = os.environ | {"XLA_FLAGS": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TFDS_DATA_DIR", None)
    return subprocess.run(
        [sys.executable, "-m", "experiments.paper", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_fits_a_screen_and_helpfull_says_the_rest(tmp_path):
    short, full = (run_paper(tmp_path, flag) for flag in ("--help", "--helpfull"))
    for done in (short, full):
        assert (done.returncode, done.stderr) == (0, "")
    lines = short.stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    for name, field, _ in cli._fields(Config()):
        assert name.removeprefix("config.") in short.stdout
        assert f"--{name}" in full.stdout or f"--[no]{name}" in full.stdout
        assert field.metadata["help"].split()[0] in full.stdout
    for name in [*PRESETS, "--workdir", "--data_dir", "--seeds"]:
        assert name in short.stdout
    assert re.search(r"epochs.pretrain +100 +20 +5\n", short.stdout)
    for name in ("reflection", "bfloat16"):
        assert name in full.stdout


def test_more_seeds_are_asked_for_by_the_same_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--preset=quick", "--seeds=2", "--workdir=a b"])
    settings = cli.Settings("compare", "quick", Config(), Path("a b"), None, 2)
    expected = "python -m experiments.compare --preset=quick '--workdir=a b' --seeds=5"
    assert cli.with_more_seeds(settings) == expected


@pytest.mark.parametrize("end", ["--help | true", "--preset=quick --config.batch_size=0 | true"])
def test_a_reader_that_goes_leaves_no_traceback(tmp_path, end):
    command = f"set -o pipefail; {sys.executable} -m experiments.paper {end}"
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.stderr.count(b"\n") == done.returncode // 2 == ("help" not in end)


def test_flags_as_they_were_given(command):
    given = "--preset", "quick", "--config.batch_size", "8", "--seeds=2", "--workdir=a b"
    _, out, _, _ = command(*given, main=lambda _: print(cli.given_flags(lambda n: n != "workdir")))
    assert sorted(shlex.split(out)) == ["--config.batch_size=8", "--preset=quick", "--seeds=2"]


def test_a_real_process_says_one_line(tmp_path):
    done = run_paper(tmp_path, "--preset=quick", "--config.batch_size=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --config.batch_size=0 is not allowed (at least 1)\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nonsense", "rocm"])
def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("JAX_PLATFORMS", name)
    done = run_paper(tmp_path, "--preset=quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: JAX_PLATFORMS={name}: ")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "channels", "words"),
    [
        *[(n, 4, "1 or 3 channels, got 4") for n in ("flip+rand_augment", "entropy_magnitude")],
        ("flip_crop_reflect", 3, "less than H and W, got 4"),
    ],
)
def test_policies_that_do_not_take_the_images_are_named(tmp_path, name, channels, words):
    zeros = np.zeros((2, 4, 4, channels), np.uint8)
    images = data.Dataset(zeros, np.zeros(2, np.int32), ("a", "b"))
    chosen = dataclasses.replace(config.COMPARISON_PRESETS["quick"], batch_size=2)
    settings = cli.Settings("compare", "quick", chosen, tmp_path / "run", None, 1)
    rows = {n: compare._row(n, 2) for n in ("flip+cutout+mixup", name)}
    classifier = phases.make_classifier(chosen, 2)
    legs = sum(phases.comparison(chosen, classifier, rows, (4, 4, channels), 1).values(), ())
    with (
        pytest.raises(cli.UsageError, match=f"policy of {re.escape(name)} does not .*{words}"),
        run_inputs.open_run(settings, images, images, legs),
    ):
        pytest.fail("not refused")
    assert not list(tmp_path.iterdir())


def test_one_image_is_too_few_to_keep_some_unseen(monkeypatch):
    one = data.Dataset(np.zeros((1, 4, 4, 1), np.uint8), np.zeros(1, np.int32), ("a", "b"))
    monkeypatch.setattr(data, "load", lambda *_, **__: one)
    monkeypatch.setattr(cli.jax, "device_count", lambda: 1)
    chosen = dataclasses.replace(config.LEARNING_PRESETS["quick"], batch_size=1)
    with pytest.raises(cli.UsageError, match="has 1 training image, 2 are needed"):
        run_inputs._load_data(chosen, None, None)


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    class Figure:
        def savefig(self, file):
            file.write(b"half of a PNG")
            raise KeyboardInterrupt

    path = tmp_path / "figures" / "row.png"
    with pytest.raises(KeyboardInterrupt):
        run_outputs.save_figure(path, Figure())
    assert not list(path.parent.iterdir())


def test_a_cache_that_cannot_be_written_is_named_once_and_not_used(command, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    told = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.append(name))
    code, _, errors, reached = command("--preset=quick", "--cpu_devices=1")
    assert code == 0 and len(reached) == 1
    assert errors.count("compiled programs are not kept") == errors.count("\n") == 1
    assert str(tmp_path / "cache") in errors and "XDG_CACHE_HOME" in errors
    assert "jax_compilation_cache_dir" not in told


@pytest.mark.parametrize("name", ["paper", "benchmark", "export"])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(tmp_path, name):
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    # Not ignored, as it is where these tests run in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
