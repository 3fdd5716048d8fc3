"""The order modules give INT8 up in, and the sets that are tried, on made-up losses that can be counted out."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from edgeseg.errors import ArtifactError
from edgeseg.mixed.judge import Judged
from edgeseg.mixed.search import by_gain, trials
from edgeseg.store.documents import read_json, write_json


def run(order: list[str], costs: dict[str, float], losses: dict[str, float], allowed: float) -> list[frozenset[str]]:
    """The sets tried, in order; losses of the modules left in INT8 add up."""
    asked: list[frozenset[str]] = []

    def meets(floats: frozenset[str]) -> bool:
        asked.append(floats)
        return sum(loss for name, loss in losses.items() if name not in floats) <= allowed

    yielded = list(trials(order, costs, meets))
    assert yielded == asked
    return asked


def test_order_is_accuracy_for_time() -> None:
    losses = {"a": 0.1, "b": 0.1, "c": 0.01, "d": 0.0}
    assert by_gain(losses, {"a": 4.0, "b": 1.0, "c": 1.0, "d": 1.0}, "abcd") == ("b", "a", "c", "d")
    # Where INT8 saves nothing, the module that loses most goes first; one that was not judged goes last.
    assert by_gain({"a": 0.1, "b": 0.2}, {"a": 0.0, "b": -1.0, "c": 9.0}, "abc") == ("b", "a", "c")
    assert by_gain(losses, {}, "abcd") == ("a", "b", "c", "d")


@pytest.mark.parametrize("seed", range(20))
def test_what_comes_last_meets_the_goal_with_no_module_too_many(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"m{k}" for k in range(rng.randint(2, 7))]
    losses = {name: rng.choice([0.0, 0.01, 0.1, 0.3]) * rng.random() for name in names}
    costs = {name: rng.random() for name in names}
    allowed = rng.random() * sum(losses.values())
    order = list(by_gain(losses, costs, names))
    asked = run(order, costs, losses, allowed)
    assert len(set(asked)) == len(asked), "a set was judged twice"
    met = [s for s in asked if sum(losses[n] for n in names if n not in s) <= allowed]
    everything = frozenset(names)
    best = min([*met, everything], key=lambda s: sum(costs[n] for n in s))
    # No module of it can be taken back.
    for name in best:
        left = sum(losses[n] for n in names if n not in best - {name})
        assert left > allowed or best - {name} in met or (best == everything and len(names) == 1)
    # Never far from the best there is, counted out.
    every = (frozenset(c) for k in range(len(names) + 1) for c in itertools.combinations(names, k))
    least = min(sum(costs[n] for n in s) for s in every if sum(losses[n] for n in names if n not in s) <= allowed)
    assert sum(costs[n] for n in best) <= least + max(costs.values()) + 1e-9


def test_one_module_that_loses_everything_is_found_at_once() -> None:
    names = [f"m{k}" for k in range(30)]
    losses = dict.fromkeys(names, 0.0001) | {"m17": 0.5}
    costs = dict.fromkeys(names, 1.0)
    asked = run(list(by_gain(losses, costs, names)), costs, losses, 0.01)
    assert asked == [frozenset({"m17"})]


def test_when_all_are_needed_no_set_is_missed() -> None:
    names = list("abcdef")
    losses = dict.fromkeys(names, 1.0)
    asked = run(names, dict.fromkeys(names, 1.0), losses, 0.0)
    assert frozenset(names) not in asked
    assert all(frozenset(names) - {name} in asked for name in names)


@pytest.mark.parametrize(
    ("reference", "session"), [([[9, 1, 1, 1]], [[0, 1, 1, 1]]), ([[0, 1, 1, 1]], None), ([[-1, 1, 1, 1]], [])]
)
def test_a_judgement_that_cannot_be_is_refused(reference: object, session: object, tmp_path: Path) -> None:
    image = {"agreement": 1.0, "reference": reference, "session": session}
    write_json(tmp_path / "judged.json", {"classes": 4, "images": [image]})
    with pytest.raises(ArtifactError, match="not that of an image of 4 classes"):
        read_json(tmp_path / "judged.json", Judged, "judgement")
