"""Loss series with the exact epoch at which each rule stops."""

import math

import pytest

from common.early_stopping import EarlyStopping


def stop_epoch(losses, **settings):
    """The epoch, from 1, at which training stops; None if it does not."""
    stopping = EarlyStopping(**settings)
    return next((i for i, loss in enumerate(losses, 1) if stopping.step(loss)), None)


@pytest.mark.parametrize("rule", ["patience", "window"])
@pytest.mark.parametrize("patience", [1, 3, 10])
def test_constant_loss_stops_after_1_plus_patience_epochs(rule, patience):
    assert stop_epoch([1.0] * 50, patience=patience, rule=rule) == patience + 1


@pytest.mark.parametrize("rule", ["patience", "window"])
def test_decreasing_loss_never_stops(rule):
    assert stop_epoch([1 - i / 100 for i in range(90)], rule=rule) is None


def test_increasing_loss_stops_both_rules():
    rise = [1 + i / 100 for i in range(50)]
    assert stop_epoch(rise, rule="patience") == 11
    assert stop_epoch(rise, rule="window") == 11


# multiples of 0.25 are exact in binary, so the comparison at equality is exact
@pytest.mark.parametrize(
    ("last", "expected"),
    [(0.75, 4), (0.7499, None), (0.7501, 4), (1.0, 4)],
)
def test_patience_rule_needs_a_gain_above_min_delta(last, expected):
    losses = [1.0, 1.0, 1.0, last]
    assert stop_epoch(losses, patience=3, min_delta=0.25) == expected


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(0.75, None), (0.7499, None), (0.7501, 4), (1.0, 4)],
)
def test_window_rule_accepts_a_gain_equal_to_min_delta(largest, expected):
    losses = [1.0, 0.5, largest, 0.5]
    assert stop_epoch(losses, patience=3, min_delta=0.25, rule="window") == expected


def test_rules_differ_on_a_spike():
    # the fifth loss is a spike in a falling series: only "window" looks at the largest loss
    losses = [1.0, 0.9, 0.8, 0.7, 2.0, 0.5, 0.4, 0.3]
    assert stop_epoch(losses, patience=3, rule="window") == 5
    assert stop_epoch(losses, patience=3, rule="patience") is None


def test_small_gains_add_up_over_the_patience_window():
    # each epoch gains less than min_delta, three epochs together more
    losses = [1 - 0.1 * i for i in range(10)]
    assert stop_epoch(losses, patience=3, min_delta=0.25) is None
    assert stop_epoch(losses, patience=2, min_delta=0.25) == 3


def test_patience_one():
    losses = [1.0, 0.9, 0.8, 0.8, 0.7]
    assert stop_epoch(losses, patience=1) == 4
    assert stop_epoch(losses, patience=1, rule="window") == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", ["patience", "window"])
def test_non_finite_loss_raises_and_keeps_the_state(bad, rule):
    stopping = EarlyStopping(patience=2, rule=rule)
    stopping.step(1.0)
    before = stopping.state_dict()
    with pytest.raises(ValueError, match="epoch 2"):
        stopping.step(bad)
    assert stopping.state_dict() == before


def test_best_epoch_ignores_min_delta():
    stopping = EarlyStopping(patience=5, min_delta=0.5)
    for loss in [1.0, 0.9, 0.95, 0.9]:
        assert not stopping.step(loss)
    assert (stopping.best_epoch, stopping.best_loss) == (2, 0.9)


@pytest.mark.parametrize("rule", ["patience", "window"])
@pytest.mark.parametrize("cut", range(1, 12))
def test_restored_state_stops_at_the_same_epoch(rule, cut):
    losses = [1.0, 0.6, 0.7, 0.5, 0.8, 0.55, 0.52, 0.51, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5]
    settings = {"patience": 4, "rule": rule}
    whole, first = EarlyStopping(**settings), EarlyStopping(**settings)
    expected = [whole.step(loss) for loss in losses]
    actual = [first.step(loss) for loss in losses[:cut]]
    second = EarlyStopping()
    second.load_state_dict(first.state_dict())
    first.step(0.1)  # later steps of the first must not change the second
    actual += [second.step(loss) for loss in losses[cut:]]
    assert actual == expected
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("settings", [{"patience": 0}, {"min_delta": -1}, {"rule": "other"}])
def test_invalid_settings_raise_value_error(settings):
    with pytest.raises(ValueError, match="patience must be"):
        EarlyStopping(**settings)
