"""The scripts in ci/ are modules without a package: put them on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
