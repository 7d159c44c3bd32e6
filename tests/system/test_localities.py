"""Localities from end to end: at every door, a peer has those that it was given and no other.

Which PCRs a locality may extend and reset is the table of the PC Client TIS 1.2, §3.7. It is asked
through real processes: tpm0 (locality 0), a vTPM's ring (what `locality=` allows), and the chip's
pages (those that `iomem=` granted).
"""

from __future__ import annotations

import os

import pytest

from daemons.ring_client import RingClient
from daemons.tis_link import ChipRefused, TisLink
from daemons.world import SystemRng
from protocol.return_codes import ReturnCode, TpmError
from tests.system.scratch_stack import (
    FIRST_CHAIN,
    GUEST1,
    VTPM1,
    VTPM2,
    scratch_stack,
)
from tpm12.client import TpmClient

DIGEST = b"\x5a" * 20
EVERY = frozenset(range(5))
NONE: frozenset[int] = frozenset()
EXTENDS = {
    **dict.fromkeys((*range(17), 23), EVERY),
    17: {2, 3, 4},
    18: {2, 3, 4},
    19: {2, 3},
    20: {1, 2, 3},
    21: {2},
    22: {2},
}
RESETS = {
    **dict.fromkeys(range(16), NONE),
    **dict.fromkeys((16, 23), EVERY),
    **dict.fromkeys((17, 18, 19), frozenset({4})),
    20: {2, 4},
    21: {2},
    22: {2},
}
BY_LABEL = 'extra="loglevel=debug locality=system_u:system_r:domU_t=0,2"'
RING_DOMAIN = """
name="{name}"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
vtpm=["backend={vtpm}"]
"""
PAGES_DOMAIN = """
name="witness"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
seclabel="system_u:system_r:dom0_t"
iomem=["{pages}"]
"""


def outcome(method, *arguments):
    try:
        method(*arguments)
    except TpmError as refusal:
        return refusal.code
    return ReturnCode.SUCCESS


def assert_table(tpm, locality, untouched=()):
    """Extend and reset every PCR, but those that others of the platform stand on."""
    for pcr in set(range(24)) - set(untouched):
        may = locality in EXTENDS[pcr]
        expected = ReturnCode.SUCCESS if may else ReturnCode.BAD_LOCALITY
        assert outcome(tpm.extend, pcr, DIGEST) is expected, f"extend of PCR {pcr}"
        if locality in RESETS[pcr]:
            expected = ReturnCode.SUCCESS
        else:
            expected = ReturnCode.NOTRESETABLE if pcr < 16 else ReturnCode.NOTLOCAL
        assert outcome(tpm.pcr_reset, pcr) is expected, f"reset of PCR {pcr}"


@pytest.fixture(scope="module")
def stack():
    with scratch_stack() as made:
        made.make_images()
        made.make_boot(GUEST1)
        made.up(*FIRST_CHAIN)
        made.vtpm("create", made.variant(VTPM2, {'extra="loglevel=debug"': BY_LABEL}))
        yield made


# -- tpm0 ------------------------------------------------------------------------------------------


def test_tpm0_is_locality_0(stack):
    with stack.tpm(GUEST1) as tpm:
        assert_table(tpm, 0)


# -- a vTPM's ring ---------------------------------------------------------------------------------


def exchange_at(ring, locality):
    return TpmClient(lambda request: ring.exchange(request, locality), rng=SystemRng())


def test_ring_gives_a_frontend_what_the_rule_for_its_label_says(stack):
    text = RING_DOMAIN.format(name="attached", vtpm=VTPM2)
    stack.ask("attach_external", config_text=text, pid=os.getpid())
    try:
        with RingClient(stack.places.domain(VTPM2).ring_socket) as ring:
            ring.connect(10.0)
            for locality in (0, 2):
                assert_table(exchange_at(ring, locality), locality)
            for claimed in (1, 3, 4, 5, 255):
                tpm = exchange_at(ring, claimed)
                before = exchange_at(ring, 0).pcr_values()
                assert outcome(tpm.extend, 16, DIGEST) is ReturnCode.FAIL, f"claims {claimed}"
                assert outcome(tpm.pcr_read, 16) is ReturnCode.FAIL, f"claims {claimed}"
                assert exchange_at(ring, 0).pcr_values() == before
    finally:
        stack.vtpm("destroy", "attached")


def test_ring_without_a_rule_gives_locality_0_alone(stack):
    stack.vtpm("shutdown", GUEST1)
    text = RING_DOMAIN.format(name="attached", vtpm=VTPM1)
    stack.ask("attach_external", config_text=text, pid=os.getpid())
    try:
        with RingClient(stack.places.domain(VTPM1).ring_socket) as ring:
            ring.connect(10.0)
            assert_table(exchange_at(ring, 0), 0)
            for claimed in (1, 2, 3, 4):
                refused = outcome(exchange_at(ring, claimed).extend, 16, DIGEST)
                assert refused is ReturnCode.FAIL, f"claims {claimed}"
    finally:
        stack.vtpm("destroy", "attached")


# -- the chip's pages ------------------------------------------------------------------------------


@pytest.fixture
def attached(stack):
    """Attach this process with some pages of the chip."""
    yield lambda pages: stack.ask(
        "attach_external", config_text=PAGES_DOMAIN.format(pages=pages), pid=os.getpid()
    )
    stack.vtpm("destroy", "witness")


@pytest.mark.parametrize("locality", sorted(EVERY))
def test_page_of_the_chip_is_its_locality(stack, attached, locality):
    attached(f"fed4{locality},1")
    with TisLink(stack.places.tis_socket, locality, use_interrupts=False) as link:
        # The manager's secrets hang on PCR 0-7 and 17-19 of this chip, and it may have to unseal.
        untouched = {*range(8), 17, 18, 19} & {p for p in EXTENDS if locality in EXTENDS[p]}
        assert_table(TpmClient(link.exchange, rng=SystemRng()), locality, untouched)
        link.relinquish()


def test_page_that_was_not_granted_is_not_there(stack, attached):
    attached("fed41,1")
    with TisLink(stack.places.tis_socket, 1, use_interrupts=False) as link:
        assert len(TpmClient(link.exchange, rng=SystemRng()).pcr_read(0)) == 20
        link.relinquish()
    for locality in (0, 2, 3, 4):
        link = TisLink(stack.places.tis_socket, locality, use_interrupts=False)
        with pytest.raises(ChipRefused, match=f"locality {locality}"), link:
            link.exchange(b"")
