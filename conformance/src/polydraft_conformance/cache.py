"""``RunCache``: results that several checks of a run share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

__all__ = ["RunCache"]

T = TypeVar("T")


class RunCache:
    """Results by key, each made once per run; what made one fail is raised again instead of tried again."""

    def __init__(self) -> None:
        self._results: dict[Hashable, Any] = {}
        self._errors: dict[Hashable, BaseException] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of ``make``, from an earlier call with this key if there was one.

        Raises:
            BaseException: Whatever ``make`` raised then or now, the time limit included.
        """
        if key in self._errors:
            raise self._errors[key]
        if key not in self._results:
            try:
                self._results[key] = make()
            except BaseException as error:
                self._errors[key] = error
                raise
        result: T = self._results[key]
        return result
