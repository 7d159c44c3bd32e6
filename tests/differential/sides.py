"""One TPM of two, and what was seen of it: the same script runs on both, then they are compared.

A scenario is a function of a `Side`. It speaks through `side.tpm` (a Witness) and may work the
platform: `power_on`, `hash_sequence`. Everything that passes is kept as a `Seen`; `note` gives a
name to what passed since the last one.
"""

import contextlib
from dataclasses import dataclass
from functools import cache

from tests.differential.masks import masked
from tests.differential.other_tpm import OtherTpmEndedError, in_fips_mode, other_tpm
from tests.tpm12.conftest import Bench
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK_AUTH,
    Witness,
    key_template,
    number,
    oaep,
    parse_pubkey,
    rsa_parms,
    sized,
    u16,
)
from tpm12.commands import ALL
from tpm12.state import factory_state

STARTUP, RESET = 0x99, 0x5A
CREATE_EK, READ_PUBEK, TAKE_OWNERSHIP = 0x78, 0x7C, 0x0D
FIPS = " in FIPS mode"
"""Behind the name of a start: TPM_PERMANENT_FLAGS.FIPS is set, which no command does."""
ENDED = "the process ended"
ERROR_TAG = b"\x00\xc4"


@dataclass
class Seen:
    """One exchange.

    Attributes:
        step: The name that the scenario gives it.
        ordinal: What was asked.
        code: The return code; None where the TPM died of it.
        shown: What of the response has to agree.
        request, response: The bytes, for a report.
    """

    step: str
    ordinal: int
    code: int | None
    shown: str
    request: bytes
    response: bytes


class Side:
    """A TPM under comparison; what both kinds of it share."""

    def __init__(self, exchange):
        self.seen: list[Seen] = []
        self.hides = False
        self._exchange = exchange
        self._unnamed = 0
        self.tpm = Witness(self._recorded)

    def _recorded(self, request, locality):
        ordinal = number(request[6:10])
        try:
            response = self._exchange(request, locality)
        except OtherTpmEndedError:
            self.seen.append(Seen("", ordinal, None, ENDED, request, b""))
            raise
        shown = masked(request, response, is_hidden=self.hides)
        code = number(response[6:10])
        self.seen.append(Seen("", ordinal, code, shown, request, response))
        # libtpms has errors with other tags; that is compared above, and no matter for the script.
        return ERROR_TAG + response[2:] if code else response

    def exchange_unseen(self, request, locality):
        """Send a request that is not compared."""
        return self._exchange(request, locality)

    def note(self, step, answer=None):
        """Name what passed since the last note; gives the answer back."""
        for seen in self.seen[self._unnamed :]:
            seen.step = step
        self._unnamed = len(self.seen)
        return answer

    def rested(self):
        """Drop sessions that failed steps left; the witness."""
        self.tpm.send(RESET)
        return self.tpm

    def started(self, startup_type=1):
        """TPM_Init and TPM_Startup."""
        self.power_on()
        return self.tpm.send(STARTUP, u16(startup_type))

    def power_on(self):
        """TPM_Init."""
        raise NotImplementedError

    def hash_sequence(self, data):
        """The hash sequence of a dynamic launch."""
        raise NotImplementedError


class Ours(Side):
    """This project's engine."""

    def __init__(self, state, commands=ALL):
        self.bench = Bench(state, commands=commands)
        super().__init__(self._run)

    def _run(self, request, locality):
        outcome = self.bench.engine.execute(request, locality)
        self.bench.engine.keep(outcome)
        return outcome.response

    def power_on(self):
        self.bench.engine.keep(self.bench.engine.power_on())

    def hash_sequence(self, data):
        engine = self.bench.engine
        engine.keep(engine.hash_start())
        engine.keep(engine.hash_data(data))
        engine.keep(engine.hash_end())


class Theirs(Side):
    """swtpm."""

    def __init__(self, other):
        super().__init__(other.exchange)
        self._other = other

    def power_on(self):
        self._other.power_on()

    def hash_sequence(self, data):
        self._other.hash_sequence(data)


# -- where scenarios begin -------------------------------------------------------------------------


def _prepare(side, start):
    """Bring a factory TPM to where a scenario starts: "factory", "with_ek" or "owned"."""
    assert start in {"factory", "with_ek", "owned"}
    side.started()
    if start == "factory":
        return
    side.tpm.send(CREATE_EK, side.tpm.nonce() + rsa_parms()).ok()
    if start == "owned":
        take_ownership(side.tpm).ok()


def take_ownership(tpm, *, owner=OWNER_AUTH, srk=SRK_AUTH, wanted=None, protocol=5):
    """TPM_TakeOwnership of a TPM that shows its EK."""
    _, modulus, _ = parse_pubkey(tpm.send(READ_PUBEK, tpm.nonce()).ok())
    secrets = sized(oaep(modulus, owner)) + sized(oaep(modulus, srk))
    params = u16(protocol) + secrets + (wanted or key_template(0x11))
    return tpm.auth(TAKE_OWNERSHIP, params, tpm.oiap(owner).ending())


@cache
def _our_image(start):
    side = Ours(factory_state())
    _prepare(side, start.removesuffix(FIPS))
    if start.endswith(FIPS):
        side.bench.set_flags(fips=True)
    return side.bench.state


@cache
def their_image(start):
    with other_tpm() as other:
        _prepare(Theirs(other), start.removesuffix(FIPS))
        permanent = other.permanent()
    return in_fips_mode(permanent) if start.endswith(FIPS) else permanent


def ours(start, commands=ALL):
    """Our engine, started up."""
    side = Ours(_our_image(start), commands)
    side.started()
    side.seen.clear()
    return side


@contextlib.contextmanager
def theirs(start):
    """swtpm, started up."""
    with other_tpm(their_image(start)) as other:
        side = Theirs(other)
        side.started()
        side.seen.clear()
        yield side


# -- comparing -------------------------------------------------------------------------------------


@dataclass
class Difference:
    """Where the two disagree."""

    at: int
    mine: Seen | None
    other: Seen | None

    @property
    def step(self):
        return (self.mine or self.other).step

    @property
    def ordinal(self):
        return (self.mine or self.other).ordinal

    def __str__(self):
        lines = [f"exchange {self.at}, step {self.step!r}, ordinal 0x{self.ordinal:x}"]
        for name, seen in (("engine", self.mine), ("swtpm", self.other)):
            if seen is None:
                lines.append(f"  {name}: nothing was sent")
            else:
                lines += [
                    f"  {name} got       {seen.request.hex()}",
                    f"  {name} answered  {seen.response.hex()}",
                    f"  {name} compared  {seen.shown}",
                ]
        return "\n".join(lines)


def differences(mine: list[Seen], other: list[Seen]) -> list[Difference]:
    """Exchange by exchange; where one side asked something else, all that follows is moot."""
    found = []
    for at in range(max(len(mine), len(other))):
        left = mine[at] if at < len(mine) else None
        right = other[at] if at < len(other) else None
        if (
            left is None
            or right is None
            or (left.step, left.ordinal) != (right.step, right.ordinal)
        ):
            found.append(Difference(at, left, right))
            break
        if left.shown != right.shown:
            found.append(Difference(at, left, right))
    return found
