"""What ``doctor`` is told: MLX's traps, each with the step that mends it."""

import builtins
import platform
import sys

import polydraft
import pytest
from packaging.version import Version
from polydraft_mlx import backend as module
from polydraft_mlx.backend import MlxBackend


def diagnosis():
    return MlxBackend().diagnose()


def test_here():
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    found = diagnosis()
    assert found.usable, found.reason
    assert "cpu" in [device.name for device in found.devices]
    assert all(device.free_memory_bytes > 0 for device in found.devices)
    assert any(note.startswith("mlx ") for note in found.notes)


def test_glibc_is_too_old(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    found = diagnosis()
    assert not found.usable
    assert "2.35" in found.reason
    assert "2.31" in found.reason
    assert found.remedy


def test_no_glibc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "glibc" in diagnosis().reason


def test_a_mac_with_an_intel_processor(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found = diagnosis()
    assert not found.usable
    assert "Intel" in found.reason


def test_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "win32" in diagnosis().reason


@pytest.mark.parametrize("installed", ["0.31.9", "0.33.0", "1.0"])
def test_a_version_that_was_not_tried(installed, monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: installed)
    found = diagnosis()
    assert not found.usable
    assert installed in found.reason
    assert "mlx-lm" in found.remedy
    assert not module.FIRST <= Version(installed) < module.NEXT


def test_bare_mlx_on_linux(monkeypatch):
    """The message is what `import mlx.core` says after `pip install mlx` without an extra."""
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name == "mlx.core":
            raise ImportError("libmlx.so: cannot open shared object file: No such file or directory")
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    found = diagnosis()
    assert not found.usable
    assert "extra" in found.reason
    if sys.platform == "linux":
        assert "mlx-lm[cpu]" in found.remedy


def test_an_assistant_is_no_target():
    pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
    with pytest.raises(polydraft.errors.PolydraftError, match="drafter"):
        polydraft.load("builtin:tiny-e2b-assistant", backend="mlx")
