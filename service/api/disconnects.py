"""Work that ends when its client leaves."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

T = TypeVar("T")


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled once the client has gone.

    What it held in a queue or in a batch is then free for others.

    Raises:
        ClientDisconnect: nobody is left to answer.
    """
    answer = asyncio.create_task(work)
    gone = asyncio.create_task(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns once the client has gone; its request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
