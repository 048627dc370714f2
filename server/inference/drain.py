"""The server's way down: no new requests are wanted, and at last none is waited for."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from server.inference.errors import GoingDown

__all__ = ["Drain"]

Result = TypeVar("Result")


class Drain:
    """Tells whether the server is about to stop."""

    def __init__(self) -> None:
        self.begun = False
        """Whether no more requests are wanted; those that come nevertheless are served."""
        self._giving_up = asyncio.Event()

    def begin(self) -> None:
        """Want no more requests."""
        self.begun = True

    def give_up(self) -> None:
        """Let requests with several photos wait no longer: the drain's time is nearly up."""
        self._giving_up.set()

    def check(self) -> None:
        """Check that requests are welcome.

        Raises:
            GoingDown: they are not.
        """
        if self.begun:
            raise GoingDown(_GOING_DOWN)

    async def unless_given_up(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, if the drain's time suffices; see `give_up`.

        Raises:
            GoingDown: it does not.
        """
        doing = asyncio.ensure_future(work)
        giving_up = asyncio.ensure_future(self._giving_up.wait())
        try:
            await asyncio.wait((doing, giving_up), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise GoingDown(_GOING_DOWN)
            return await doing
        finally:
            doing.cancel()
            giving_up.cancel()
            # Its exception's traceback has this frame: the two would keep each other, and a photo.
            del doing


_GOING_DOWN = "The server is going down: send requests to another one."
