"""A TPM from a trio program: `async with open_tpm(path) as tpm: await tpm.pcr_read(10)`.

Every method of the blocking client is here under its own name, awaitable, with its own types: each
runs in a worker thread, one at a time, because a TPM does one thing at a time. A cancelled method
leaves the command to end by itself: the TPM has it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Concatenate, Generic, ParamSpec, TypeVar

import trio

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from tpm12.client import TpmClient

P = ParamSpec("P")
R = TypeVar("R")


class _Awaitable(Generic[P, R]):
    """A method of `TpmClient`, run in a thread."""

    def __init__(self, method: Callable[Concatenate[TpmClient, P], R]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, tpm: AsyncTpm, _owner: type[AsyncTpm]) -> Callable[P, Awaitable[R]]:
        def call(*args: P.args, **kwargs: P.kwargs) -> Awaitable[R]:
            return tpm.in_thread(partial(self._method, tpm.blocking, *args, **kwargs))

        return call


class AsyncTpm:
    """One TPM.

    Attributes:
        blocking: The client that does the work.
    """

    def __init__(self, blocking: TpmClient) -> None:
        self.blocking = blocking
        self._one = trio.CapacityLimiter(1)

    async def in_thread(self, call: Callable[[], R]) -> R:
        """Run blocking work with the TPM, after what was asked before."""
        return await trio.to_thread.run_sync(call, limiter=self._one)

    call = _Awaitable(TpmClient.call)
    oiap = _Awaitable(TpmClient.oiap)
    osap = _Awaitable(TpmClient.osap)
    dsap = _Awaitable(TpmClient.dsap)
    end_session = _Awaitable(TpmClient.end_session)
    startup = _Awaitable(TpmClient.startup)
    continue_self_test = _Awaitable(TpmClient.continue_self_test)
    get_capability = _Awaitable(TpmClient.get_capability)
    get_property = _Awaitable(TpmClient.get_property)
    handles = _Awaitable(TpmClient.handles)
    flush_specific = _Awaitable(TpmClient.flush_specific)
    get_random = _Awaitable(TpmClient.get_random)
    pcr_read = _Awaitable(TpmClient.pcr_read)
    pcr_values = _Awaitable(TpmClient.pcr_values)
    extend = _Awaitable(TpmClient.extend)
    pcr_reset = _Awaitable(TpmClient.pcr_reset)
    quote = _Awaitable(TpmClient.quote)
    create_endorsement_key_pair = _Awaitable(TpmClient.create_endorsement_key_pair)
    read_pubek = _Awaitable(TpmClient.read_pubek)
    owner_read_internal_pub = _Awaitable(TpmClient.owner_read_internal_pub)
    take_ownership = _Awaitable(TpmClient.take_ownership)
    owner_clear = _Awaitable(TpmClient.owner_clear)
    seal = _Awaitable(TpmClient.seal)
    unseal = _Awaitable(TpmClient.unseal)
    create_wrap_key = _Awaitable(TpmClient.create_wrap_key)
    load_key2 = _Awaitable(TpmClient.load_key2)
    sign = _Awaitable(TpmClient.sign)
    nv_define_space = _Awaitable(TpmClient.nv_define_space)
    nv_write_value = _Awaitable(TpmClient.nv_write_value)
    nv_read_value = _Awaitable(TpmClient.nv_read_value)
    create_counter = _Awaitable(TpmClient.create_counter)
    increment_counter = _Awaitable(TpmClient.increment_counter)
    read_counter = _Awaitable(TpmClient.read_counter)


@asynccontextmanager
async def open_tpm(path: str | Path) -> AsyncIterator[AsyncTpm]:
    """Connect to a TPM on a stream socket: a guest's tpm0, a simulator, swtpm.

    Args:
        path: The socket.

    Raises:
        Failure: Nobody serves it, or no permission.
    """
    connection = await trio.to_thread.run_sync(Tpm0Client, Path(path))
    try:
        yield AsyncTpm(TpmClient(connection.exchange, rng=SystemRng()))
    finally:
        connection.close()
