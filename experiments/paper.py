"""The paper: its three phases, Table 1, Figures 2 and 3, and how far the augmenter collapsed.

One pretrained classifier, then a branch without augmentation (the baseline) and one for each form
of the max-entropy loss. Run it again in the same folder to resume.

  python -m experiments.paper --preset=quick            digits, a minute or two on a CPU
  python -m experiments.paper --preset=cifar10_small    5,000 images of CIFAR-10, a small ResNet
  python -m experiments.paper                           the paper's protocol, for an accelerator
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cli, run_inputs, run_outputs
from maxent_aug import diagnostics, metrics, processes, programs, report, run_folder, steps, train
from maxent_aug.config import PRESETS
from maxent_aug.data import base_name
from maxent_aug.phases import Phase, make_classifier, schedule
from maxent_aug.progress import duration

# Table 1 of the paper. It has one proposed method; see the README for its two readings.
PAPER_ACCURACY = {"baseline": 0.8736, "printed": 0.8760, "intended": 0.8760}
PICTURES = 8
# Of experiments.learn: the preset that is like one of these, and flags that mean the same there.
NEXT = {"paper": "full", "cifar10_small": "small", "quick": "quick"}
SHARED_FLAGS = ("data_dir", "config.data.", "config.batch_size", "cpu_devices", "stream")


def main(settings: cli.Settings) -> None:
    """Trains all branches for all seeds, and writes what came out to the run's folder."""
    config = settings.config
    train_set, test_set = run_inputs.load_data(config, settings.data_dir)
    classifier = make_classifier(config, len(train_set.class_names))
    phases = schedule(config, classifier, train_set.images.shape[1:])
    with run_inputs.open_run(settings, train_set, test_set, phases) as make_run:
        shown: dict[str, dict[str, Any]] = {}
        for seed in range(settings.seeds):
            run = make_run(*run_inputs.choose(train_set, test_set, config, seed))
            final: dict[Phase | None, Any] = {None: None}
            for phase in phases:
                final[phase] = train.train_phase(run, phase, seed, final[phase.follows])
                if seed == 0 and phase.kind == "augment":
                    shown[phase.branch] = _transforms(run, phase, final[phase])
        result = processes.on_first(partial(_write, settings, phases, shown))
    _print(settings, result)


def _write(
    settings: cli.Settings, phases: Sequence[Phase], shown: dict[str, Any]
) -> dict[str, Any]:
    """Writes what came out to the run's folder: the content of result.json."""
    workdir = settings.workdir
    records = run_outputs.complete_records(settings, phases)
    result = _result(settings, records)
    report.write_report(
        workdir / "report.html",
        title="Learned augmentation, the paper's protocol",
        result=result,
        records=records,
        figures=_figures(workdir, result["tested_on"], records, shown),
    )
    run_folder.write_json(workdir / "result.json", result)
    return result


def _transforms(run: train.Run, phase: Phase, state: steps.State) -> dict[str, Any]:
    """What an augmenter does: `diagnostics.per_image` of all test images, pictures of the first."""
    on_device = run.data
    _, height, width, _ = on_device.test_images.shape
    values = programs.evaluate(
        phase.eval_step, state, on_device, run.mesh, run.config.eval_batch_size
    )
    logits = values["logits_before"], values["logits_after"]
    per_image = diagnostics.per_image(values["theta"], (height, width), *logits)
    augmented, theta = jax.jit(_augment)(state.augmenter, on_device)
    return jax.device_get(per_image) | {
        "images": np.asarray(on_device.test_images[:PICTURES]),
        "augmented": np.asarray(augmented),
        "words": diagnostics.describe(theta, (height, width)),
    }


def _augment(augmenter: steps.ModelState, on_device: programs.Data) -> tuple[jax.Array, jax.Array]:
    """The first test images augmented, as uint8, and their theta."""
    mean, sd = on_device.mean, on_device.sd
    augmented, theta = augmenter(steps.normalize(on_device.test_images[:PICTURES], mean, sd))
    return steps.denormalize(augmented, mean, sd), theta


def _result(settings: cli.Settings, records: Sequence[metrics.Record]) -> dict[str, Any]:
    """The content of result.json."""
    data, forms = settings.config.data, settings.config.augmenter.loss_forms
    paper = PAPER_ACCURACY if base_name(data.name) == "cifar10" and not data.held_out else {}
    accuracy = {}
    for branch in ("baseline", *forms):
        accuracies = [r["test_accuracy"] for r in _last(records, branch, "finetune")]
        row = branch if branch == "baseline" else f"proposed_{branch}"
        accuracy[row] = {
            **metrics.mean_and_sd(accuracies),
            "per_seed": accuracies,
            "paper": paper.get(branch),
        }
    collapse = {form: report.collapse_of_seeds(_last(records, form, "augment")) for form in forms}
    return run_outputs.result(settings, records, accuracy=accuracy, collapse=collapse)


def _last(records: Sequence[metrics.Record], branch: str, kind: str) -> list[metrics.Record]:
    """The record of the last epoch of a phase, for each seed."""
    own = [r for r in records if (r["branch"], r["phase"]) == (branch, kind)]
    last = max(r["epoch"] for r in own)
    return [r for r in own if r["epoch"] == last]


def _figures(
    workdir: Path,
    tested_on: str,
    records: Sequence[metrics.Record],
    shown: dict[str, dict[str, Any]],
) -> list[tuple[Path, str, str]]:
    """Draws the figures: (path, title, caption) for the report."""
    from maxent_aug import figures  # matplotlib writes a cache of fonts when it is imported

    branches = list(shown)

    def of_all(name: str) -> np.ndarray:
        return np.concatenate([shown[branch][name][:PICTURES] for branch in branches])

    drawn = {
        "accuracy": (
            figures.accuracy(records),
            f"Accuracy on {tested_on}, epoch by epoch",
            "One pretrained classifier, then its branches. One that ends above the baseline has "
            "gained from its augmenter; one that falls where it parts is trained on images that "
            "no longer look like those that it is tested on. The paper found no difference.",
        ),
        "adversarial_losses": (
            figures.adversarial_losses(records),
            "Adversarial losses (Figure 2)",
            "A discriminator at the dotted line guesses: it cannot tell augmented images from "
            "real ones; below the line, on the left, it can. In the paper the discriminator's "
            "loss rises and the augmenter's falls.",
        ),
        "augmented": (
            figures.augmented(
                of_all("images"),
                of_all("augmented"),
                [words for branch in branches for words in shown[branch]["words"]],
                of_all("entropy_before"),
                of_all("entropy_after"),
                columns=len(shown[branches[0]]["images"]),
                row_names=[f"as {branch}" for branch in branches],
            ),
            "What was done to each image (Figure 3)",
            f"{tested_on.capitalize()} above, the augmenter's output below, the transform in "
            "words, and the entropy of the classifier's prediction before and after. Equal "
            "pictures were left alone; where the entropy grows, the classifier is less sure "
            "than before.",
        ),
        "transforms": (
            figures.transforms(shown),
            f"Transforms of the {tested_on}",
            "A spike at the dotted line is a collapse to the identity, a spike elsewhere a "
            "collapse to one transform for all images.",
        ),
    }
    return run_outputs.save_figures(workdir, drawn)


def _print(settings: cli.Settings, result: dict[str, Any]) -> None:
    print(f"\nTable 1, on {result['tested_on']}")
    print(f"  {'':<30} {'mean':<6}  {'sd':>6}   n   paper (CIFAR-10)")
    for row, cells in result["accuracy"].items():
        sd = "     -" if cells["sd"] is None else f"{cells['sd']:.4f}"
        paper = "     -" if cells["paper"] is None else f"{cells['paper']:.4f}"
        print(f"  {row:<30} {cells['mean']:.4f}  {sd}  {len(cells['per_seed']):>2}  {paper}")
    collapse = result["collapse"]
    print(f"\n{'What the augmenter does':<30}" + "".join(f"{form:>12}" for form in collapse))
    for name in (name for name in next(iter(collapse.values())) if name != "per_seed"):
        print(f"  {name:<28}" + "".join(f"{means[name]:>12.4f}" for means in collapse.values()))
    print(f"\n{duration(result['seconds'])} on {result['device']}")
    print(f"figures, metrics.jsonl and result.json in {settings.workdir}")
    print(f"open {settings.workdir / 'report.html'}\nto learn an augmenter that does not collapse:")
    flags = cli.given_flags(lambda name: name.startswith(SHARED_FLAGS))
    print(f"  python -m experiments.learn --preset={NEXT[settings.preset]} {flags}".rstrip())


if __name__ == "__main__":
    cli.run("paper", PRESETS, main)
