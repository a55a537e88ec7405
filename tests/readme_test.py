"""The README's code runs as it stands, on a user's own data and classifier."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import maxent_aug as ma

pytestmark = pytest.mark.usefixtures("quick_compilation")
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_ten_lines_learn_an_augmenter(capsys):
    block = BLOCKS[2]
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) == 10

    digits = load_digits()
    images = jnp.asarray((digits.images[:1408, :, :, None] - 4.9) / 6.0, jnp.float32)
    labels = digits.target[:1408]
    # Somebody's own classifier: least squares on the pixels, sharpened to be sure of itself.
    pixels = np.asarray(images).reshape(len(images), -1)
    weights = np.linalg.lstsq(pixels, np.eye(10)[labels], rcond=None)[0].astype(np.float32)

    def classify(batch):
        return 10 * batch.reshape(len(batch), -1) @ weights

    scope = {"images": images, "classify": classify}
    exec(block, scope)
    assert scope["augmented"].shape == (8, 8, 8, 1)
    assert scope["theta"].shape == (8, 2, 3)
    assert np.isfinite(scope["theta"]).all()
    assert np.abs(scope["theta"] - np.eye(2, 3)).max() > 1e-3
    assert capsys.readouterr().out.strip()


def test_policies_mix_pictures_and_labels():
    pictures = np.random.default_rng(0).integers(0, 256, (12, 9, 11, 3), np.uint8)
    scope = {"pictures": pictures, "labels": np.arange(12) % 10}
    exec(BLOCKS[3], scope)
    assert scope["mixed"].shape == pictures.shape and scope["mixed"].dtype == np.uint8
    assert not np.array_equal(scope["mixed"], pictures)
    np.testing.assert_allclose(scope["probabilities"].sum(1), np.ones(12), atol=1e-5)


def test_a_learned_augmenter_is_loaded_and_applied(tmp_path, monkeypatch, capsys):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 9, 11, 3), np.uint8)
    module, key, shape = ma.StochasticAugmenter(share=1.0), jax.random.key(0), pictures.shape[1:]
    params = jax.jit(module.init)(key, np.zeros((1, *shape), np.float32), key)["params"]
    path = tmp_path / "runs" / "learn-quick" / "augmenter.npz"
    path.parent.mkdir(parents=True)
    mean = sd = np.full(3, 0.5, np.float32)
    ma.save_augmenter(path, module, params, mean=mean, sd=sd, image_shape=shape)
    monkeypatch.chdir(tmp_path)
    logits = np.random.default_rng(1).normal(0, 3, (12, 5)).astype(np.float32)
    scope = {"pictures": pictures, "logits": logits}
    exec(BLOCKS[0], scope)
    assert scope["augmented"].shape == pictures.shape and scope["augmented"].dtype == np.uint8
    assert scope["theta"].shape == (12, 2, 3)
    assert "turned" in capsys.readouterr().out

    ma.export_augmenter(path, tmp_path / "augmenter.stablehlo")
    exported = {"pictures": pictures, "uncertainty": ma.uncertainty(logits)}
    exec(BLOCKS[1], exported)
    np.testing.assert_allclose(exported["theta"], scope["theta"], atol=1e-5)
    np.testing.assert_allclose(exported["augmented"], scope["augmented"], atol=0.51)


def test_pictures_and_files_that_it_names_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (Path(__file__).parent.parent / link).exists(), link
