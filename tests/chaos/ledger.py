"""What happened: counts, facts that must never contradict each other, and violations."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

_MOST_SHOWN = 20


@dataclass
class Ledger:
    """Written by all actors of a run.

    Attributes:
        counts: outcomes by operation, as "operation status code".
        verified: answers whose text and receipt were compared with their reference.
        violations: what must not have happened, the first ones in words.
        num_violations: all of them.
    """

    counts: Counter[str] = field(default_factory=Counter)
    verified: int = 0
    violations: list[str] = field(default_factory=list)
    num_violations: int = 0
    _facts: dict[Hashable, Any] = field(default_factory=dict)

    def accuse(self, what: str) -> None:
        """Notes a violation."""
        self.num_violations += 1
        if len(self.violations) < _MOST_SHOWN:
            self.violations.append(what)

    def learn(self, fact: Hashable, value: Any) -> None:
        """Notes what somebody saw; a violation where somebody saw otherwise."""
        known = self._facts.setdefault(fact, value)
        if known != value:
            self.accuse(f"{fact} is {value!r} and was {known!r}")

    def render(self) -> str:
        """For the terminal."""
        lines = [f"{count:>8}  {name}" for name, count in sorted(self.counts.items())]
        lines.append(f"{self.verified:>8}  answers compared with their single-request reference")
        lines += [f"VIOLATION: {each}" for each in self.violations]
        lines.append(f"{self.num_violations:>8}  violations")
        return "\n".join(lines)
