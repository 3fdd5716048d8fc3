"""The metadata of a model card: the YAML at the head of a ``README.md`` beside the weights, read as data of a few known kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeseg.convert.architectures import import_for_conversion

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 18
# What says where a model is from and what may be done with it; the rest of a card is for the hub's pages.
KEPT = (
    *("license", "license_name", "license_link", "library_name", "pipeline_tag", "language", "languages"),
    *("base_model", "datasets", "metrics", "tags", "model_name"),
)
_MOST_ITEMS, _MOST_CHARACTERS = 64, 300


def read_card(folder: Path) -> dict[str, Any]:
    """Known metadata of the card in ``folder``: words, or lists of words. Empty where there is none that can be read.

    A card is written by people for people: what is damaged is left out, and stops nothing.
    """
    path = folder / CARD_NAME
    try:
        if not path.is_file():
            return {}
        with path.open("rb") as f:
            text = f.read(MAX_CARD_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return {}
    if not text.startswith("---\n") or "\n---" not in text[3:]:
        return {}
    yaml = import_for_conversion("yaml")
    head = text[4 : text.index("\n---", 3) + 1]
    try:
        # Aliases make a few lines mean gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(head, Loader=yaml.SafeLoader)):
            return {}
        content = yaml.safe_load(head)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: kept for key in KEPT if (kept := _words(content.get(key)))}


def _words(value: object) -> str | list[str] | None:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return " ".join(str(value).split())[:_MOST_CHARACTERS]
    if isinstance(value, list):
        words = [w for item in value[:_MOST_ITEMS] if isinstance(item, str) and isinstance(w := _words(item), str)]
        return words or None
    return None
