"""Secrets: API keys and tokens. They come from the environment, from a file or from the app, and are never shown.

Nothing that polydraft prints, logs, stores or writes on a command line contains one: no repr, no JSON, no error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from polydraft.errors import InvalidRequestError
from polydraft.files import system_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import CoreSchema

__all__ = ["MASK", "Secret", "names_a_secret", "revealed"]

MASK = "***"
"""What is shown of a secret."""
_LONGEST = 4096
"""Characters. Servers refuse headers of more than 8 to 64 KiB."""
_NAMES = re.compile(
    r"(?:^|[-_.])(?:api[-_]?keys?|access[-_]?keys?|hf[-_]?token|auth[-_]?token|access[-_]?token|password|passwd|secret|"
    r"credentials?|authorization|bearer)$|^(?:key|token)$",
    re.IGNORECASE,
)


def names_a_secret(name: str) -> bool:
    """Whether an option of this name holds a secret.

    >>> [names_a_secret(name) for name in ("api_key", "--api-key", "hf_token", "api_key_file", "max_tokens")]
    [True, True, True, False, False]
    """
    return _NAMES.search(name) is not None


def revealed(variables: Mapping[str, str | Secret]) -> dict[str, str]:
    """Environment variables as a child process gets them, with the secrets themselves."""
    return {name: value.reveal() if isinstance(value, Secret) else value for name, value in variables.items()}


class Secret:
    """A key or token that is sent in an HTTP header. Its repr, its text and its JSON are ``***``; it is not pickled.

    In pydantic models a text is turned into a ``Secret``.

    Args:
        text: The secret. Line ends around it, which files and shells leave behind, are removed.
        name: What errors call it, without its value.
        shell: How a POSIX shell reads it again: ``$VARIABLE``, ``$(cat FILE)``. Empty if it cannot.

    Raises:
        InvalidRequestError: It is empty or too long, or has characters that a header cannot hold. (An HTTP client's own
            error could show it.)
    """

    __slots__ = ("_text", "shell")

    def __init__(self, text: str, name: str = "The key", *, shell: str = "") -> None:
        text = text.strip("\r\n")
        wrong = ""
        if not text:
            wrong = "is empty"
        elif len(text) > _LONGEST:
            wrong = f"is longer than {_LONGEST} characters"
        elif not all("!" <= character <= "~" for character in text):  # printable ASCII without the space
            wrong = "contains spaces, line ends or other characters that a header cannot hold"
        if wrong:
            raise InvalidRequestError(f"{name} {wrong}.", "Set it again; its value is not shown here.")
        self._text = text
        self.shell = shell

    @classmethod
    def from_environment(cls, *variables: str) -> Secret | None:
        """The secret in the first of these environment variables that is set and not empty; None if none is.

        Raises:
            InvalidRequestError: As for ``Secret``; the error names the variable.
        """
        for variable in variables:
            text = os.environ.get(variable, "").strip("\r\n")
            if text:
                return cls(text, f"The key in the environment variable {variable}", shell=f"${variable}")
        return None

    @classmethod
    def from_file(cls, path: Path) -> Secret:
        """The secret that is a file's only content.

        Raises:
            InvalidRequestError: The file cannot be read; or as for ``Secret``. The error names the file.
        """
        import shlex

        try:
            with path.expanduser().open("rb") as file:
                content = file.read(_LONGEST + 3)  # and a line end
        except OSError as error:
            raise system_error(error, f"The file {path} with the key cannot be read") or InvalidRequestError(
                f"The file {path} with the key cannot be read: {error.strerror or type(error).__name__}.",
                "Check the path.",
            ) from None
        shell = f"$(cat {shlex.quote(str(path.expanduser()))})"
        return cls(content.decode("latin-1"), f"The key in the file {path}", shell=shell)

    def reveal(self) -> str:
        """The secret itself, to be sent or to be set in a child's environment: never to be shown or stored."""
        return self._text

    def hidden_in(self, text: str) -> str:
        """The text without the secret: servers repeat the request's key in errors and logs."""
        return text.replace(self._text, MASK)

    def __repr__(self) -> str:
        return f"Secret({MASK!r})"

    def __str__(self) -> str:
        return MASK

    def __format__(self, form: str) -> str:
        return format(MASK, form)

    def __eq__(self, other: object) -> bool:
        from hmac import compare_digest  # late: hashlib is slow to import

        return isinstance(other, Secret) and compare_digest(self._text, other._text)

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("A secret is not pickled: give it to the other process through its environment.")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "format": "password", "writeOnly": True}

    @classmethod
    def _validated(cls, given: object) -> Secret:
        if isinstance(given, Secret):
            return given
        if not isinstance(given, str):
            raise ValueError("a secret is a text")
        return cls(given)
