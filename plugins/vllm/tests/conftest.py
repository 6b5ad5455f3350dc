"""What the tests of the vLLM backend share: sessions of real engines on the built-in pairs."""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext

import polydraft
import pytest
from polydraft_vllm.environment import prepare_environment

OPTIONS = {"max_num_batched_tokens": 128, "max_num_seqs": 16, "async_scheduling": False}
"""Batches are small, so that long prompts come in chunks."""


@pytest.fixture(scope="session")
def mtp():
    """The session that most tests share."""
    with polydraft.load(
        "builtin:tiny-e2b", backend="vllm", dtype="float32", num_speculative_tokens=4, engine_options=OPTIONS
    ) as session:
        yield session
    gc.collect()


class _Done:
    """A CUDA stream or event on CPU, where all work has been done already."""

    def __init__(self, *args, **kwargs):
        self.record = self.synchronize = self.wait_stream = self.wait_event = lambda *args: None


@pytest.fixture(scope="module")
def streams():
    """Stand-ins for CUDA's streams, which asynchronous scheduling uses, where there is no GPU."""
    import torch

    stands = {"Event": _Done, "Stream": _Done, "current_stream": _Done, "stream": lambda stream: nullcontext()}
    with pytest.MonkeyPatch.context() as patch:
        for name, stand in stands.items():
            if not torch.cuda.is_available():
                patch.setattr(torch.cuda, name, stand)
        yield


@contextmanager
def _scheduling_ahead():
    """vLLM's CPU platform turns asynchronous scheduling off; for engines that are loaded meanwhile it does not."""
    prepare_environment(cpu=True)
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def check_and_turn_on(config):
        chosen = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "check_and_update_config", staticmethod(check_and_turn_on))
        yield


@pytest.fixture
def scheduled_ahead(streams):
    """Sessions that the test loads with ``async_scheduling`` schedule a step while the one before it runs."""
    with _scheduling_ahead():
        yield


@pytest.fixture(scope="module")
def ahead(mtp, streams):
    """The same session as ``mtp``, but that it schedules a step while the one before it runs."""
    options = {**OPTIONS, "async_scheduling": True}
    with _scheduling_ahead():
        session = polydraft.load(
            "builtin:tiny-e2b", backend="vllm", dtype="float32", num_speculative_tokens=4, engine_options=options
        )
    with session:
        yield session
    gc.collect()


@pytest.fixture(params=["mtp", "ahead"])
def either(request):
    """Both of them."""
    return request.getfixturevalue(request.param)
