"""The extras in the metadata, each under every spelling of its name."""

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Extras(MetadataHookInterface):
    """Pips before 23.3 find only the spelling that is listed: ``llama-cpp`` or ``llama_cpp``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the extras of ``[tool.hatch.metadata.hooks.custom.extras]``."""
        extras = self.config["extras"]
        metadata["optional-dependencies"] = extras | {name.replace("-", "_"): extras[name] for name in extras}
