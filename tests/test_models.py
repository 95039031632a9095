"""The FC net's shape and its closed form."""

import torch
from torch import nn

from common import metrics
from common.data import synthetic, to_float
from common.models import FullyConnected, closed_form_
from common.transforms import reference_transform


def test_fully_connected_layers_match_the_report():
    model = FullyConnected()
    kinds = [type(layer) for layer in model.layers]
    assert kinds == [nn.Flatten, nn.Linear, nn.Linear, nn.Sigmoid]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {
        "layers.1.weight": (128, 3072), "layers.1.bias": (128,),
        "layers.2.weight": (784, 128), "layers.2.bias": (784,),
    }  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    assert model(images).shape == (2, 1, 28, 28)
    assert torch.equal(model(images).flatten(1), model.layers(images))


def test_closed_form_reaches_the_ceiling_within_a_factor():
    images = synthetic(1500, seed=0)
    targets = reference_transform(images)
    model = FullyConnected()
    closed_form_(model, images[:1000], targets[:1000])
    with torch.inference_mode():
        outputs = model(to_float(images[1000:]))
    score = metrics.score(outputs, targets[1000:])
    ceiling = metrics.ceiling(targets[:1000], targets[1000:])
    assert score["mse"] < 2 * ceiling["mse"]
    assert score["accuracy_0.95"] >= ceiling["accuracy_0.95"] - 0.02
