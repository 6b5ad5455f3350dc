"""Put ci/ on the path: its scripts are modules without a package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
