"""The queue: clients take turns, and no place is lost whoever leaves when."""

import asyncio
import random

import pytest
from polydraft_server.admission import Admission
from polydraft_server.problems import ApiError


def test_places_are_given_back_whoever_leaves():
    async def go(seed):
        draw = random.Random(seed)
        admission = Admission(draw.randint(1, 3), 5)
        most, refused = 0, 0

        async def client(name):
            nonlocal most, refused
            for _ in range(5):
                try:
                    admitted = admission.admit(name, draw.randint(1, 2))
                except ApiError as error:
                    refused += error.problem.status == 429
                    await asyncio.sleep(0)
                    continue
                try:
                    async with asyncio.timeout(draw.choice([0, 0.0005, 1])):
                        async with admitted.turn():
                            most = max(most, admission.running)
                            await asyncio.sleep(draw.choice([0, 0.0001]))
                except TimeoutError:
                    pass
                finally:
                    admitted.close()

        await asyncio.wait_for(asyncio.gather(*(client(name % 4) for name in range(12))), 20)
        assert (admission.running, admission.waiting, admission._admitted) == (0, 0, 0)
        assert most == admission.limit
        return refused

    assert sum(asyncio.run(go(seed)) for seed in range(20)) > 0


def test_turns_go_round():
    async def go():
        admission, order = Admission(1, 100), []

        async def one(client, name):
            admitted = admission.admit(client, 1)
            async with admitted.turn():
                order.append(name)
                await asyncio.sleep(0)
            admitted.close()

        names = [("a", f"a{i}") for i in range(4)] + [("b", "b0"), ("c", "c0"), ("b", "b1")]
        await asyncio.gather(*(one(*name) for name in names))
        return order

    assert asyncio.run(go()) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


def test_a_stop_tells_those_that_wait():
    async def go():
        admission = Admission(1, 5)
        held = admission.admit("x", 1)
        async with held.turn():
            waiting = admission.admit("y", 1)

            async def wait():
                async with waiting.turn():
                    pass

            task = asyncio.create_task(wait())
            await asyncio.sleep(0)
            admission.stop()
            with pytest.raises(ApiError, match="stopping"):
                await task
            with pytest.raises(ApiError, match="stopping"):
                admission.admit("z", 1)
            waiting.close()
        held.close()
        assert admission._admitted == 0

    asyncio.run(go())
