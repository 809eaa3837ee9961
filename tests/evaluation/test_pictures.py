"""Pictures are drawn without a warning for few and many classes, odd names and single draws."""

import warnings

import numpy as np
import pytest

from ftjax.evaluation import labelled, pictures
from ftjax.verdict import curve
from ftjax.verdict.pictures import curves


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def report(C, names=None, N=200):
    rng = np.random.default_rng(0)
    y = rng.integers(C, size=N)
    p = rng.random((N, C)) + 2 * np.eye(C)[y]
    return labelled.report("single_label", y, p / p.sum(1, keepdims=True), names=names, draws=5)


def pixels(path):
    from matplotlib.image import imread

    image = imread(path)[..., :3]
    assert image.shape[0] > 400 and image.shape[1] > 400 and image.std() > 0.02
    return image


@pytest.mark.parametrize(
    "C, names", [(2, ["$5 or less", "é" * 60]), (19, None), (100, [f"class {i}" for i in range(100)])]
)
def test_confusion_is_drawn(tmp_path, C, names):
    pixels(pictures.confusion_picture(report(C, names), tmp_path / "confusion.png"))


def test_the_diagonal_is_dark_where_all_is_right(tmp_path):
    y = np.arange(30) % 3
    right = labelled.report("single_label", y, np.eye(3)[y], draws=5)
    wrong = labelled.report("single_label", y, np.eye(3)[(y + 1) % 3], draws=5)
    images = [pixels(pictures.confusion_picture(r, tmp_path / f"{i}.png")) for i, r in enumerate((right, wrong))]
    assert images[0].shape == images[1].shape
    dark = [(image[..., 0] < 0.1) & (image[..., 2] > 0.3) for image in images]
    rows, columns = np.nonzero(dark[0] & ~dark[1])
    assert np.corrcoef(rows, columns)[0, 1] > 0.8
    rows, columns = np.nonzero(dark[1] & ~dark[0])
    assert np.corrcoef(rows, columns)[0, 1] < 0.5


def test_reliability_is_drawn(tmp_path):
    pixels(pictures.reliability_picture(report(3), tmp_path / "reliability.png"))
    one = labelled.report("single_label", np.array([0]), np.array([[1.0, 0.0]]), draws=2)
    pixels(pictures.reliability_picture(one, tmp_path / "one.png"))


def test_no_place_is_searched_for_a_legend(tmp_path, monkeypatch):
    def searched(*_):
        raise AssertionError("matplotlib warns where this takes more than a second")

    monkeypatch.setattr("matplotlib.legend.Legend._find_best_position", searched)
    pictures.reliability_picture(report(3), tmp_path / "reliability.png")
    pictures.plot_losses([{"step": i, "loss": 1.0, "val_loss": 1.0} for i in range(3)], tmp_path / "loss.png")


def test_learning_curves_are_drawn(tmp_path):
    few = {k: [0.5 + 0.01 * k, 0.52 + 0.01 * k] for k in (1, 4, 16, 32)}
    steps = {k: [k / 3000] for k in range(0, 2000, 100)}
    for name, points in {"few": {"full $1": few, "lora": {8: [0.6]}}, "steps": {"full": steps}}.items():
        told = {label: curve.drawn(one) for label, one in points.items()}
        pixels(curves(told, tmp_path / f"{name}.png", list(told), x_label="rows", y_label="accuracy"))
