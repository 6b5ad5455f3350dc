"""The floors of the core: a module imports from its own floor and those below it."""

import ast
from pathlib import Path

import polydraft

SOURCE = Path(polydraft.__file__).parent
FLOORS = (
    {
        "_containment",
        "_folders",
        "_numbers",
        "_origin",
        "_pasteable",
        "_pip_command",
        "_presentable",
        "_program",
        "_sealed",
        "_shown",
        "contract",
        "errors",
        "files",
        "secrets",
    },
    {"caches", "checkpoints", "sampling", "text"},
    {"engine_parts", "hardware", "reasons", "_argument_names", "_signatures"},
    {"_loop"},
    {"_session"},
    {"_discovery", "_environments", "_isolation", "_plugins", "_probes", "_registry", "_workers"},
    {"_flags", "_load", "_load_arguments"},
    {"verification"},
    {"_measuring"},
    {"_bench", "_tune"},
    {"_cli"},
    {"__main__"},
)
UPWARD = {("_load", "verification"), ("_load", "_tune"), ("_workers", "verification")}
"""Stored verification results decide whether ``load`` proceeds, stored measurements decide what the caller leaves open;
and ``polydraft verify`` and ``polydraft tune`` load. A worker measures near ties, as the logits are there."""


def imports():
    """Pairs of the parts that import and are imported, late imports and those for types included."""
    for file in SOURCE.rglob("*.py"):
        part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file} has a relative import"
                names = [node.module] if node.module != "polydraft" else [f"polydraft.{one.name}" for one in node.names]
            else:
                continue
            for name in names:
                package, _, rest = name.partition(".")
                if package == "polydraft" and rest:
                    yield part, rest.partition(".")[0]


def test_no_import_leads_upwards():
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    found = set(imports())
    parts = {part for pair in found for part in pair} - {
        "__init__",
        "bench",
        "load",
        "tune",
    }  # of `polydraft`, for the command line
    assert parts == set(floor)
    above = {(one, other) for one, other in found if one in floor and other in floor and floor[other] > floor[one]}
    assert above == UPWARD
