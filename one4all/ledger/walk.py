"""Sorted listings, walked side by side in a bounded memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Walk(Generic[_Value]):
    """A sorted listing, walked along as it is asked for; what was passed by is kept until asked.

    Args:
        found: (key, name, value), sorted by key.
    """

    def __init__(self, found: Iterator[tuple[str, str, _Value]]) -> None:
        self._found: Iterator[tuple[str, str, _Value]] = found
        self._head: tuple[str, str, _Value] | None = next(found, None)
        self._passed: defaultdict[str, list[_Value]] = defaultdict(list)

    def take(self, name: str, last_key: str) -> list[_Value]:
        """All values of a name; none of them has a key behind ``last_key``."""
        found = self._passed.pop(name, None) or []
        while self._head is not None and self._head[0] <= last_key:
            if self._head[1] == name:
                found.append(self._head[2])
                self._head = next(self._found, None)
            else:
                self._pass()
        return found

    def rest(self) -> dict[str, list[_Value]]:
        """What nobody asked for, by name."""
        while self._head is not None:
            self._pass()
        return self._passed

    def forget_passed(self, key: str) -> None:
        """Forget what lies before a key and was not asked for, where names are keys."""
        for name in [name for name in self._passed if name < key]:
            del self._passed[name]

    def _pass(self) -> None:
        assert self._head is not None
        _, name, value = self._head
        self._passed[name].append(value)
        self._head = next(self._found, None)
