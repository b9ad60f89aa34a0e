r"""Python client of the HTTP interface: `Client`, and `AsyncClient` with the same methods.

It needs httpx2 and pydantic, and nothing else of this project:

    with Client("http://127.0.0.1:8000", api_key="...") as client:
        adapter = client.generate("Continue in the style of a cooking recipe.")
        print(client.infer("Apple pie\n\n", adapter_id=adapter.adapter_id).text)
"""

from service.client.async_client import AsyncClient
from service.client.errors import ApiError, ClientError, UnreachableError
from service.client.retries import RetryPolicy
from service.client.sync_client import Client

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "ClientError",
    "RetryPolicy",
    "UnreachableError",
]
