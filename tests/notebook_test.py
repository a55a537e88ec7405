"""The notebook runs from top to bottom on a CPU; its committed outputs come from such a run."""

import base64
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "experiments" / "colab.ipynb"
SHORT = "--preset=quick --config.data.train_examples=64 --config.epochs"
PAPER = (
    f"{SHORT}.pretrain=1 --config.epochs.augment=1 --config.epochs.finetune=1 "
    "--config.augmenter.loss_forms=printed"
)
FIGURES = 4 + 4 + 1  # of quick, of CIFAR-10, the draws


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def settings(notebook):
    (cell,) = [cell for cell in code(notebook) if "settings" in cell.metadata.get("tags", [])]
    return cell


def check_outputs(notebook):
    """Nothing failed; the accelerator, Table 1, figures and transforms in words came out."""
    found = [output for cell in code(notebook) for output in cell.outputs]
    assert {output.output_type for output in found} == {"stream", "display_data"}
    text = "".join(output.text for output in found if output.output_type == "stream")
    assert "rror" not in text, text
    assert re.match(r"\d+ x \w+", text)
    assert text.count("Table 1") == 2
    words = code(notebook)[-1].outputs[0].text.splitlines()
    assert len(words) == 8
    assert all(re.match(r"turned|unchanged|\d|shear", line) for line in words), words
    pictures = [o.data["image/png"] for o in found if o.output_type == "display_data"]
    assert len(pictures) == FIGURES
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    for name in ("data", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quick = " --xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + quick)
    # The second run finds the first one's folder, as after a disconnect.
    (tmp_path / "cifar10").symlink_to("quick")
    short = {
        "LOCAL": str(tmp_path),
        "QUICK": PAPER,
        "CIFAR10": PAPER,
        "PICTURES": "",
        "LEARN": f"{SHORT}.train=2",
        "SIZE": 8,
    }
    cell = settings(notebook)
    assert re.findall(r"^(\w+) =", cell.source, re.MULTILINE) == list(short)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in short.items())
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=900, coalesce_streams=True, resources=resources).execute()
    check_outputs(notebook)
    assert len((tmp_path / "quick" / "metrics.jsonl").read_text().splitlines()) == 4


def test_committed_outputs_and_sources(notebook):
    check_outputs(notebook)
    content = PATH.read_text(encoding="utf-8")
    assert len(content) < 1e6
    for word in ("/tmp", "/home", "/root", "/work", "tensorflow", "jax.distributed", "\\u001b"):
        assert word not in content.replace("tensorflow_datasets", "").replace("tensorflow-data", "")
    assert content.count("https://github.com/") == 1
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
