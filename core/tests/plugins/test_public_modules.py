"""Privacy shows in the name: what has no underscore in its path is a door."""

from importlib import import_module
from pkgutil import walk_packages

import polydraft
from polydraft.contract import PUBLIC_MODULES


def test_every_module_is_public_or_has_an_underscore_in_its_path():
    modules = [module for module in walk_packages(polydraft.__path__, "polydraft.") if "._" not in module.name]
    unlisted = [
        module.name
        for module in modules
        if module.name not in PUBLIC_MODULES
        and not module.name.startswith("polydraft.contract.")
        # A package may hold doors without being one: then it offers no names.
        and not (module.ispkg and not hasattr(import_module(module.name), "__all__"))
    ]
    assert unlisted == []
    assert {name for name in PUBLIC_MODULES if name.startswith("polydraft.")} <= {module.name for module in modules}


def test_the_contract_gives_the_names_of_its_chapters():
    contract = import_module("polydraft.contract")
    for module in walk_packages(contract.__path__, "polydraft.contract."):
        assert set(import_module(module.name).__all__) <= set(contract.__all__), module.name
