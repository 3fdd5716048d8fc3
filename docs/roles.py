"""Hook of the site: a docstring's :class:`Engine` reads as the name alone, as Sphinx would show it."""

from __future__ import annotations

import re


def on_page_content(html: str, page: object, config: object, files: object) -> str:
    """Drop the role in front of a name, and the modules within the name."""
    return re.sub(r":[a-z]+:<code>~?(?:edgeseg\.(?:[a-z_]+\.)+)?", "<code>", html)
