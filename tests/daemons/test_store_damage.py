"""What can happen to a store's file, and what may follow: the right state, or a named refusal.

Chip, vTPM and manager each with the same damage: bits, ends, zeros, another file, an older one, one
that cannot be read. A refusal has a reason, an exit status and a next step, and changes no byte.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from uuid import UUID

import pytest

from daemons.chip_memory import FILE_BYTES, ChipMemory
from daemons.errors import ExitCode, Failure
from daemons.manager.anchoring import Anchored
from daemons.manager.vault import Vault, inspect
from daemons.manager.vault_format import PAGE_BYTES, Anchorage
from daemons.vtpm.image import VtpmImage
from tests.daemons.manager.vault_bench import KEY, record_of, uuid_of
from tests.fakes.faulty_disk import FaultyDisk
from tpm12.state import Permanent

OURS = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
OTHER = UUID("6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f")
VTPM_BYTES = 16 * 1024
ANCHORAGE = Anchorage(nv_index=0x15000, secret=bytes(20), is_confirmed=True)
REFUSALS = {ExitCode.DAMAGED, ExitCode.IO_ERROR, ExitCode.CONFIGURATION}
NEW = "a new TPM, or nobody known"


class Memory:
    """The manager's record for a vTPM, or the chip's for a manager."""

    def __init__(self) -> None:
        self.hash_key: bytes | None = None
        self.anchored: Anchored | None = None

    def load_hash_key(self) -> bytes | None:
        return self.hash_key

    def save_hash_key(self, hash_key: bytes) -> None:
        self.hash_key = hash_key

    def read(self, _anchorage: Anchorage) -> Anchored | None:
        return self.anchored

    def write(self, _anchorage: Anchorage, anchored: Anchored) -> None:
        self.anchored = anchored


def state(number: int) -> Permanent:
    return Permanent(no_owner_nv_write=number, saved_state=bytes([number]) * 900)


@dataclass(frozen=True)
class Store:
    """One kind of store, with two states written one after the other."""

    older: bytes
    newest: bytes
    look: Callable[[FaultyDisk], Hashable]
    right: Hashable
    live: tuple[range, ...]
    """Where damage may hit something that counts."""


def chip() -> Store:
    disk = FaultyDisk(bytes(FILE_BYTES))
    memory = ChipMemory(disk)
    memory.load()
    memory.save(state(1))
    older = bytes(disk.visible)
    memory.save(state(2))
    memory.save(state(3))

    def look(disk: FaultyDisk) -> Hashable:
        found = ChipMemory(disk).load()
        return NEW if found is None else found.no_owner_nv_write

    half = FILE_BYTES // 2
    live = tuple(range(at, at + 1500) for at in (0, half, half - 4096, 2 * half - 4096))
    return Store(older, bytes(disk.visible), look, 3, live)


def vtpm() -> Store:
    disk, manager = FaultyDisk(bytes(VTPM_BYTES)), Memory()
    image = VtpmImage(disk, OURS, manager)
    image.load()
    image.save(state(1))
    older = bytes(disk.visible)
    image.save(state(2))
    image.save(state(3))

    def look(disk: FaultyDisk) -> Hashable:
        found = VtpmImage(disk, OURS, manager).load()
        return NEW if found is None else found.no_owner_nv_write

    return Store(older, bytes(disk.visible), look, 3, (range(1500), range(8192, 9692)))


def manager() -> Store:
    disk, anchor = FaultyDisk(bytes(16 * PAGE_BYTES)), Memory()
    vault = Vault.create(
        disk,
        KEY,
        vault_id=bytes(16),
        seals=(),
        random_bytes=random.Random(1).randbytes,
        anchor=anchor,
    )
    vault.set_anchorage(ANCHORAGE)
    vault.save(record_of(1))
    older = bytes(disk.visible)
    vault.save(record_of(1, 2))

    def look(disk: FaultyDisk) -> Hashable:
        # What `opening.py` does with an image that looks blank: the chip has an anchor.
        if inspect(disk).is_blank:
            raise Failure("blank", why="x", next_step="y", exit_code=ExitCode.DAMAGED)
        random_bytes = random.Random(2).randbytes
        opened = Vault.open(disk, lambda _h: KEY, random_bytes=random_bytes, anchor=anchor)
        found = opened.load(uuid_of(1))
        return NEW if found is None else found.hash_key

    return Store(
        older,
        bytes(disk.visible),
        look,
        record_of(1, 2).hash_key,
        (range(16 * PAGE_BYTES),),
    )


STORES: dict[str, Callable[[], Store]] = {"chip": chip, "vtpm": vtpm, "manager": manager}


@pytest.fixture(params=STORES, scope="module")
def store(request) -> Store:
    return STORES[request.param]()


def outcome(store: Store, contents: bytes, disk: FaultyDisk | None = None) -> str:
    """What comes of it; anything but the right state and a good refusal fails the test."""
    disk = disk or FaultyDisk(contents)
    try:
        found = store.look(disk)
    except Failure as failure:
        refused = failure
    else:
        assert found == store.right, f"a wrong answer: {found!r}"
        return "served"
    assert all((refused.what, refused.why, refused.next_step))
    assert refused.exit_code in REFUSALS
    assert bytes(disk.visible) == contents, "a refused file was changed"
    return "refused"


def test_what_is_intact_is_served(store):
    assert outcome(store, store.newest) == "served"


def test_flipped_bits(store):
    source = random.Random(5)
    outcomes = set()
    for _ in range(400):
        contents = bytearray(store.newest)
        contents[source.choice(source.choice(store.live))] ^= 1 << source.randrange(8)
        outcomes.add(outcome(store, bytes(contents)))
    assert outcomes == {"served", "refused"}


@pytest.mark.parametrize("length", [1, 512, 4096])
def test_zeroed_and_overwritten_runs(store, length):
    source = random.Random(length)
    for _ in range(100):
        at = source.choice(source.choice(store.live))
        at = min(at - at % length, len(store.newest) - length)
        for run in (bytes(length), b"\xff" * length, source.randbytes(length)):
            outcome(store, store.newest[:at] + run + store.newest[at + length :])


@pytest.mark.parametrize("part", [0.0, 0.01, 0.25, 0.5, 0.75, 0.999])
def test_truncated(store, part):
    assert outcome(store, store.newest[: int(len(store.newest) * part)]) == "refused"


# Nothing below the chip remembers: its file is what a real chip has inside. An older one of it, and
# a blank one, are found out by the manager's image (tests/power_loss/test_anchored_vault.py).
@pytest.mark.parametrize("name", ["vtpm", "manager"])
def test_an_older_copy_and_a_blank_one(name):
    store = STORES[name]()
    assert outcome(store, store.older) == "refused"
    assert outcome(store, bytes(len(store.newest))) == "refused"


def test_a_mixture_of_old_and_new_sectors(store):
    source = random.Random(7)
    for _ in range(150):
        size = source.choice((512, 4096, 8192))
        cut = source.choice(source.choice(store.live)) // size * size
        mixed = store.newest[:cut] + store.older[cut : cut + size] + store.newest[cut + size :]
        outcome(store, mixed)


@pytest.mark.parametrize(("name", "other"), list(itertools.permutations(STORES, 2)))
def test_the_file_of_another_store(name, other):
    store, theirs = STORES[name](), STORES[other]().newest
    fitted = theirs[: len(store.newest)].ljust(len(store.newest), b"\0")
    assert outcome(store, fitted) == "refused"


def test_the_same_store_of_another_domain():
    ours = vtpm()
    disk = FaultyDisk(bytes(VTPM_BYTES))
    theirs = VtpmImage(disk, OTHER, Memory())
    theirs.load()
    theirs.save(state(3))
    assert outcome(ours, bytes(disk.visible)) == "refused"


def test_a_disk_that_cannot_be_read_or_synced(store):
    class Unreadable(FaultyDisk):
        bad: range = range(0)

        def read(self, offset: int, length: int) -> bytes:
            if offset < self.bad.stop and self.bad.start < offset + length:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(offset, length)

    outcomes = set()
    for part in store.live:
        for at in range(part.start, part.stop, 4096):
            disk = Unreadable(store.newest)
            disk.bad = range(at, at + 512)
            outcomes.add(outcome(store, store.newest, disk))
    assert "refused" in outcomes
    everywhere = Unreadable(store.newest)
    everywhere.bad = range(len(store.newest))
    assert outcome(store, store.newest, everywhere) == "refused"
