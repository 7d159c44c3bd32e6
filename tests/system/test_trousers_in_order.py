"""All of tpm-tools, one user's session in one order, on a guest's TPM, a simulator, and swtpm.

Each line of the session says what it must show, or which command must be refused with which code,
and where the specification says so. The third TPM is the second opinion: what the tools print on it
is the same but for what is named in `DIFFERENT`.
"""

import contextlib
import re
import shlex
import shutil
from dataclasses import dataclass

import pytest

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import KeyHandleValue, Ordinal
from protocol.return_codes import TpmError
from tests.clients.one_tpm import simulator, swtpm
from tests.clients.trousers import trousers_on, why_not
from tests.system.scratch_stack import FIRST_CHAIN, GUEST1, scratch_stack, vtpm_command
from tpm12.client import TpmClient

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"TrouSerS: {why_not()}")

OWNER, NEXT_OWNER, WRONG = "first secret", "second secret", "a guess"
SECRET = "the disk key\n"
PERMISSIONS = "OWNERREAD|OWNERWRITE"

AUTHFAIL, CLEAR_DISABLED, DISABLED, DISABLED_CMD = 0x01, 0x05, 0x07, 0x08
INSTALL_DISABLED, DECRYPT_ERROR = 0x0B, 0x21
BAD_PRESENCE, PERMANENTEK, DEFEND_LOCK_RUNNING = 0x2D, 0x61, 0x803
GET_STATUS = Ordinal.GET_CAPABILITY_OWNER
GUESSES_MAX = 64
NV_INDEX_LOCK = 0xFFFFFFFF
COMMAND_ENABLE, PRESENT = 0x0020, 0x0008


@dataclass(frozen=True)
class Line:
    """One line of the session.

    Attributes:
        words: As in a shell.
        shows: What stands in its output: a regular expression.
        refused: Ordinal and return code of the command that is refused; None if none is.
        typed: What the person types at its prompts.
        sends_nothing: The tool's own stack refuses; the TPM never hears of it.
    """

    words: str
    shows: str = ""
    refused: tuple | None = None
    typed: tuple | None = None
    sends_nothing: bool = False


def owner(words, shows="", refused=None, secret=OWNER):
    """A line at whose prompt the owner's password is typed."""
    return Line(words, shows, refused, (secret,))


def say_that_somebody_is_there(tpm):
    """What a platform's setup does when its user says so; TSC_PhysicalPresence, Part 3 §6.6."""
    for value in (COMMAND_ENABLE, PRESENT):
        tpm.call(Ordinal.TSC_PHYSICAL_PRESENCE, physical_presence=value)


def guess_until_locked(tpm):
    """Somebody tries passwords. How many it takes is the TPM's own affair (Part 1, §28)."""
    for _ in range(GUESSES_MAX):
        with pytest.raises(TpmError) as refused:
            tpm.owner_read_internal_pub(KeyHandleValue.SRK, WRONG.encode().ljust(20))
        if refused.value.code == DEFEND_LOCK_RUNNING:
            return
    pytest.fail("guessing goes on for ever")


SESSION = (
    Line("tpm_version", r"Chip Version: +1\.2\.\d.*\n +Spec Level: +2\n +Errata Revision: +3"),
    Line("tpm_selftest -l info", "tpm_selftest succeeded"),
    Line("tpm_takeownership -z", "Confirm password", typed=(OWNER, OWNER)),
    # TPM_TakeOwnership has set readPubek FALSE (§6.1): TPM_ReadPubek is off, and the tool asks the
    # owner for TPM_OwnerReadInternalPub.
    owner("tpm_getpubek", "2048 bits", (Ordinal.READ_PUBEK, DISABLED_CMD)),
    owner(f"tpm_nvdefine -i 0x10 -s 32 -p '{PERMISSIONS}' --pwdo", "Successfully created"),
    owner("tpm_nvwrite -i 0x10 -d 'hello nv' --password", "Successfully wrote 8 bytes"),
    owner("tpm_nvread -i 0x10 -s 8 --password", "68 65 6c 6c 6f 20 6e 76 +hello nv"),
    owner("tpm_nvread -i 0x10 -s 8 --password", "", (Ordinal.NV_READ_VALUE, AUTHFAIL), WRONG),
    Line("tpm_nvinfo -i 0x10", r"OWNERREAD\|OWNERWRITE\)\n(.*\n)+Size +: 32 "),
    owner("tpm_nvrelease -i 0x10 --pwdo", "Successfully released NVRAM area"),
    Line("tpm_nvinfo -n", r"^(?!.*0x00000010)"),
    Line("tpm_sealdata -i plain -o sealed -p 4 -p 5 -z"),
    Line("tpm_unsealdata -i sealed -z", SECRET),
    Line("tpm_changeownerauth -o", "Confirm", typed=(OWNER, NEXT_OWNER, NEXT_OWNER)),
    owner("tpm_setenable -s", "", (GET_STATUS, AUTHFAIL)),
    # From here on the second password is the owner's. The first it is no longer, as seen.
    owner("tpm_setenable -d", secret=NEXT_OWNER),
    Line("tpm_sealdata -i plain -o sealed -z", refused=(Ordinal.GET_RANDOM, DISABLED)),
    owner("tpm_setenable -e", secret=NEXT_OWNER),
    owner("tpm_setenable -s", "Disabled status: false", secret=NEXT_OWNER),
    # §5.5: TPM_PhysicalSetDeactivated wants somebody to be there.
    owner(
        "tpm_setactive -i",
        refused=(Ordinal.PHYSICAL_SET_DEACTIVATED, BAD_PRESENCE),
        secret=NEXT_OWNER,
    ),
    say_that_somebody_is_there,
    owner("tpm_setactive -i", secret=NEXT_OWNER),
    # It is off from the next start on: TPM_STCLEAR_FLAGS.deactivated is still FALSE.
    owner(
        "tpm_setactive -s",
        "Persistent Deactivated Status: true\nVolatile Deactivated Status: false",
        secret=NEXT_OWNER,
    ),
    owner("tpm_setactive -a", secret=NEXT_OWNER),
    owner("tpm_setactive -s", "Persistent Deactivated Status: false", secret=NEXT_OWNER),
    # §5.4 TPM_SetOwnerInstall: with an owner it answers TPM_SUCCESS and changes nothing.
    Line("tpm_setownable -p", typed=(NEXT_OWNER,)),
    owner("tpm_setownable -s", "Ownable status: true", secret=NEXT_OWNER),
    Line("tpm_setclearable -f"),
    owner(
        "tpm_setclearable -s",
        "Owner Clear Disabled: false\nForce Clear Disabled: true",
        secret=NEXT_OWNER,
    ),
    Line("tpm_clear -f", refused=(Ordinal.FORCE_CLEAR, CLEAR_DISABLED)),
    owner("tpm_setpresence -s", "Physical Presence: true", secret=NEXT_OWNER),
    # Debian's tcsd is built without it: no software on a platform says that a person is there.
    Line("tpm_setpresence -c -z", "Not implemented", sends_nothing=True),
    owner("tpm_restrictpubek -r", secret=NEXT_OWNER),
    owner("tpm_restrictpubek -s", "readable by: owner", secret=NEXT_OWNER),
    owner("tpm_getpubek", "2048 bits", (Ordinal.READ_PUBEK, DISABLED_CMD), NEXT_OWNER),
    guess_until_locked,
    owner(
        "tpm_setenable -s",
        "defending against dictionary",
        (GET_STATUS, DEFEND_LOCK_RUNNING),
        NEXT_OWNER,
    ),
    owner("tpm_resetdalock", secret=NEXT_OWNER),
    owner("tpm_setenable -s", "Disabled status: false", secret=NEXT_OWNER),
    # §14.3: the maker's key was not made with TPM_CreateRevocableEK.
    Line("tpm_revokeek -i twenty-bytes", refused=(Ordinal.REVOKE_TRUST, PERMANENTEK)),
    owner("tpm_clear", "", (Ordinal.OWNER_CLEAR, AUTHFAIL), WRONG),
    owner("tpm_clear", secret=NEXT_OWNER),
    # §6.2: without an owner it is disabled, and deactivated from the next start on.
    Line("tpm_takeownership -y -z", refused=(Ordinal.READ_PUBEK, DISABLED)),
)

AFTERWARDS = (
    # Somebody is still there: that flag lasts until the next start.
    Line("tpm_setenable -e -f"),
    Line("tpm_setactive -a"),
    # Without an owner these two have an effect, and the second is undone by somebody who is there.
    Line("tpm_setownable -p"),
    Line("tpm_takeownership -y -z", refused=(Ordinal.TAKE_OWNERSHIP, INSTALL_DISABLED)),
    Line("tpm_setownable -a"),
    Line("tpm_takeownership -y -z"),
    Line("tpm_unsealdata -i sealed -z", refused=(Ordinal.LOAD_KEY2, DECRYPT_ERROR)),
    Line("tpm_setclearable -o -z"),
    Line("tpm_clear -z", refused=(Ordinal.OWNER_CLEAR, CLEAR_DISABLED)),
)


DIFFERENT = (
    # tpm_version of Debian prints what lies before its text in memory.
    (r".*  TPM 1.2 Version Info", "TPM 1.2 Version Info"),
    (r"Chip Version: .*", "the maker's own number"),
    (r"TPM Vendor ID: .*", "the maker"),
    (r"Manufacturer Info: .*", "the maker"),
    (r"TPM Test Results: .*", "the maker's own words"),
    (r"(\t[0-9a-f ]{71}\n)+", "a key"),
    # One more is not seen here, because the flag is set before it is looked at: in libtpms
    # physicalPresenceCMDEnable is TRUE from the beginning, while Part 2 §7.1 says FALSE.
)


class Player:
    """Plays a session on a TPM and writes down what the tools print."""

    def __init__(self, trousers):
        self._trousers = trousers
        self.printed = []
        (trousers.directory / "plain").write_text(SECRET)
        (trousers.directory / "twenty-bytes").write_bytes(bytes(20))

    def play(self, lines):
        for line in lines:
            if not isinstance(line, Line):
                with Tpm0Client(self._trousers.directory / "tpm0") as tpm0:
                    line(TpmClient(tpm0.exchange, rng=SystemRng()))
                continue
            said = self._trousers.run(*shlex.split(line.words), typed=line.typed, status=None)
            self.printed.append(f"$ {line.words}\n{said.out}")
            _check(line, said)


def _check(line, said):
    refused = set() if line.refused is None else {line.refused}
    assert said.refusals == refused, str(said)
    assert re.search(line.shows, said.out, re.MULTILINE), f"not shown: {line.shows}\n{said}"
    if line.sends_nothing:
        assert not said.passed or said.has_failed, str(said)
    elif line.refused is None:
        assert not said.has_failed, str(said)


# -- the TPMs --------------------------------------------------------------------------------------


@contextlib.contextmanager
def a_guests_tpm():
    """guest1's tpm0, and tcsd run inside guest1."""
    with scratch_stack() as stack:
        stack.make_images()
        stack.make_boot(GUEST1)
        stack.up(*FIRST_CHAIN)
        inside = [*vtpm_command(), "exec", GUEST1, "--"]
        tpm0 = stack.places.domain(GUEST1).tpm0
        with trousers_on(tpm0, within=inside, environment=stack.environment) as tools:
            yield tools


@contextlib.contextmanager
def a_simulator():
    with simulator() as tpm, trousers_on(tpm) as tools:
        yield tools


@contextlib.contextmanager
def a_swtpm():
    with swtpm() as tpm:
        with Tpm0Client(tpm) as client:
            made = TpmClient(client.exchange, rng=SystemRng())
            made.create_endorsement_key_pair()
            # As a maker leaves it. Before that, NV areas ask nobody for authorization (§20).
            made.nv_define_space(NV_INDEX_LOCK, 0, 0, owner_auth=None)
        with trousers_on(tpm, takes_one=True) as tools:
            yield tools


needs_swtpm = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")


@pytest.fixture(
    scope="module",
    params=[a_guests_tpm, a_simulator, pytest.param(a_swtpm, marks=needs_swtpm)],
    ids=lambda made: made.__name__,
)
def printed(request):
    """The whole session on each TPM; what the tools printed, by its name."""
    with request.param() as tools:
        player = Player(tools)
        player.play((*SESSION, *AFTERWARDS))
    return request.param.__name__, player.printed


SEEN = {}


def test_whole_session_goes_as_stated(printed):
    name, lines = printed
    assert len(lines) == sum(isinstance(line, Line) for line in (*SESSION, *AFTERWARDS))
    SEEN[name] = [masked(line) for line in lines]


@needs_swtpm
def test_tools_print_the_same_on_swtpm():
    if len(SEEN) < 3:
        pytest.skip("not all of the sessions above were played to their end in this run")
    for ours in (SEEN["a_guests_tpm"], SEEN["a_simulator"]):
        for line, other in zip(ours, SEEN["a_swtpm"], strict=True):
            assert line == other


def masked(printed):
    """What tools print without what two TPMs may differ in."""
    for pattern, instead in DIFFERENT:
        printed = re.sub(pattern, instead, printed)
    return printed


# -- an endorsement key that can be revoked --------------------------------------------------------

NO_ENDORSEMENT = 0x23


@contextlib.contextmanager
def a_simulator_without_a_key():
    with simulator("--no-ek") as tpm, trousers_on(tpm) as tools:
        yield tools


@contextlib.contextmanager
def a_swtpm_without_a_key():
    with swtpm() as tpm, trousers_on(tpm, takes_one=True) as tools:
        yield tools


@pytest.mark.parametrize(
    "tpm",
    [a_simulator_without_a_key, pytest.param(a_swtpm_without_a_key, marks=needs_swtpm)],
    ids=lambda made: made.__name__,
)
def test_revocable_endorsement_key_is_made_and_revoked(tpm):
    """TPM_CreateRevocableEK and TPM_RevokeTrust, Part 3 §14.2 and §14.3."""
    with tpm() as tools:
        (tools.directory / "wrong").write_bytes(b"\x01" * 20)
        Player(tools).play(
            (
                Line("tpm_getpubek", refused=(Ordinal.READ_PUBEK, NO_ENDORSEMENT)),
                Line("tpm_createek -r -g -o revoking"),
                Line("tpm_getpubek", "2048 bits"),
                # Revoking wants somebody to be there, and the secret that was drawn with the key.
                Line("tpm_revokeek -i revoking", refused=(Ordinal.REVOKE_TRUST, BAD_PRESENCE)),
                say_that_somebody_is_there,
                Line("tpm_revokeek -i wrong", refused=(Ordinal.REVOKE_TRUST, AUTHFAIL)),
                Line("tpm_takeownership -y -z"),
                Line("tpm_revokeek -i revoking"),
            )
        )
        # The owner is gone with the key, and as after TPM_OwnerClear the TPM is disabled.
        Player(tools).play(
            (
                Line("tpm_getpubek", refused=(Ordinal.READ_PUBEK, DISABLED)),
                Line("tpm_setenable -e -f"),
                Line("tpm_getpubek", refused=(Ordinal.READ_PUBEK, NO_ENDORSEMENT)),
                Line("tpm_createek"),
                Line("tpm_takeownership -y -z"),
                Line("tpm_revokeek -i revoking", refused=(Ordinal.REVOKE_TRUST, PERMANENTEK)),
            )
        )
