"""The scores against numpy, and their edge cases."""

import numpy as np
import pytest
import torch

from common import metrics


def pair(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 1, 28, 28, generator=generator) for _ in range(2))


def test_score_against_numpy():
    outputs, targets = pair()
    a, b = (x.flatten(1).double().numpy() for x in (outputs, targets))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    score = metrics.score(outputs, targets)
    mse = ((a - b) ** 2).mean()
    assert score["mse"] == pytest.approx(mse)
    assert score["psnr"] == pytest.approx(10 * np.log10(1 / mse))
    assert score["min_cosine"] == pytest.approx(cosine.min(), abs=1e-6)
    threshold = float(np.median(cosine))
    assert metrics.accuracy(outputs, targets, threshold + 1e-6) == 0.5


def test_psnr_of_an_exact_output_is_none():
    _, targets = pair()
    score = metrics.score(targets, targets)
    assert score["psnr"] is None
    assert score["accuracy_0.99"] == 1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_black_and_non_finite_images_count_as_wrong(value):
    outputs, targets = pair(10)
    outputs = targets.clone()
    outputs[3] = value
    assert metrics.accuracy(outputs, targets, 0.95) == 0.9
    assert metrics.accuracy(targets, outputs, 0.95) == 0.9
    assert metrics.score(outputs, targets)["psnr"] is not None  # None: an exact output


def test_floor_is_the_score_of_one_gray_image():
    train, test = pair()
    gray = torch.full_like(test, train.mean().item())
    assert metrics.floor(train, test) == pytest.approx(metrics.score(gray, test), abs=1e-5)


def test_ceiling_error_is_that_of_the_best_rank_128_map():
    generator = torch.Generator().manual_seed(0)
    basis = torch.rand(20, 784, generator=generator)
    low = (torch.rand(900, 20, generator=generator) @ basis / 20).view(-1, 1, 28, 28)
    assert metrics.ceiling(low[:600], low[600:])["mse"] < 1e-10
    full = torch.rand(900, 1, 28, 28, generator=generator)
    ceiling = metrics.ceiling(full, full)["mse"]
    # Eckart-Young: the error is the sum of squares of the singular values beyond the 128th
    centred = (full - full.mean(0)).flatten(1).double()
    expected = torch.linalg.svdvals(centred)[128:].square().sum() / full.numel()
    assert ceiling == pytest.approx(expected.item(), rel=1e-4)
