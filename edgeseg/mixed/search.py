"""Which modules give INT8 up: the search itself, which knows of engines only what it is told.

Modules stand in the order of accuracy gained for a millisecond given up. The shortest stretch of that order that meets the
goal is found by doubling and halving; then modules are taken back one by one, the most expensive first, where the goal is met
without them too. What the engines really take is measured by the caller: times of modules do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

MAX_TAKEN_BACK = 8
"""Modules tried to be taken back; each costs a build and a judgement."""

LEAST_COST = 0.005
"""Share of what all modules save that a module costs at least: a measured saving of nothing, or less, is noise."""

FloatModules = frozenset[str]
Meets = Callable[[FloatModules], bool]


def by_gain(losses: Mapping[str, float], costs: Mapping[str, float], names: Sequence[str]) -> tuple[str, ...]:
    """``names``, most accuracy for the least cost first.

    Args:
        losses: of accuracy, by module; a module that was not judged comes last.
        costs: of leaving INT8, by module, milliseconds or multiply-accumulates.
        names: in the network's order, which decides between equals.
    """
    least = LEAST_COST * sum(max(cost, 0.0) for cost in costs.values()) or 1.0

    def rank(name: str) -> float:
        return max(losses[name], 0.0) / max(costs.get(name, 0.0), least) if name in losses else -1.0

    return tuple(sorted(names, key=lambda name: -rank(name)))


def trials(order: Sequence[str], costs: Mapping[str, float], meets: Meets) -> Iterator[FloatModules]:
    """Judge one set of float modules after the other, and yield each after it was judged.

    The caller may stop at any time; ``meets`` is asked once for each set. All modules in float are not among them.
    """
    known: dict[FloatModules, bool] = {}

    def judged(count: int) -> bool:
        return known[frozenset(order[:count])]

    def ask(floats: FloatModules) -> Iterator[FloatModules]:
        if floats not in known:
            known[floats] = meets(floats)
            yield floats

    # 0 modules were judged before the search began, all of them are the float engine, which meets the goal.
    low, high, step = 0, len(order), 1
    while low + step < len(order):
        yield from ask(frozenset(order[: low + step]))
        if judged(low + step):
            high = low + step
            break
        low, step = low + step, step * 2
    while high - low > 1:
        middle = (low + high) // 2
        yield from ask(frozenset(order[:middle]))
        low, high = (low, middle) if judged(middle) else (middle, high)
    best = frozenset(order[:high])
    for name in sorted(best, key=lambda name: -costs.get(name, 0.0))[:MAX_TAKEN_BACK]:
        smaller = best - {name}
        if not smaller:
            return
        yield from ask(smaller)
        best = smaller if known[smaller] else best
