"""The notebook runs from top to bottom on a CPU, and shows figures and words."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "experiments" / "colab.ipynb"
SHORT = "--preset=quick --config.data.train_examples=128 --config.epochs"
PAPER = (
    f"{SHORT}.pretrain=1 --config.epochs.augment=1 --config.epochs.finetune=1 "
    "--config.augmenter.loss_forms=printed"
)


def read():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    """All that is printed, and the PNGs in base64."""
    found = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in found if output.output_type == "error"]
    text = "".join(output.text for output in found if output.output_type == "stream")
    data = [output.data for output in found if output.output_type == "display_data"]
    return text, [each["image/png"] for each in data if "image/png" in each]


def check(notebook, images):
    """What every run prints and draws."""
    text, pictures = outputs(notebook)
    assert len(pictures) == images
    assert "error" not in text.lower(), text
    assert re.search(r"^\d+ x \w+", text)
    assert "Table 1" in text
    assert len(re.findall(r"^turned .*°|^unchanged|x wider|x taller", text, re.MULTILINE)) >= 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq")
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = read()
    (settings,) = [c for c in code(notebook) if "settings" in c.metadata.get("tags", [])]
    short = {
        "LOCAL": str(tmp_path),
        "QUICK": PAPER,
        "CIFAR10": PAPER,
        "PICTURES": "",
        "LEARN": f"{SHORT}.train=2",
        "SIZE": 8,
    }
    assert re.findall(r"^(\w+) =", settings.source, re.MULTILINE) == list(short)
    settings.source = "\n".join(f"{name} = {value!r}" for name, value in short.items())
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    check(notebook, images=9)
