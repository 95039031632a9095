"""Similarity of outputs to the ground truth, and two reference scores for every net: the floor (a
constant image) and the ceiling (the rank-128 affine map that fits the training images best)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """outputs, targets: (N, ...). Returns (N,), the cosine similarity of each pair in [-1, 1].

    An all-black or non-finite image gets 0, so that it counts as wrong at any threshold.
    """
    similarity = F.cosine_similarity(outputs.flatten(1).float(), targets.flatten(1).float())
    return similarity.nan_to_num(0.0, 0.0, 0.0)


def accuracy(outputs: Tensor, targets: Tensor, threshold: float) -> float:
    """The share of images with a cosine similarity >= threshold (the report: 0.95)."""
    return (cosine(outputs, targets) >= threshold).double().mean().item()


def score(outputs: Tensor, targets: Tensor) -> dict[str, float | None]:
    """outputs, targets: (N, 1, 28, 28) in [0, 1]. Returns the metrics of `metrics.json`: mse and
    psnr (dB, peak 1, over all pixels; None where there is no error), the accuracies, the lowest
    cosine and the largest error of a pixel."""
    mse = F.mse_loss(outputs.double(), targets.double()).item()
    return {
        "mse": mse,
        "psnr": None if mse == 0 else -10 * math.log10(mse),
        "accuracy_0.95": accuracy(outputs, targets, 0.95),
        "accuracy_0.99": accuracy(outputs, targets, 0.99),
        "min_cosine": cosine(outputs, targets).min().item(),
        "max_abs_error": (outputs - targets).abs().max().item(),
    }


def principal_directions(targets: Tensor, rank: int = 128) -> tuple[Tensor, Tensor]:
    """targets: (N, 1, 28, 28). Returns their mean (784,) and the `rank` eigenvectors of their
    covariance with the largest eigenvalues (PCA), (784, rank). float64, as float32 is too inexact
    for the smallest ones."""
    flat = targets.flatten(1)
    mean = flat.mean(dim=0, dtype=torch.float64)
    centred = flat - mean.float()
    covariance = (centred.T @ centred).double() / len(flat)
    return mean, torch.linalg.eigh(covariance).eigenvectors[:, -rank:]


def floor(train_targets: Tensor, test_targets: Tensor) -> dict[str, float | None]:
    """The score of a constant gray image with the mean brightness of the training targets."""
    return score(train_targets.mean().expand_as(test_targets), test_targets)


def ceiling(train_targets: Tensor, test_targets: Tensor) -> dict[str, float | None]:
    """The score of the affine map of rank 128 (the width of the FC net's middle layer) with the
    least squared error on the training images: the test targets projected on the principal
    directions of the training targets. Another map may score a little better on the test images."""
    mean, directions = principal_directions(train_targets)
    centred = test_targets.flatten(1) - mean
    projected = mean + centred @ directions @ directions.T
    return score(projected.view_as(test_targets), test_targets)
