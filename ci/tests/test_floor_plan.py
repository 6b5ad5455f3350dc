"""Every plugin has the same file for the same role: the table under "The floor plan" in CONTRIBUTING."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT / "plugins/gguf/src/polydraft_gguf"
"""No plugin: what the plugins for llama.cpp share."""
PACKAGES = sorted({*(ROOT / "plugins").glob("*/src/polydraft_*")} - {SHARED})
SERVERS = [package / "server" for package in PACKAGES if (package / "server").is_dir()]
DRAFTERS = {"mtp", "draft_model", "ngram", "eagle3", "dflash"}

OWN = {
    "llama_cpp": "bindings context model tokenizer wheel",
    "litert_lm": "runtime tokenizer",
    "llama_cpp/server": "program",
    "mlx": "assistant config decoder greedy kv_cache vlm_upstream",
    "ollama": "create model request",
    "reference": "config kv_cache model text_habits tokenizer toys",
    "transformers": "decoder device_clock device_rounds dtypes experts fused_layers fused_noise gemma4 graphs kv_cache "
    "launches llama logits_check memory prompt_attention prompt_end shared_caches step_attention step_choice "
    "step_experts step_products traced",
    "vllm": "checks engine_args environment older_models patches process_lock scheduler seeds self_test settings "
    "soundness speculation start_errors tokenizer versions",
    "vllm/server": "command inspection request statistics",
    "xllamacpp": "in_process program settings tokenizer",
}
"""Files that only this engine has: parts of its networks, its formats, its settings."""
ELSEWHERE = {"llama_cpp/server": "client engine rounds", "xllamacpp": "engine rounds"}
"""Roles whose file is in ``polydraft_gguf.serving``, the same for both."""


def name_of(folder: Path) -> str:
    """``mlx``, or ``vllm/server``."""
    plugin = folder.relative_to(ROOT / "plugins").parts[0]
    return f"{plugin}/server" if folder.name == "server" else plugin


def modules(folder: Path) -> set[str]:
    """Names of the modules and packages in a folder."""
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    return found - {"__init__"}


def roles(column: int) -> dict[str, str]:
    """Module -> ``all``, or who else has it: column 2 of the table for plugins, column 3 for their ``server/``."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### The floor plan")[2]
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|(.*)\|$", section, re.MULTILINE)
    who = {module: cells.split("|")[column - 1].strip() for module, cells in rows}
    assert "loading" in who, "CONTRIBUTING has no table of roles"
    return {module: cell for module, cell in who.items() if cell}


@pytest.mark.parametrize("folder", [*PACKAGES, *SERVERS], ids=name_of)
def test_every_file_has_a_role_or_is_the_engines_own(folder: Path) -> None:
    plan = roles(3 if folder.name == "server" else 2)
    own = set(OWN.get(name_of(folder), "").split())
    found = modules(folder)
    assert not found - set(plan) - own, "neither a role in CONTRIBUTING nor listed in OWN"
    assert not own - found, "listed in OWN, but there is no such file"
    assert not own & set(plan), "a role is not an engine's own"
    elsewhere = set(ELSEWHERE.get(name_of(folder), "").split())
    assert not elsewhere - modules(SHARED / "serving"), "listed in ELSEWHERE, but there is no such file"
    assert not elsewhere & found, "listed in ELSEWHERE, but the plugin has a file of its own"
    assert not {module for module, who in plan.items() if who == "all"} - found - elsewhere, "a role of every plugin"


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_an_engine_steps_or_emits_rounds(package: Path) -> None:
    assert len({"sequence", "rounds"} & {*modules(package), *ELSEWHERE.get(name_of(package), "").split()}) == 1


@pytest.mark.parametrize("folder", [*PACKAGES, *SERVERS], ids=name_of)
def test_loading_is_one_function_and_the_command_of_a_server_at_most(folder: Path) -> None:
    tree = ast.parse((folder / "loading.py").read_text(encoding="utf-8"))
    public = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    assert public in (["load_pair"], ["load_pair", "server_command"])


@pytest.mark.parametrize("package", [package for package in PACKAGES if (package / "drafters").is_dir()], ids=name_of)
def test_drafters_are_named_after_their_kind(package: Path) -> None:
    assert modules(package / "drafters") <= DRAFTERS
