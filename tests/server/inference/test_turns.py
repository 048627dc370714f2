"""Photos wait for their turn, in order, and none is lost by those that give up."""

import asyncio

from server.inference.turns import Turns


def test_so_many_have_a_turn_and_the_others_follow_in_order() -> None:
    async def scenario() -> None:
        turns = Turns(2)
        begun: list[int] = []
        may_end = [asyncio.Event() for _ in range(4)]

        async def photo(number: int) -> None:
            async with turns.turn():
                begun.append(number)
                await may_end[number].wait()

        tasks = [asyncio.create_task(photo(number)) for number in range(4)]
        await asyncio.sleep(0)
        assert begun == [0, 1]
        assert turns.waiting() == 2
        await asyncio.sleep(0.01)
        assert turns.longest_wait_s() >= 0.01
        may_end[1].set()
        await tasks[1]
        await asyncio.sleep(0)
        assert begun == [0, 1, 2]
        for event in may_end:
            event.set()
        await asyncio.gather(*tasks)
        assert begun == [0, 1, 2, 3]
        assert turns.waiting() == 0
        assert turns.longest_wait_s() == 0

    asyncio.run(scenario())


def test_who_gives_up_takes_no_turn_along() -> None:
    async def scenario() -> None:
        turns = Turns(1)

        async def photo() -> None:
            async with turns.turn():
                await asyncio.sleep(0)

        for _ in range(20):
            tasks = [asyncio.create_task(photo()) for _ in range(5)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[2].cancel()
            await asyncio.wait(tasks)
        assert turns.waiting() == 0
        async with asyncio.timeout(10), turns.turn():
            pass

    asyncio.run(scenario())
