"""The folder of what polydraft keeps for this user and cannot make again by itself.

``POLYDRAFT_DATA_DIR``
    Another folder, for example on a larger disk: engines' environments lie in it.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["DATA_VARIABLE", "data_folder"]

DATA_VARIABLE = "POLYDRAFT_DATA_DIR"


def data_folder() -> Path:
    """An absolute path; the folder need not exist."""
    given = os.environ.get(DATA_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("polydraft")
