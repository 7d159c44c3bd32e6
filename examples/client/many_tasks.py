"""The same client in a trio program: every method is awaited.

vtpm exec guest1 -- python many_tasks.py, on a TPM without an owner
"""

import os

import trio

from daemons.open_tpm import open_tpm


async def main(path: str) -> None:
    """Read PCRs while keys are made."""
    async with open_tpm(path) as tpm:
        await tpm.take_ownership()

        async def watch(pcr: int) -> None:
            print("PCR", pcr, "is", (await tpm.pcr_read(pcr)).hex())

        async with trio.open_nursery() as nursery:
            for pcr in (10, 11):
                nursery.start_soon(watch, pcr)
            await tpm.create_wrap_key(0x0010)


trio.run(main, os.environ["TPM_DEVICE"])
