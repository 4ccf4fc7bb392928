"""Pickles that do something when they are loaded carelessly."""

from collections.abc import Callable
from typing import Any


class Calls:
    """Pickled, a call of `function`, whose result then gets `state` where that is given."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self._reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced
