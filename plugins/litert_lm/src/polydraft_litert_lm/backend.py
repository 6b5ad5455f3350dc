"""The backend ``litert_lm``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    Exclusion,
    LoadRequest,
    ModelSource,
    SpeculationPlan,
    WholeEngine,
)
from polydraft.files import system_error

from polydraft_litert_lm.options import LitertLmOptions
from polydraft_litert_lm.plugin import DRAFTER_KINDS

__all__ = ["LitertLmBackend"]


class LitertLmBackend(Backend):
    """Runs ``.litertlm`` files with LiteRT-LM in this process."""

    options = LitertLmOptions

    def capabilities(self) -> Capabilities:
        """What its sessions offer. With drafts it is greedy whatever is asked: see ``speculation_conflict``."""
        return Capabilities(
            drafter_kinds=DRAFTER_KINDS,
            sampling=frozenset({"temperature", "top_p", "top_k", "seed"}),
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Import the engine. Whether it has a GPU to run on shows when a model is loaded there."""
        installed = version("litert-lm-api")
        try:
            import litert_lm  # noqa: F401
        except (ImportError, OSError) as error:
            refused = system_error(error, "litert_lm cannot be imported")
            return Diagnosis(
                usable=False,
                engine_version=installed,
                reason=refused.message if refused else f"litert-lm-api {installed} cannot be imported: {error}",
                remedy=refused.hint if refused else "pip install --force-reinstall --no-deps litert-lm-api",
            )
        return Diagnosis(
            usable=True,
            engine_version=installed,
            devices=(DeviceRecord(name="cpu", description="CPU"),),
            notes=("`device='gpu'` is LiteRT-LM's own backend for GPUs.",),
            rank=40,
            depends_on=(),
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """Why a drafter of its own cannot be given: LiteRT-LM takes the one inside the file."""
        if plan.drafter is not None:
            return f"LiteRT-LM uses the drafter inside the file, and {plan.drafter.id} was given."
        return None

    def conformance_exclusions(self) -> Iterable[Exclusion]:
        """What LiteRT-LM's text interface and its drafts do not allow."""
        yield Exclusion(
            check="test_short_prompts",
            status="never",
            reason="LiteRT-LM begins every prompt with BOS: one token of another kind is no prompt.",
        )
        yield Exclusion(
            check="test_every_k_drafts_k", status="never", reason="k is fixed by the drafter inside the file."
        )
        yield Exclusion(
            check="test_sampled_drafts_are_accepted",
            status="notyet",
            reason="With drafts LiteRT-LM ignores the temperature, so that calls with one are decoded plainly.",
            probe="polydraft_litert_lm.probes:drafts_ignore_the_temperature",
        )
        for check in ("test_stop_*_inside_a_draft", "test_stop_strings_in_odd_places"):
            yield Exclusion(
                check=check,
                status="notimpl",
                reason="A round's text can be spelled in several ways: two newlines are one token or two. The text is "
                "the same; its ids are the tokenizer's.",
            )

    def build(self, request: LoadRequest) -> Mapping[str, str]:
        """The shared libraries, byte for byte."""
        import litert_lm
        from polydraft.checkpoints.contents import libraries_digest

        return {"LiteRT-LM's libraries": libraries_digest(Path(litert_lm.__file__).parent)}

    def load_engine(self, request: LoadRequest) -> WholeEngine:
        """Check the file, and make an engine of it."""
        from polydraft_litert_lm.loading import load_pair

        return load_pair(request)
