"""The contract between the core and its plugins: hooks, records, and the interfaces of engines.

Import names from this package, not from its modules. ``CONTRACT_VERSION`` is its version. Besides this package, plugins
may import the other ``PUBLIC_MODULES``.
"""

from polydraft.contract import (
    arrays,
    backend,
    hookspecs,
    packings,
    processors,
    public,
    records,
    requests,
    results,
    stepping,
    tokenizer,
    upstream,
    whole,
)
from polydraft.contract.arrays import *
from polydraft.contract.backend import *
from polydraft.contract.hookspecs import *
from polydraft.contract.packings import *
from polydraft.contract.processors import *
from polydraft.contract.public import *
from polydraft.contract.records import *
from polydraft.contract.requests import *
from polydraft.contract.results import *
from polydraft.contract.stepping import *
from polydraft.contract.tokenizer import *
from polydraft.contract.upstream import *
from polydraft.contract.whole import *

__all__: list[str] = []
__all__ += arrays.__all__
__all__ += backend.__all__
__all__ += hookspecs.__all__
__all__ += packings.__all__
__all__ += processors.__all__
__all__ += public.__all__
__all__ += records.__all__
__all__ += requests.__all__
__all__ += results.__all__
__all__ += stepping.__all__
__all__ += tokenizer.__all__
__all__ += upstream.__all__
__all__ += whole.__all__
