"""What ``doctor`` reports: MLX's traps, each with the step that fixes it."""

import builtins
import platform
import sys

import polydraft
import pytest
from polydraft_mlx import plugin
from polydraft_mlx.backend import MlxBackend


def install_hint():
    (record,) = plugin.polydraft_backends()
    return record.install_hint


def test_here():
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    found = MlxBackend().diagnose()
    assert found.usable, found.reason
    assert "cpu" in [device.name for device in found.devices]
    assert all(device.free_memory_bytes > 0 for device in found.devices)
    assert any(note.startswith("mlx ") for note in found.notes)


@pytest.mark.parametrize(
    ("system", "machine", "libc", "words"),
    [
        ("linux", "x86_64", ("glibc", "2.31"), ["2.35", "2.31", "container"]),
        ("linux", "x86_64", ("", ""), ["glibc 2.35"]),
        ("darwin", "x86_64", ("", ""), ["Intel"]),
        ("win32", "AMD64", ("", ""), ["win32", "transformers"]),
    ],
)
def test_where_mlx_has_no_packages(system, machine, libc, words, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    assert all(word in install_hint() for word in words)
    assert "pip install" not in install_hint()


@pytest.mark.parametrize(
    ("system", "machine", "libc"),
    [
        ("linux", "aarch64", ("glibc", "2.35")),
        ("linux", "x86_64", ("glibc", "2.100.1")),
        ("darwin", "arm64", ("", "")),
    ],
)
def test_where_mlx_can_be_installed(system, machine, libc, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    assert install_hint() == "pip install 'polydraft[mlx]'"


def test_bare_mlx_on_linux(monkeypatch):
    """The message is what `import mlx.core` says after `pip install mlx` without an extra."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name == "mlx.core":
            raise ImportError("libmlx.so: cannot open shared object file: No such file or directory")
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    found = MlxBackend().diagnose()
    assert not found.usable
    assert "extra" in found.reason
    if sys.platform == "linux":
        assert "mlx-lm[cpu]" in found.remedy


def test_an_assistant_is_not_a_target():
    pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
    with pytest.raises(polydraft.errors.PolydraftError, match="drafter"):
        polydraft.load("builtin:tiny-e2b-assistant", backend="mlx")
