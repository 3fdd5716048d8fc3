"""The ``edgeseg build`` command that makes an engine again, for manifests and reports."""

from __future__ import annotations

from edgeseg.arguments import words_of
from edgeseg.errors import typed
from edgeseg.pipeline.request import BuildRequest


def build_command(request: BuildRequest) -> str | None:
    """What to type for this request; ``None`` where no command line can say it (images or a table given as objects).

    Only what differs from the defaults is named, so the command stays readable and means the same in later versions.
    """
    words = words_of(request)
    return None if words is None else typed("build", *words)
