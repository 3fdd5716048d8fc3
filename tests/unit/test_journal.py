"""What is kept of unfinished work: damaged strips are made anew, and nothing of a user's goes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from fuzz_readers import mutated

from edgeseg.errors import InputError
from edgeseg.runtime.journal import Journal

PLANE = np.arange(600, dtype=np.uint8).reshape(20, 30) // 7


def test_a_damaged_strip_is_made_anew(tmp_path: Path) -> None:
    journal, chance = Journal(tmp_path / "j", "a"), random.Random(0)
    journal.keep(0, 0, {"mask-1": PLANE})
    path = tmp_path / "j" / "0-0.zip"
    whole, damaged = path.read_bytes(), 0
    for _ in range(300):
        path.write_bytes(mutated(whole, chance))
        try:
            journal.plane(0, 0, "mask-1")
        except InputError as exc:
            assert "the same command makes it anew" in str(exc)
            assert not journal.has(0, 0)
            damaged += 1
    assert damaged > 100


def test_a_folder_of_a_user_is_not_removed(tmp_path: Path) -> None:
    mine = tmp_path / "j" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InputError, match=r"mine\.txt is not edgeseg's"):
        Journal(tmp_path / "j", "a")
    assert mine.read_text() == "mine"
