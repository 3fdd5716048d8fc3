"""``--option=VALUE`` in shells that complete: click proposes the value, and each shell takes the word for another."""

from __future__ import annotations

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)


@add_completion_class
class Bash(BashComplete):
    """To bash ``=`` is a word."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        return [word for word in args if word != "="], incomplete


class _WholeWords(ShellComplete):
    """What is proposed takes the place of the whole word, ``--option=`` included."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        option, equals, _ = incomplete.partition("=")
        before = option + equals if equals and option.startswith("-") else ""
        items = super().get_completions(args, incomplete)
        return [CompletionItem(before + item.value, item.type, item.help) for item in items]


@add_completion_class
class Zsh(_WholeWords, ZshComplete):
    """Replaces the word with what is proposed."""


@add_completion_class
class Fish(_WholeWords, FishComplete):
    """Proposes nothing that does not begin as the word does."""

    def format_completion(self, item: CompletionItem[str]) -> str:
        # To click's script what is said of an item ends at its first comma.
        return super().format_completion(
            CompletionItem(item.value, item.type, item.help and item.help.replace(",", ";"))
        )
