"""Answers that are kept between processes, so that ``load`` asks once and not each time.

An answer is kept only if the backend is usable, and says what else its diagnosis depends on. It counts while nothing
has changed that ``machine`` reads, and none of the files that the diagnosis names.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polydraft._environments.sources import code_stamp
from polydraft._folders import cache_folder
from polydraft._probes.asking import ask_all
from polydraft._probes.machine import code, file_state, hardware, packages, variables
from polydraft._probes.records import Answer
from polydraft._sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from polydraft._environments.records import Environment
    from polydraft.contract.records import BackendRecord, Diagnosis

__all__ = ["asked", "diagnosis_folder", "have_survived", "note_survival"]

_log = logging.getLogger("polydraft.load")
_FORMAT = 2
_MOST = 256
"""Answers that are kept; those written longest ago are deleted."""


def asked(
    python: Path,
    records: Sequence[BackendRecord],
    homes: Mapping[str, Environment | None],
    *,
    seconds: float,
    anew: bool,
) -> list[Answer]:
    """The answers of backends, in any order: kept ones, and those of processes.

    Args:
        python: This program's own interpreter.
        records: The backends to ask.
        homes: Backend -> the environment that it is installed in; None: this program's own.
        seconds: How long each may take.
        anew: Ask all of them; what was kept only says which takes longest, and so is asked first.
    """
    keys = _keys(records, homes)
    known = {record.name: found for record in records if (found := _read(keys[record.name]))}
    answers = [] if anew else list(known.values())
    slow_first = sorted(
        (record for record in records if anew or record.name not in known),
        key=lambda record: -known[record.name].seconds if record.name in known else float("-inf"),
    )
    questions = [(home.python if (home := homes[record.name]) else python, record) for record in slow_first]
    for answer in ask_all(questions, seconds=seconds):
        answers.append(answer)
        _log.info("Asked %s in a process of its own: %.1f s. %s", answer.backend, answer.seconds, answer.problem)
        _keep(keys[answer.backend], answer)
    return answers


def diagnosis_folder() -> Path:
    """Where answers are kept."""
    return cache_folder() / "diagnoses"


def have_survived() -> bool:
    """Whether importing all plugins was tried in a process of its own, and has ended well, with just these."""
    path, key = _survival()
    return bool(read_sealed(path) == {"survived": key})


def note_survival() -> None:
    """Keep that all plugins can be imported."""
    path, key = _survival()
    with suppress(OSError):  # the folder cannot be written: it is tried each time
        write_sealed(path, {"survived": key})


def _survival() -> tuple[Path, str]:
    from polydraft._discovery.installed import plugin_modules

    found = [_FORMAT, packages(), variables(), code("polydraft"), *map(code, plugin_modules())]
    return diagnosis_folder() / "survived.json", hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _keys(records: Sequence[BackendRecord], homes: Mapping[str, Environment | None]) -> dict[str, str]:
    machine, own = [_FORMAT, hardware(), variables()], [packages(), code("polydraft")]
    keys = {}
    for record in records:
        home = homes[record.name]
        if home is None:
            there = [*own, code(record.factory.partition(":")[0].partition(".")[0])]
        else:  # nothing in there changes, except for code that is used where it lies
            there = [str(home.folder), home.installed, code_stamp(home)]
        found = [*machine, record.name, record.factory, there]
        keys[record.name] = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return keys


def _path(key: str) -> Path:
    return diagnosis_folder() / f"{key[:40]}.json"


def _read(key: str) -> Answer | None:
    kept = read_sealed(_path(key))
    try:
        if kept["key"] != key:
            return None
        answer = Answer.model_validate_json(json.dumps(kept["answer"]))
        diagnosis = answer.state and answer.state.diagnosis
        return answer if diagnosis and kept["files"] == _files(diagnosis) else None
    except (TypeError, KeyError, ValidationError):  # none, or of another version
        return None


def _keep(key: str, answer: Answer) -> None:
    """Keep an answer, or forget the one that was kept."""
    with suppress(OSError):  # the folder cannot be written: each process asks
        state = answer.state
        if state is None or not state.usable or state.diagnosis is None or state.diagnosis.depends_on is None:
            _path(key).unlink(missing_ok=True)
            return
        # Free memory is another one the next time.
        devices = tuple(one.model_copy(update={"free_memory_bytes": None}) for one in state.diagnosis.devices)
        diagnosis = state.diagnosis.model_copy(update={"devices": devices})
        kept = answer.model_copy(update={"state": state.model_copy(update={"diagnosis": diagnosis})})
        record = {"key": key, "files": _files(diagnosis), "answer": kept.model_dump(mode="json")}
        write_sealed(_path(key), record)
        _drop_oldest()


def _files(diagnosis: Diagnosis) -> list[Any]:
    return [[name, file_state(name)] for name in diagnosis.depends_on or ()]


def _drop_oldest() -> None:
    kept = sorted(diagnosis_folder().glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in kept[:-_MOST]:
        path.unlink(missing_ok=True)
