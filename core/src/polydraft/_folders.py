"""The folders of what polydraft keeps for this user: what it cannot make again by itself, and what it can.

``POLYDRAFT_DATA_DIR``
    Another folder for the former, for example on a larger disk: engines' environments lie in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.errors import SystemResourceError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DATA_VARIABLE", "cache_folder", "data_folder"]

DATA_VARIABLE = "POLYDRAFT_DATA_DIR"


def data_folder() -> Path:
    """An absolute path; the folder need not exist.

    Raises:
        SystemResourceError: It is relative to a folder that has gone, or to the home folder of a user without one.
    """
    from platformdirs import user_data_path

    given = os.environ.get(DATA_VARIABLE)
    if given:
        return _found(lambda: Path(given).expanduser().absolute(), DATA_VARIABLE)
    return _found(lambda: user_data_path("polydraft"), DATA_VARIABLE)


def cache_folder() -> Path:
    """An absolute path; the folder need not exist.

    Raises:
        SystemResourceError: As for ``data_folder``.
    """
    from platformdirs import user_cache_path

    return _found(lambda: user_cache_path("polydraft"), "XDG_CACHE_HOME")


def _found(path: Callable[[], Path], variable: str) -> Path:
    problem: Exception | None = None
    try:
        found = path()
    except (OSError, RuntimeError) as error:
        problem = error
    else:
        if found.is_absolute():  # older versions of platformdirs leave ``~`` as it is
            return found
    raise SystemResourceError(
        "There is no folder for what polydraft keeps: this user has no home folder, or the working directory has gone.",
        f"Set HOME to a folder that exists, or {variable} to an absolute path.",
    ) from problem
