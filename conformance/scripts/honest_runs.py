"""Runs the suite with many seeds on backends that are right: whatever fails is a false alarm.

    python conformance/scripts/honest_runs.py --seeds 20
    python conformance/scripts/honest_runs.py --seeds 5 --full --only "whole*" --kinds mtp

Needs polydraft-reference, and for ``markov`` and ``markov-whole`` the example plugin, installed or on PYTHONPATH
(examples/third_party_plugin/src). The exit code is 1 if any run fails.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft import PluginHost
from polydraft_conformance.defects import honest, stepping
from polydraft_conformance.defects.making import PluginOf, defective
from polydraft_conformance.testing import run_in_process
from polydraft_reference.backend import ReferenceBackend

if TYPE_CHECKING:
    from polydraft_conformance.testing import SuiteRun

_NO_SEEDS = {**honest.CLAIMS, "sampling": honest.CLAIMS["sampling"] - {"seed"}}
_FEWEST = {**honest.CLAIMS, "sampling": frozenset({"temperature"})}
BACKENDS: dict[str, Any] = {
    "stepping": lambda: ReferenceBackend,
    "stepping, low precision": lambda: defective(stepping.LowPrecision, **stepping.LOW_PRECISION),
    "whole": lambda: defective(whole=honest.Whole, **honest.CLAIMS),
    "whole, no seeds": lambda: defective(whole=honest.Whole, **_NO_SEEDS),
    "whole, few claims": lambda: defective(whole=honest.Whole, **honest.FEW_CLAIMS),
    "whole, fewest claims": lambda: defective(whole=honest.Whole, **_FEWEST),
}
"""By name; the example plugin has two more."""
EXAMPLES = ("markov", "markov-whole") if find_spec("polydraft_markov") else ()


def main() -> int:
    """Run, and print what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="runs of each backend")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--full", action="store_true", help="full runs instead of quick ones")
    parser.add_argument("--kinds", default="", help="only these drafter kinds")
    parser.add_argument("--only", default="*", help="glob of the backends' names")
    parser.add_argument("-k", dest="chosen", default="", help="pytest's -k: only these checks")
    given = parser.parse_args()
    failures: Counter[tuple[str, str]] = Counter()
    for name in [*BACKENDS, *EXAMPLES]:
        if not fnmatchcase(name, given.only):
            continue
        for seed in range(given.first, given.first + given.seeds):
            started = time.perf_counter()
            found = _run(name, seed, full=given.full, kinds=given.kinds, chosen=given.chosen)
            rows = [row for row in found.report.rows if row.status in {"fail", "follows"}] if found.report else []
            if found.exit_code:
                failures.update([(name, row.check) for row in rows] or [(name, "no check ran")])
            state = "FAILED" if found.exit_code else "passed"
            print(f"{state} {name}, seed {seed}, {time.perf_counter() - started:.0f} s", flush=True)
            for row in rows:
                print(f"    {row.status} {row.check} [{row.case}] {row.reason.splitlines()[0]}", flush=True)
    for (name, check), count in sorted(failures.items()):
        print(f"{count} of {given.seeds}: {name}: {check}")
    return 1 if failures else 0


def _run(name: str, seed: int, *, full: bool, kinds: str, chosen: str) -> SuiteRun:
    options = ["--polydraft-seed", str(seed), *["--polydraft-quick"] * (not full)]
    options += ["--polydraft-kinds", kinds] if kinds else []
    options += ["-k", chosen] if chosen else []
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        if name in EXAMPLES:
            host = PluginHost({"example": import_module("polydraft_markov.plugin")})
            return run_in_process(name, *options, host=host, rootdir=Path(folder))
        host = PluginHost({"tested": PluginOf(BACKENDS[name](), name="reference")})
        return run_in_process("reference", *options, host=host, rootdir=Path(folder))


if __name__ == "__main__":
    sys.exit(main())
