"""The language of ``--require``: ``p99_ms <= 33 and (miou >= 0.68 or agreement >= 0.99)``.

Comparisons of a metric with a number, ``and``, ``or``, parentheses; nothing is executed. Many-valued (Kleene): what was
not measured, or lies so near its limit that another run could say the opposite, is neither met nor missed, and never
passes.

    expression := term ("or" term)*
    term       := factor ("and" factor)*
    factor     := "(" expression ")" | operand (("<=" | "<" | ">=" | ">" | "==" | "!=") operand)+
    operand    := metric | number
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeAlias

from edgeseg.decide.entries import Entry
from edgeseg.decide.metrics import METRICS, Metric, listed, why_missing
from edgeseg.errors import SpecError, did_you_mean

Status: TypeAlias = Literal["pass", "fail", "cannot tell", "not measured"]

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_MIRRORED = {"<=": ">=", "<": ">", ">=": "<=", ">": "<", "==": "==", "!=": "!="}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))|(?P<word>[^\W\d]\w*)"
    r"|(?P<symbol><=|>=|==|!=|<|>|\(|\)))"
)
_EXAMPLE = "such as 'p99_ms<=33 and miou>=0.68'"
MAX_LENGTH = 2000
MAX_DEPTH = 50


@dataclass(frozen=True)
class Comparison:
    """``metric op limit``, whichever way round it was written."""

    metric: Metric
    op: str
    limit: float

    @property
    def text(self) -> str:
        return f"{self.metric.name} {self.op} {self.limit:g}"


@dataclass(frozen=True)
class Junction:
    """``and`` or ``or`` of two parts or more."""

    kind: Literal["and", "or"]
    parts: tuple[Node, ...]


Node: TypeAlias = "Comparison | Junction"


@dataclass(frozen=True)
class Check:
    """One comparison for one row.

    Attributes:
        comparison: what was asked.
        value: what was measured.
        status: whether it holds; ``cannot tell`` when the noise of the measurement holds the limit, so that another run
            could say the opposite.
        is_close: a 95 % interval of the figure holds the limit: that of its noise, or, for accuracy, the one over
            images, when other images could say the opposite.
        noise: the interval another run could fall in, where it is known.
        missing: why it was not measured, where that is known.
    """

    comparison: Comparison
    value: float | None
    status: Status
    is_close: bool = False
    noise: tuple[float, float] | None = None
    missing: str | None = None

    @property
    def margin(self) -> float | None:
        """How far the figure is from the limit, always positive; ``None`` when it was not measured."""
        return None if self.value is None else abs(self.value - self.comparison.limit)

    @property
    def text(self) -> str:
        """``p99_ms 41.20 ms, limit <= 33: 8.20 ms (25 %) too much``."""
        metric, op, limit = self.comparison.metric, self.comparison.op, self.comparison.limit
        if self.value is None or self.margin is None:
            why = f" ({self.missing})" if self.missing is not None else ""
            return f"{metric.name} not measured{why}, limit {op} {limit:g}"
        what = f"{metric.name} {metric.with_unit(self.value)}, limit {op} {limit:g}"
        if self.status == "cannot tell" and self.noise is not None:
            low, high = (metric.text(bound) for bound in self.noise)
            return f"{what}: cannot tell, another run could give {low} to {high}"
        close = "; the interval holds the limit" if self.is_close else ""
        if self.status == "pass" or op in {"==", "!="}:
            return what + (": met" if self.status == "pass" else ": missed") + close
        share = f" ({self.margin / abs(limit):.0%})" if limit else ""
        # A miss smaller than the digits shown would read as "0.00 too much".
        distance = metric.with_unit(self.margin) if float(metric.text(self.margin)) else f"{self.margin:.2g}"
        return f"{what}: {distance}{share} too {'much' if op in {'<', '<='} else 'little'}{close}"


@dataclass(frozen=True)
class Outcome:
    """A requirement for one row: the whole, and each comparison in the order written."""

    status: Status
    checks: tuple[Check, ...]

    @property
    def missed(self) -> tuple[Check, ...]:
        """The comparisons that are not met, not measured, or too near to tell."""
        return tuple(check for check in self.checks if check.status != "pass")


@dataclass(frozen=True)
class Requirement:
    """A parsed requirement; :attr:`text` is what the user wrote."""

    text: str
    root: Node

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Parse a requirement.

        Raises:
            SpecError: no requirement; names the place, or the metrics there are.
        """
        if len(text) > MAX_LENGTH:
            raise SpecError(f"the requirement has {len(text)} characters; at most {MAX_LENGTH} are allowed")
        return cls(text.strip(), _Parser(text).parse())

    def evaluate(self, entry: Entry) -> Outcome:
        """Judge one row."""
        checks: list[Check] = []
        status = _judge(self.root, entry, checks)
        return Outcome(status, tuple(checks))


def comparisons(node: Node) -> tuple[Comparison, ...]:
    """All comparisons of an expression, in the order written."""
    if isinstance(node, Comparison):
        return (node,)
    return tuple(comparison for part in node.parts for comparison in comparisons(part))


def _judge(node: Node, entry: Entry, checks: list[Check]) -> Status:
    if isinstance(node, Comparison):
        check = _check(node, entry)
        checks.append(check)
        return check.status
    statuses = [_judge(part, entry, checks) for part in node.parts]
    deciding: Status = "fail" if node.kind == "and" else "pass"
    if deciding in statuses:
        return deciding
    return next((status for status in ("not measured", "cannot tell") if status in statuses), statuses[0])


def _check(comparison: Comparison, entry: Entry) -> Check:
    value = comparison.metric.value(entry)
    if value is None:
        return Check(comparison, None, "not measured", missing=why_missing(comparison.metric.name, entry))
    interval, noise = comparison.metric.interval(entry), comparison.metric.noise(entry)
    is_close = any(i is not None and i[0] <= comparison.limit <= i[1] for i in (interval, noise))
    # Compared at both ends, not only whether the interval holds the limit: a limit at its very end may be met by all of it.
    holds = COMPARE[comparison.op]
    passes = holds(value, comparison.limit)
    if noise is not None and is_close and any(holds(bound, comparison.limit) != passes for bound in noise):
        return Check(comparison, value, "cannot tell", True, noise)
    return Check(comparison, value, "pass" if passes else "fail", is_close, noise)


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, int]] = []
        self.index = 0
        self.depth = 0
        readable, place = text.replace("\u2264", "<=").replace("\u2265", ">="), 0
        self.text = readable
        while readable[place:].strip():
            match = _TOKEN.match(readable, place)
            if match is None or match.lastgroup is None:
                self.fail(place + len(readable[place:]) - len(readable[place:].lstrip()))
            self.tokens.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
            place = match.end()

    def parse(self) -> Node:
        if not self.tokens:
            raise SpecError(f"the requirement is empty; give comparisons {_EXAMPLE}")
        node = self.expression()
        if self.index < len(self.tokens):
            self.fail(self.tokens[self.index][2])
        return node

    def expression(self) -> Node:
        return self.junction("or", lambda: self.junction("and", self.factor))

    def junction(self, kind: Literal["and", "or"], part: Callable[[], Node]) -> Node:
        parts = [part()]
        while self.peek() == ("word", kind):
            self.index += 1
            parts.append(part())
        return parts[0] if len(parts) == 1 else Junction(kind, tuple(parts))

    def factor(self) -> Node:
        if self.peek() != ("symbol", "("):
            return self.chain()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise SpecError(f"the requirement has more than {MAX_DEPTH} nested parentheses; write it flatter")
        self.index += 1
        node = self.expression()
        if self.peek() != ("symbol", ")"):
            self.fail(self.here())
        self.index += 1
        self.depth -= 1
        return node

    def chain(self) -> Node:
        left, parts = self.operand(), []
        while (token := self.peek())[0] == "symbol" and token[1] in COMPARE:
            self.index += 1
            place, right = self.here(), self.operand()
            parts.append(self.comparison(left, token[1], right, place))
            left = right
        if not parts:
            self.fail(self.here())
        return parts[0] if len(parts) == 1 else Junction("and", tuple(parts))

    def comparison(self, left: Metric | float, op: str, right: Metric | float, place: int) -> Comparison:
        if isinstance(left, Metric) and not isinstance(right, Metric):
            return Comparison(left, op, right)
        if isinstance(right, Metric) and not isinstance(left, Metric):
            return Comparison(right, _MIRRORED[op], left)
        raise SpecError(
            f"in the requirement {self.text!r}, at character {place + 1}: compare one metric with one number, {_EXAMPLE}"
        )

    def operand(self) -> Metric | float:
        kind, word = self.peek()
        if kind == "number":
            value = float(word)
            if not math.isfinite(value):
                raise SpecError(f"{word} in the requirement is not a finite number")
            self.index += 1
            return value
        if kind != "word" or word in {"and", "or", "not"}:
            self.fail(self.here())
        if word not in METRICS:
            raise SpecError(
                f"{word!r} in the requirement is no metric{did_you_mean(word, METRICS)} (allowed: {listed()})"
            )
        self.index += 1
        return METRICS[word]

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.index][:2] if self.index < len(self.tokens) else ("end", "")

    def here(self) -> int:
        return self.tokens[self.index][2] if self.index < len(self.tokens) else len(self.text)

    def fail(self, place: int) -> NoReturn:
        seen = repr(self.text[place : place + 12]) if place < len(self.text) else "the end"
        raise SpecError(
            f"cannot read the requirement {self.text!r} at character {place + 1} ({seen}); it consists of comparisons of a "
            f"metric with a number (<= < >= > == !=), and, or, parentheses, {_EXAMPLE}"
        )
