"""A learned augmenter's file: what is saved is what is applied, and damage is named."""

import json
import os
import subprocess
import sys
import zipfile

import chex
import jax
import numpy as np
import pytest

from experiments import export
from maxent_aug import Augmenter, ColorBounds, StochasticAugmenter, load_augmenter, save_augmenter
from maxent_aug.augmenter_file import export_augmenter
from maxent_aug.spatial import AffineBounds
from maxent_aug.steps import denormalize, normalize

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = (8, 10, 3)
MEAN, SD = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.25, 0.3])
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def trained():
    module = StochasticAugmenter(
        bounds=AffineBounds(shear=0.5), share=0.7, hidden=8, uncertainty=0.3
    )
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, *SHAPE)), KEY)["params"]
    noise = jax.random.split(KEY, len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), noise)
    return module, jax.tree.map(lambda x, k: x + jax.random.normal(k, x.shape), params, noise)


@pytest.fixture
def path(trained, tmp_path):
    path = tmp_path / "augmenter.npz"
    save_augmenter(path, *trained, mean=MEAN, sd=SD, image_shape=SHAPE)
    assert [p.name for p in tmp_path.iterdir()] == ["augmenter.npz"]
    return path


def test_numbers_of_numpy_are_saved(trained, tmp_path):
    module = trained[0].clone(hidden=np.int64(8), share=np.float32(0.5))
    about = {"mean": MEAN, "sd": SD, "image_shape": SHAPE}
    save_augmenter(tmp_path / "a.npz", module, trained[1], **about)
    images = np.zeros((2, *SHAPE), np.uint8)
    assert load_augmenter(tmp_path / "a.npz")(KEY, images)[0].shape == images.shape


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_loaded_augmenter_does_what_the_saved_one_did(trained, path, dtype):
    module, params = trained
    images = np.random.default_rng(0).integers(0, 256, (6, *SHAPE)).astype(dtype)
    augmented, theta = load_augmenter(path)(KEY, images)
    expected, expected_theta = module.apply({"params": params}, normalize(images, MEAN, SD), KEY)
    np.testing.assert_allclose(theta, expected_theta, atol=1e-6)
    assert augmented.dtype == dtype
    levels = np.asarray(denormalize(expected, MEAN, SD), np.float32)
    assert np.abs(augmented.astype(np.float32) - levels).max() <= (1 if dtype == np.uint8 else 0.51)
    assert np.any(np.abs(theta - np.eye(2, 3)) > 0.01)
    assert augmented.min() >= 0 and augmented.max() <= 255


def test_a_loaded_augmenter_takes_uncertainties(trained, path):
    module, params = trained
    images = np.random.default_rng(0).integers(0, 256, (6, *SHAPE)).astype(np.float32)
    augment, uncertainty = load_augmenter(path), np.linspace(0, 1, 6)
    inputs = normalize(images, MEAN, SD), KEY, np.float32(uncertainty)
    _, theta = augment(KEY, images, uncertainty)
    np.testing.assert_allclose(theta, module.apply({"params": params}, *inputs)[1], atol=1e-6)
    assert np.any(np.abs(theta - augment(KEY, images)[1]) > 1e-5)
    assumed = augment(KEY, images, np.full(6, module.uncertainty))[1]
    np.testing.assert_allclose(augment(KEY, images)[1], assumed, atol=1e-6)
    with pytest.raises(ValueError, match=r"uncertainty must be \[6\], one number an image"):
        augment(KEY, images, uncertainty[:5])
    for wrong, got in ((3.2, "3.2"), (-0.1, "-0.1"), (np.nan, "nan")):  # bits, perhaps
        with pytest.raises(ValueError, match=rf"uncertainty must be within \[0, 1\].* got {got}"):
            augment(KEY, images, np.append(uncertainty[:5], wrong))
    traced = jax.jit(augment)(KEY, images, uncertainty)
    chex.assert_trees_all_equal(traced, augment(KEY, images, uncertainty))


def test_colours_are_kept(tmp_path):
    module = StochasticAugmenter(color=ColorBounds(hue=3.0), share=1.0, start_width=0.9)
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, *SHAPE)), KEY)["params"]
    path, about = tmp_path / "augmenter.npz", {"mean": MEAN, "sd": SD}
    save_augmenter(path, module, params, image_shape=np.array(SHAPE), **about)
    images = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), np.uint8)
    expected, *done = module.apply(
        {"params": params}, normalize(images, MEAN, SD), KEY, method="augment"
    )
    pictures, *changes = load_augmenter(path, with_color=True)(KEY, images)
    pictures, expected = (
        np.asarray(x, np.float32) for x in (pictures, denormalize(expected, MEAN, SD))
    )
    assert np.abs(pictures - expected).max() <= 1
    chex.assert_trees_all_close(changes, done, atol=1e-6)
    np.testing.assert_array_equal(load_augmenter(path)(KEY, images)[0], pictures)
    assert export_augmenter(path, tmp_path / "a.stablehlo")["color_bounds"]["hue"] == 3.0
    program = jax.export.deserialize(bytearray((tmp_path / "a.stablehlo").read_bytes()))
    inputs = KEY, images.astype(np.float32), np.full(6, module.uncertainty, np.float32)
    chex.assert_trees_all_close(
        jax.jit(program.call)(*inputs), load_augmenter(path)(*inputs), atol=1e-3
    )
    with pytest.raises(ValueError, match="color must be None for images of 1"):
        save_augmenter(path, module, params, image_shape=(8, 10, 1), mean=0.5, sd=0.2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mean": MEAN[:2]}, "mean must be"),
        ({"sd": np.ones((3, 1))}, "sd must be"),
        ({"mean": MEAN * np.nan}, "must be finite"),
        ({"sd": SD * 0}, "sd above 0"),
        ({"mean": MEAN * 255, "sd": SD * 255}, r"of images / 255, in \[0, 1\], got"),
        ({"mean": -MEAN}, r"in \[0, 1\], got"),
        ({"mean": None}, "mean must be"),
        ({"image_shape": (8, 10)}, r"image_shape must be \(H, W, C\), .* got \(8, 10\)"),
        ({"image_shape": (2, 8, 10, 3)}, "image_shape must be"),
        ({"module": Augmenter()}, "module must be a StochasticAugmenter, got Augmenter"),
        ({"params": {}}, "params must be the network's own"),
    ],
)
def test_numbers_that_are_not_sound_are_refused(trained, tmp_path, wrong, words):
    about = {"mean": MEAN, "sd": SD, "image_shape": SHAPE}
    given = dict(zip(("module", "params"), trained, strict=True)) | about
    with pytest.raises(ValueError, match=words):
        save_augmenter(tmp_path / "augmenter.npz", **given | wrong)
    assert not list(tmp_path.iterdir())


def test_a_share_of_ones_own(path):
    images = np.random.default_rng(0).integers(0, 256, (200, *SHAPE)).astype(np.float32)

    def transformed(share):
        theta = load_augmenter(path, share=share)(KEY, images)[1]
        return np.any(np.abs(theta - np.eye(2, 3)) > 1e-6, axis=(1, 2)).mean()

    assert transformed(1.0) == transformed(1) == 1.0
    assert transformed(None) == pytest.approx(0.7, abs=0.15)
    assert transformed(0.1) == pytest.approx(0.1, abs=0.1)
    for share in (0.0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0, at most 1, got"):
            load_augmenter(path, share=share)


# As in the README, with what a test gives and checks.
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["maxent_aug"] = None  # importing it would fail
import jax
import numpy as np
from jax import export

with open("augmenter.stablehlo", "rb") as file:
    augment = jax.jit(export.deserialize(bytearray(file.read())).call)
for name in sys.argv[1:]:
    images = np.load(name)
    uncertainty = np.full(len(images), 0.7, "float32")
    augmented, theta = augment(jax.random.key(7), images, uncertainty)
    np.savez("done-" + name, augmented=augmented, theta=theta)
"""


def test_an_exported_augmenter_runs_without_the_package(path):
    folder = path.parent
    export.run([f"--augmenter={path}", f"--to={folder / 'augmenter.stablehlo'}"])
    images = np.random.default_rng(0).uniform(0, 255, (6, *SHAPE)).astype(np.float32)
    counts = 6, 1  # any number of images
    for count in counts:
        np.save(folder / f"{count}.npy", images[:count])
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *(f"{n}.npy" for n in counts)]
    subprocess.run(command, cwd=folder, check=True)
    for count in counts:
        with np.load(folder / f"done-{count}.npy.npz") as done:
            augmented, theta = load_augmenter(path)(KEY, images[:count], np.full(count, 0.7))
            np.testing.assert_allclose(done["theta"], theta, atol=1e-6)
            np.testing.assert_allclose(done["augmented"], augmented, atol=1e-3)
    about = json.loads((folder / "augmenter.json").read_text())
    assert about["inputs"]["images"]["shape"] == ["batch", *SHAPE]
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert np.allclose(about["normalization"]["mean"], MEAN)
    assert about["bounds"]["shear"] == 0.5
    assert about["inputs"]["uncertainty"]["of_images_never_seen"] == 0.3


@pytest.mark.parametrize(
    ("augmenter", "to", "words"),
    [
        ("augmenter.npz", "program.npz", "program.npz must be called NAME.stablehlo"),
        ("augmenter.npz", "no/where/a.stablehlo", "does not exist; create it"),
        ("nowhere.npz", "a.stablehlo", "nowhere.npz: No such file or directory"),
        ("text.npz", "a.stablehlo", "text.npz is not an augmenter's file, or is damaged"),
    ],
)
def test_what_cannot_be_exported_is_named(path, augmenter, to, words, capsys):
    folder = path.parent
    (folder / "text.npz").write_text("not an augmenter")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        export.run([f"--augmenter={folder / augmenter}", f"--to={folder / to}"])
    errors = capsys.readouterr().err
    assert words in errors and errors.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_images_of_another_shape_are_named(path):
    with pytest.raises(ValueError, match=r"\[B, 8, 10, 3\], got uint8 \(2, 8, 8, 3\)"):
        load_augmenter(path)(KEY, np.zeros((2, 8, 8, 3), np.uint8))


def test_images_of_another_range_are_named(path):
    images = np.random.default_rng(0).uniform(0, 1, (2, *SHAPE)).astype(np.float32)
    for wrong in (images, 4 * images - 2):
        with pytest.raises(ValueError, match=r"images must be of 0..255, got"):
            load_augmenter(path)(KEY, wrong)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path):
    path.write_bytes(b"")


def with_text(path):
    path.write_text("not an augmenter")


def changed(path, **arrays):
    with np.load(path) as file:
        np.savez(path, **dict(file) | arrays)


def about(path):
    with np.load(path) as file:
        return json.loads(str(file["about"]))


def pickled(path):
    np.savez(path, about=np.array([{}], object))


def lacking(path):
    with np.load(path) as file:
        kept = dict(file)
    del kept["output_layer/bias"]
    np.savez(path, **kept)


def bomb(path):
    with np.load(path) as file:
        np.savez_compressed(path, **dict(file) | {"mean": np.zeros(10**7, np.float32)})


def beyond_memory(path):
    header = {"shape": (10**15,), "fortran_order": False, "descr": "<f4"}
    with zipfile.ZipFile(path, "a") as file, file.open("more.npy", "w") as part:
        np.lib.format.write_array_header_1_0(part, header)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        bomb,
        beyond_memory,
        emptied,
        with_text,
        pickled,
        lacking,
        lambda path: changed(path, about='{"format": []}'),
        lambda path: changed(path, about="[]"),
        lambda path: changed(path, about="[" * 10**5),
        lambda path: changed(path, about=json.dumps(about(path) | {"hidden": 0})),
        lambda path: changed(path, **{"../../outside": np.zeros(1)}),
        lambda path: changed(path, **{"output_layer/bias": np.zeros(5, np.float32)}),
    ],
)
def test_a_damaged_file_is_named(path, damage):
    damage(path)
    with pytest.raises(ValueError, match=r"augmenter\.npz is not an augmenter's file"):
        load_augmenter(path)
    assert [p.name for p in path.parent.iterdir()] == ["augmenter.npz"]


def test_a_file_of_another_version_is_not_called_damaged(path):
    changed(path, about=json.dumps(about(path) | {"format": 9}))
    with pytest.raises(ValueError, match=r"augmenter\.npz was written by another version .* 9, "):
        load_augmenter(path)


def test_a_file_is_read_without_a_device(path):
    """So that one that is not there is not taken for a damaged file."""
    read = "import sys, maxent_aug; maxent_aug.load_augmenter(sys.argv[1])"
    environment = os.environ | {"JAX_PLATFORMS": "nonsense"}
    subprocess.run([sys.executable, "-c", read, path], env=environment, check=True)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_augmenter(tmp_path / "nowhere.npz")
