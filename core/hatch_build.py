"""The extras in the metadata, each under every spelling of its name; and the programs."""

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Extras(MetadataHookInterface):
    """Pips before 23.3 find only the spelling that is listed: ``llama-cpp`` or ``llama_cpp``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the extras of ``[tool.hatch.metadata.hooks.custom.extras]``, and the programs of ``...scripts``."""
        extras = self.config["extras"]
        metadata["optional-dependencies"] = extras | {name.replace("-", "_"): extras[name] for name in extras}
        # For a wheel that is built from a source archive, Hatchling reads the extras from the archive's PKG-INFO, takes
        # both spellings for one and leaves the other empty. It asks hooks only if a dynamic field is not in PKG-INFO;
        # programs never are.
        metadata["scripts"] = self.config["scripts"]
