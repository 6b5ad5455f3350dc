"""``polydraft-xllamacpp``: xllamacpp's server as a program with llama-server's flags, as far as polydraft uses them.

``polydraft serve`` runs it. Where ``POLYDRAFT_LLAMA_SERVER`` names it, it is the program of the backend
``llama-server``. The API key comes from ``LLAMA_API_KEY``.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from polydraft.errors import PolydraftError
from polydraft.secrets import Secret
from polydraft_gguf.resources import device_name

from polydraft_xllamacpp.settings import SPEC_TYPES, ServerSettings, gpus

__all__ = ["main"]

_MIB = 1 << 20


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with the reason, in llama-server's words where a flag is unknown."""
        message = message.replace("unrecognized arguments:", "invalid argument:")
        self.exit(1, f"error: {message}\n")


class _ListDevices(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print them in llama-server's layout, and end."""
        import xllamacpp as engine

        print("Available devices:")
        for one in gpus(engine).values():
            total, free = (one[f"memory_{name}"] // _MIB for name in ("total", "free"))
            print(f"  {one['name']}: {one['description']} ({total} MiB, {free} MiB free)")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM; the exit code is 0, or 1 with the reason on stderr."""
    given = vars(_parser().parse_args(arguments))
    import xllamacpp as engine

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        settings = ServerSettings(**given)
        server = engine.Server(settings.params(Secret.from_environment("LLAMA_API_KEY"), verbose=True))
    except (PolydraftError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"listening on {server.listening_address}", flush=True)
    while not ended.wait(1):  # with a limit: Windows delivers signals only between waits
        pass
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="polydraft-xllamacpp",
        description="xllamacpp's server with llama-server's flags. The API key comes from LLAMA_API_KEY.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # llama-server numbers its builds; this is the wheel's version, which ends with that number.
    add("--version", action="version", version=f"version: xllamacpp {version('xllamacpp')}")
    add("--list-devices", action=_ListDevices, nargs=0, help="list the GPUs that the wheel sees, and end")
    add("--model", type=Path, required=True, metavar="FILE", help="the GGUF file")
    add("--ctx-size", type=int, required=True, metavar="N", help="tokens of all slots together")
    add("--parallel", type=int, metavar="N", help="slots: requests that run at a time")
    add("--batch-size", type=int, metavar="N", help="tokens of one forward at most")
    add("--ubatch-size", dest="batch_size", type=int, metavar="N", help="the same")
    for name in ("k", "v"):
        add(f"--cache-type-{name}", metavar="TYPE", help=f"type of the cache's {name.upper()}: f32, f16, q8_0, ...")
        add(f"--spec-draft-type-{name}", dest=f"cache_type_{name}", metavar="TYPE", help="the same: drafters share it")
    for flag, text in (("--flash-attn", "flash attention"), ("--swa-full", "full caches of sliding-window layers")):
        add(flag, type=_switch, nargs="?", const=True, metavar="on|off", help=text)
    add("--mmap", type=_switch, metavar="on|off", help="map the file instead of reading it")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--device", type=_device, metavar="NAME", help="a GPU, or none for the CPU")
    add("--spec-draft-device", dest="device", type=_device, metavar="NAME", help="the same")
    add("--n-gpu-layers", type=int, metavar="N", help="layers on the GPU")
    add("--spec-type", choices=[*SPEC_TYPES], metavar=",".join(SPEC_TYPES), help="how drafts are made")
    add("--spec-draft-model", type=Path, metavar="FILE", help="the drafter's GGUF file")
    add("--spec-draft-n-max", type=int, metavar="N", help="tokens that are drafted at a time")
    add("--spec-ngram-size", type=int, metavar="N", help="tokens that n-gram drafting looks up")
    add("--host", metavar="ADDRESS", help="where to listen")
    add("--port", type=int, metavar="PORT", help="where to listen; 0: a free port")
    return parser


def _switch(text: str) -> bool:
    if text not in {"on", "off"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def _device(text: str) -> str:
    """polydraft's name of a device: llama-server calls the CPU ``none``, and a GPU ``CUDA0``."""
    if text in {"none", "cpu"}:
        return "cpu"
    return text if ":" in text or text in {"auto", "mps"} else device_name(text)


if __name__ == "__main__":
    sys.exit(main())
