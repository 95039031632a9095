"""Random numbers of torch's generator as a loop over images draws them: by one call of torch for
each number, or for a batch many by one call."""

from functools import lru_cache

import torch
from torch import Tensor

from ._layout import fork_safe_lock, modes
from .bands import CPU
from .step import Step

_lock = fork_safe_lock()  # two threads that transform images must not draw the same numbers


def draw_each(steps: list[tuple[Step, int, int]], items: int) -> list[list]:
    """For each step the parameters of each item. steps: the steps, and the height and width of the
    images that they see."""
    # of another default dtype torch draws otherwise
    few = items < 4 or torch.get_default_dtype() != torch.float32
    if few or modes() or not _agree():
        with _lock:
            return _draw_each(steps, items, Numbers())
    with _lock:
        numbers = ManyNumbers(6 * items)
        try:
            return _draw_each(steps, items, numbers)
        finally:
            torch.empty(numbers.used, device=CPU).uniform_()  # moves the generator past them


def _draw_each(steps, items: int, numbers: "Numbers | ManyNumbers") -> list[list]:
    params = [[] for _ in steps]
    for _ in range(items):
        for (step, height, width), drawn in zip(steps, params, strict=True):
            try:
                drawn.append(step.draw(numbers, height, width))
            except ValueError as error:
                raise ValueError(f"{step.name}: {error}") from None
    return params


class Numbers:
    """As torchvision draws them."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high, generator=self.generator).item()

    def exp_uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high, generator=self.generator).exp_().item()

    def below(self, n: int) -> int:
        """0 to n - 1, n < 2**28."""
        return torch.empty(1, dtype=torch.int64).random_(n, generator=self.generator).item()


class ManyNumbers:
    """The same numbers, from the current state of torch's CPU generator on, which stays as it is.
    Each number takes the next 32 bits, whatever its kind, so each kind has a table of what it makes
    of every 32 bits."""

    def __init__(self, count: int, generator: torch.Generator | None = None) -> None:
        """count: how many will do, probably."""
        self.state = (generator or torch.default_generator).get_state()
        self.count, self.used = count, 0
        self.tables: dict[tuple, list] = {}

    def uniform(self, low: float, high: float) -> float:
        return self._next((low, high))

    def exp_uniform(self, low: float, high: float) -> float:
        return self._next((low, high, "exp"))

    def below(self, n: int) -> int:
        return self._next(()) % n

    def _next(self, kind: tuple):
        place = self.used
        self.used = place + 1
        try:
            return self.tables[kind][place]
        except LookupError:
            self.count = max(self.count, 2 * place)
            table = self.tables[kind] = self._table(*kind).tolist()
            return table[place]

    def _table(self, low=None, high=None, exp=None) -> Tensor:
        generator = torch.Generator(CPU)
        generator.set_state(self.state)
        if low is None:  # 64 bits at a time, the high ones first
            pairs = torch.empty(self.count // 2 + 1, dtype=torch.int64, device=CPU)
            pairs.random_(-(2**63), None, generator=generator)
            return torch.stack([pairs >> 32, pairs], 1).bitwise_and_(2**32 - 1).flatten()
        table = torch.empty(self.count + 1, device=CPU).uniform_(low, high, generator=generator)
        return table.exp_() if exp else table


@lru_cache
def _agree() -> bool:
    """Whether both ways give the same numbers in this build of torch."""

    def some(numbers) -> list:
        calls = (numbers.uniform, 0.08, 1), (numbers.exp_uniform, -0.3, 0.3), (numbers.below, 99)
        return [call(*arguments) for _ in range(60) for call, *arguments in calls]

    with torch.inference_mode(False):
        generator = torch.Generator(CPU).manual_seed(0)
        many = some(ManyNumbers(16, generator))
        return many == some(Numbers(generator))
