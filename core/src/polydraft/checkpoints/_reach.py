"""Whether the Hub can be reached, asked before the first request: ``huggingface_hub`` tries for half a minute."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polydraft._containment import TookTooLong, within

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["hub_answers", "is_unreachable", "note_unreachable", "without_retry_lines"]

_LIMIT = 4.0
"""Seconds in which the Hub must answer. A name server that is silent counts, too, which HTTP libraries do not limit."""
_KNOWN_FOR = {True: 300.0, False: 15.0}
"""Seconds for which an answer, or that there was none, counts: one ``load`` makes several requests."""
_NETWORK_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet"}
_NO_SERVICE = {502, 503, 504}
"""What a proxy answers that cannot reach the Hub, and the Hub itself when it is down."""
_RETRIES = "huggingface_hub.utils._http"
"""The logger that tells of retries."""

_log = logging.getLogger("polydraft.load")
_lock = threading.Lock()
_known: dict[str, tuple[bool, float]] = {}
"""Endpoint -> whether it answered, and until when that counts."""


def hub_answers() -> bool:
    """Whether the Hub, or the mirror that HF_ENDPOINT names, answers at all; the first call asks it, with one request.

    Raises nothing: what is wrong besides comes out in the request itself.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    with _lock:  # a second thread waits for the answer to the first one's question
        answers, until = _known.get(endpoint, (False, 0.0))
        if time.monotonic() < until:
            return answers
        answers = _ask(endpoint)
        _known[endpoint] = answers, time.monotonic() + _KNOWN_FOR[answers]
    if not answers:
        _log.info("%s cannot be reached: only what is in the local cache is used.", endpoint)
    return answers


def note_unreachable() -> None:
    """A request has failed after all: further ones need not try as long."""
    from huggingface_hub import constants

    _known[constants.ENDPOINT] = False, time.monotonic() + _KNOWN_FOR[False]


def _ask(endpoint: str) -> bool:
    from huggingface_hub.utils._http import get_session

    try:
        # By its own session: proxies and certificates are those of the requests that follow, and so is the connection.
        answer = within(_LIMIT, lambda: get_session().head(f"{endpoint}/robots.txt", timeout=_LIMIT))
    except TookTooLong:
        return False
    except Exception as error:
        return not is_unreachable(error)
    return answer.status_code not in _NO_SERVICE


def is_unreachable(error: BaseException | None) -> bool:
    """Whether no answer came from the Hub at all."""
    # By name: which HTTP library is in use depends on the version of huggingface_hub.
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in _NETWORK_LIBRARIES


@contextmanager
def without_retry_lines() -> Iterator[None]:
    """Requests whose retries are told to the log ``polydraft.load`` instead of standard error."""

    def told(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "thrown while requesting" not in text and not text.startswith("Retrying in"):
            return True
        _log.info("The Hub: %s", text)
        return False

    logger = logging.getLogger(_RETRIES)
    logger.addFilter(told)
    try:
        yield
    finally:
        logger.removeFilter(told)
