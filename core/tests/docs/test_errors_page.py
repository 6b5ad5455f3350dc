"""The example at the top of docs/errors.md does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_example_prints_the_command_that_installs_an_engine(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.DOTALL)
    without = {**os.environ, "POLYDRAFT_DISABLE_PLUGINS": "vllm", "POLYDRAFT_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, env=without)
    assert "polydraft engines install vllm" in done.stdout
