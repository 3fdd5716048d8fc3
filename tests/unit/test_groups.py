"""Groups that are joined, against the components that a search over the same pairs finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeseg.graph.groups import Groups

PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=15)


def reached(start: int, pairs: list[tuple[int, int]]) -> set[int]:
    """All that is connected with ``start``."""
    found, ahead = {start}, [start]
    while ahead:
        item = ahead.pop()
        near = {b for a, b in pairs if a == item} | {a for a, b in pairs if b == item}
        ahead += near - found
        found |= near
    return found


@given(PAIRS)
def test_groups_are_what_is_connected(pairs: list[tuple[int, int]]) -> None:
    groups = Groups[int]()
    for item, to in pairs:
        root = groups.root(to)
        groups.join(item, to)
        assert groups.root(item) == groups.root(to) == root
    for item in range(10):
        assert sorted(groups.members(item)) == sorted(reached(item, pairs))
