"""Items that belong together, found by joining two at a time (union-find)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Groups(Generic[Item]):
    """Every item is a group of its own until it is joined to another's."""

    def __init__(self) -> None:
        self._above: dict[Item, Item] = {}

    def root(self, item: Item) -> Item:
        """The one item that stands for all of a group."""
        root = item
        while (above := self._above.get(root, root)) != root:
            root = above
        if root != item:
            self._above[item] = root  # a shorter way the next time
        return root

    def join(self, item: Item, to: Item) -> None:
        """Let the groups of both be one, whose root is that of ``to``."""
        self._above[self.root(item)] = self.root(to)

    def members(self, item: Item) -> list[Item]:
        """All of a group."""
        root = self.root(item)
        return [other for other in [*{**self._above, root: root}] if self.root(other) == root]
