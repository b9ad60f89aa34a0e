"""A run: many clients, few slots, and everything that may change under them."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from tests.bench.client import HttpClient
from tests.chaos.actor import Actor
from tests.chaos.ledger import Ledger
from tests.chaos.world import prepare_world

SETTINGS = {
    "num_slots": 3,
    "max_batch_rows": 8,
    "max_queue": 64,
    "runtime_lora_updating": True,
}
"""So few slots that adapters push each other out all the time."""

LOUD_ALPHA = 16.0
"""Of the tiny bundle: its adapters must change what its base says, each in its own way."""


async def run_chaos(
    url: str,
    tasks: tuple[str, ...],
    *,
    seconds: float,
    clients: int,
    seed: int,
    on_ready: Callable[[], None] = lambda: None,
) -> Ledger:
    """Lets clients loose on a service that is otherwise idle.

    Args:
        url: of a service with `SETTINGS`, in float32.
        tasks: descriptions of its bundle; each gives adapters of several strengths.
        seconds: of chaos, after the references were made.
        clients: at a time.
        seed: of all that is random.
        on_ready: called when the references are made and the chaos begins.
    """
    ledger = Ledger()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(HttpClient(url))
        world = await prepare_world(first, tasks)
        print(
            f"{len(world.specimens)} adapters, {len(world.references)} references, "
            f"{clients} clients, {seconds:g} s",
            flush=True,
        )
        on_ready()
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                client = await stack.enter_async_context(HttpClient(url))
                actor = Actor(client, world, ledger, seed * 1_000 + number)
                group.create_task(actor.act(until))
    return ledger
