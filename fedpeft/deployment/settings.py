"""Settings of a machine, read so that every mistake in them is told at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft.spec import nearest


class Reader:
    """Takes values out of a mapping by name, and keeps what is wrong with them in ``problems``.

    A value that cannot be used is told as its default, or as nothing; ask for all names, then for
    :meth:`unknown` ones. ``inside`` is where the mapping is, as in ``limits``.
    """

    def __init__(self, given: Mapping[str, Any], inside: str = "") -> None:
        self._given, self._asked = given, list[str]()
        self._before = f"{inside}." if inside else ""
        self.problems: list[str] = []

    def wrong(self, name: str, why: str) -> None:
        """Note what is wrong with a value."""
        self.problems.append(f"{self._before}{name}: {why}")

    def text(self, name: str, default: str | None = None, *, needed: bool = False) -> str | None:
        """Return a text; a number is none."""
        value = self._value(name)
        if value is None:
            if needed:
                self.wrong(name, "is missing")
            return default
        if not isinstance(value, str) or not value.strip():
            self.wrong(name, f"{value!r} must be a text")
            return default
        return value.strip()

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.wrong(name, f"{value!r} must be true or false")
        return default

    def whole(self, name: str, default: int | None, *, low: int = 1) -> int | None:
        """Return a whole number of at least ``low``."""
        value = self._value(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            self.wrong(name, f"{value!r} must be a whole number, at least {low}")
            return default
        return value

    def number(self, name: str, default: float | None, *, below: float = math.inf) -> float | None:
        """Return a number above 0 and below ``below``."""
        value = self._value(name)
        if value is None:
            return default
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not 0 < value < below:
            least = "above 0" if below == math.inf else f"above 0 and below {below:g}"
            hint = "; YAML reads 1e-5 as a text, write 1.0e-5" if isinstance(value, str) else ""
            self.wrong(name, f"{value!r} must be a number {least}{hint}")
            return default
        return float(value)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """Return a list of texts; ``None`` where there is none. An empty list allows nothing."""
        value = self._value(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            self.wrong(name, f"{value!r} must be a list of texts, as in [a, b]")
            return None
        return tuple(value)

    def nested(self, name: str) -> Reader:
        """Return a reader of the lines below a name; its problems are its own."""
        value = self._value(name)
        if value is None or isinstance(value, dict):
            return Reader(value or {}, f"{self._before}{name}")
        self.wrong(name, f"{value!r} must be lines 'name: value'")
        return Reader({}, f"{self._before}{name}")

    def unknown(self) -> None:
        """Note every name that nobody has asked for."""
        for name in self._given:
            if name not in self._asked:
                known: Sequence[str] = self._asked
                self.problems.append(
                    f"unknown line {self._before + str(name)!r}{nearest(str(name), known)}"
                )

    def _value(self, name: str) -> Any:
        self._asked.append(name)
        return self._given.get(name)
