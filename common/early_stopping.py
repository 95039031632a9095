"""The report's early stopping (its section 1.3), both rules."""

import math
from collections.abc import Mapping


class EarlyStopping:
    """Decides after each epoch, from its validation loss, whether training ends.

    rule "patience": stop when within the last `patience` epochs no loss was lower than the best
    before them by more than `min_delta`. rule "window": stop when the loss of `patience` epochs
    ago minus the largest loss since is below `min_delta`. Neither stops in the first `patience`
    epochs. `best_epoch` (from 1) and `best_loss` are those of the true minimum, whatever the rule.

    Keras and PyTorch Lightning compare each loss with the last one that counted as a gain, and the
    report's rule with the true minimum of the epochs before the last `patience`. With patience 2
    and min_delta 1, the losses 5, 4.4, 3.9, 3.5 stop here, as 3.5 is not lower than 4.4 by more
    than 1; Keras continues, as it counts 3.9 as a gain over 5 and has waited one epoch since.
    """

    def __init__(self, patience: int = 10, min_delta: float = 1e-6, rule: str = "patience") -> None:
        if (
            not isinstance(patience, int)
            or patience < 1
            or not min_delta >= 0
            or rule not in ("patience", "window")
        ):
            raise ValueError(
                "patience must be an integer >= 1, min_delta >= 0, rule 'patience' or 'window', "
                f"not {patience}, {min_delta}, {rule!r}"
            )
        self.patience, self.min_delta, self.rule = patience, min_delta, rule
        self.epoch = self.best_epoch = 0
        self.best_loss = math.inf
        self.recent: list[float] = []  # the losses of the last `patience` epochs
        self.reference = math.inf  # "patience": the best loss before `recent`; "window": the last

    def step(self, loss: float) -> bool:
        """loss: the validation loss of one epoch. Returns whether to stop. Raises ValueError if the
        loss is not finite."""
        loss = float(loss)
        if not math.isfinite(loss):
            raise ValueError(f"the validation loss of epoch {self.epoch + 1} is {loss}")
        self.epoch += 1
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
        self.recent.append(loss)
        if len(self.recent) <= self.patience:
            return False
        oldest = self.recent.pop(0)
        if self.rule == "window":
            self.reference = oldest
            return self.reference - max(self.recent) < self.min_delta
        self.reference = min(self.reference, oldest)
        return self.reference - min(self.recent) <= self.min_delta

    def state_dict(self) -> dict:
        """The complete state, including the settings, as plain types."""
        return {**vars(self), "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping) -> None:
        """Restores the state that `state_dict` returned."""
        vars(self).update({**state, "recent": list(state["recent"])})
