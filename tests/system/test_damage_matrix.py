"""Every kind of file x every damage x each state of the stack: right service, or a good refusal.

A refusal has a reason, an exit status and a next step, and leaves the file as it was; no outcome is
a new TPM or a wrong answer, and what is put right serves again. CI draws a sample of cells from the
seed; the whole matrix runs with DAMAGE_CELLS=all (an hour), one cell with -k.

Damage inside stores is swept finer, without processes, in `tests/daemons/test_store_damage.py`.
"""

import contextlib
import os
import random
import signal

import pytest

from daemons.errors import Failure
from daemons.policy import BUILT_IN
from protocol.return_codes import ReturnCode, TpmError
from tests.system.belongings import NV_INDEX, Belongings
from tests.system.damage import (
    CHIP,
    CONTENTS,
    DAMAGES,
    DOWN,
    FILES,
    LAUNCHER,
    RESTARTING,
    check_said,
    look_at,
    there,
    watched,
)
from tests.system.measured_boot import sha1
from tests.system.scratch_stack import (
    ALL,
    GUEST1,
    GUEST2,
    example,
    kill_and_wait,
    scratch_stack,
    wait_until,
)

SAMPLE = 6
POLICY = "".join(
    f'[[allow]]\nfrontend = "{rule.frontend}"\nbackend = "{rule.backend}"\n'
    f"same_user = {str(rule.needs_same_user).lower()}\n"
    for rule in BUILT_IN.rules
)
"""As the built-in one, but in a file that can be damaged."""
SETTLED = ("running", "failed")
MARK = b"\x42" * 20
MARKED = sha1(bytes(20) + MARK)

pytestmark = pytest.mark.slow


def all_cells():
    return [
        (state, kind, damage)
        for kind, file in FILES.items()
        for state in file.states
        for damage in DAMAGES
        if damage != "swapped" or file.other is not None
        if damage not in CONTENTS or file.has_meaning
    ]


def pytest_generate_tests(metafunc):
    if "cell" not in metafunc.fixturenames:
        return
    cells = all_cells()
    if os.environ.get("DAMAGE_CELLS") != "all":
        chosen = metafunc.config.getoption("seed")
        cells = random.Random(1 if chosen is None else chosen).sample(cells, SAMPLE)
    cells.sort(key=lambda cell: cell[0] != DOWN)
    metafunc.parametrize("cell", cells, ids=[" ".join(cell) for cell in cells])


class Installation:
    """A stack that is brought into any state, and what its guest has in its TPM."""

    def __init__(self, stack):
        self.stack = stack
        self.things = Belongings()
        self.older = {}
        self._in_doubt = None

    def be_up(self):
        self.stack.vtpm("up", *(example(name) for name in ALL))
        self.stack.until_running(*ALL)

    def be_down(self):
        self.stack.vtpm("down", status=None)
        self.stack.kill_everything()

    def is_right(self):
        """The same TPM, its owner, its NV memory, its secret; and it can be changed."""
        self._settle()
        self.things.check(self.stack, GUEST1)
        changed = bytes([self.things.nv_data[0] ^ 1]) + self.things.nv_data[1:]
        self._in_doubt = changed
        with self.stack.tpm(GUEST1) as tpm:
            tpm.nv_write_value(NV_INDEX, changed, owner_auth=self.things.owner_auth)
        self.things.nv_data, self._in_doubt = changed, None

    def _settle(self):
        """A write whose manager or chip ended under it failed, and is found stored or not."""
        if self._in_doubt is not None:
            with self.stack.tpm(GUEST1) as tpm:
                found = tpm.nv_read_value(
                    NV_INDEX, len(self._in_doubt), owner_auth=self.things.owner_auth
                )
            if found == self._in_doubt:
                self.things.nv_data = found
            self._in_doubt = None


class Installations:
    """One after the other: what a cell has spoiled, the cells after it do not inherit."""

    def __init__(self):
        self._open = contextlib.ExitStack()
        self._made = None

    @contextlib.contextmanager
    def one(self):
        """The one that there is, or a new one."""
        if self._made is None:
            self._made = self._open.enter_context(new_installation())
        try:
            yield self._made
        except BaseException:
            with contextlib.suppress(Exception):  # what it was that failed is told below
                self._made.be_down()
            self.close()
            raise

    def close(self):
        """End it."""
        self._made = None
        self._open.close()


@pytest.fixture(scope="module")
def installations():
    made = Installations()
    yield made
    made.close()


@contextlib.contextmanager
def new_installation():
    with scratch_stack() as stack:
        stack.make_images()
        for guest in (GUEST1, GUEST2):
            stack.make_boot(guest)
        for daemon in ("launcherd", "vtpmmgrd"):
            stack.set(daemon, 'log_level = "info"')
        stack.places.policy.write_text(POLICY)
        stack.places.policy.chmod(0o600)
        made = Installation(stack)
        made.be_up()
        made.older = {
            name: b"" if file.is_stranger else file.where(stack).read_bytes()
            for name, file in FILES.items()
        }
        made.things.put_into(stack, GUEST1)
        for _ in range(3):  # so that an older copy is older by more than one
            made.is_right()
        yield made


def restart(stack, owner, damage):
    """Kill a daemon, with the damage done before anything can read the file again.

    Returns:
        How the launcher was started again, if it was the one.
    """
    if owner == LAUNCHER:
        kill_and_wait(stack.pid(LAUNCHER))
        damage()
        return stack.vtpm("up", status=None)
    pid = stack.pid(owner)
    os.kill(pid, signal.SIGSTOP)
    damage()
    kill_and_wait(pid)
    wait_until(
        lambda: (row := stack.row(owner))["state"].startswith(SETTLED) and row["pid"] != pid,
        f"{owner} runs again or is refused",
        60,
    )
    return None


def outcome(made, state, owner, damage):
    """Damage a file in a state of the stack; what was said if that was refused, else nothing."""
    stack = made.stack
    if state == DOWN:
        damage()
        said = stack.vtpm("up", *(example(name) for name in ALL), status=None)
        return check_said(said) if said.status else ""
    if state == RESTARTING:
        said = restart(stack, owner, damage)
        if said is not None:
            return check_said(said) if said.status else ""
        state_now = stack.row(owner)["state"]
        assert state_now.startswith("running") or ": " in state_now, state_now
        return "" if state_now.startswith("running") else state_now
    damage()
    for words in (["list"], ["status"], ["pcrs", GUEST1], ["pcrs", CHIP]):
        said = stack.vtpm(*words, status=None)
        if said.status:
            check_said(said)
    try:
        made.is_right()
    except (TpmError, Failure) as refused:
        return str(refused)
    return ""


def check_no_clean_pcrs(stack, domid):
    """The boot that extended PCR 10 finds it extended; only another boot finds it as after one."""
    with stack.tpm(GUEST1) as tpm:
        expected = MARKED if stack.row(GUEST1)["domid"] == domid else bytes(20)
        assert tpm.pcr_read(10) == expected


def boots_something_else(made, kind):
    """Whether the guest was measured as another one, and so gets no secret of this one's."""
    made.be_up()
    if kind != "guest image":
        return False
    try:
        made.things.check(made.stack, GUEST1)
    except TpmError as error:
        if error.code != ReturnCode.WRONGPCRVAL:
            raise
        return True
    return False


def test_damage_is_refused_or_does_not_matter(installations, seed, cell):
    with installations.one() as installation:
        put_to_the_test(installation, seed, *cell)


def put_to_the_test(installation, seed, state, kind, damage):
    stack, file = installation.stack, FILES[kind]
    installation.be_up()
    with stack.tpm(GUEST1) as tpm:
        if tpm.pcr_read(10) == bytes(20):
            tpm.extend(10, MARK)
    domid = stack.row(GUEST1)["domid"]
    if state == DOWN:
        installation.be_down()
    path = file.where(stack)
    other = b"" if file.other is None else file.other(stack).read_bytes()
    seen = []
    with there(file, path), watched(path) as damaged:

        def do_damage():
            DAMAGES[damage](damaged, random.Random(seed), installation.older[kind], other)
            seen.append(look_at(path))

        refused = outcome(installation, state, file.owner, do_damage)
        doctor = stack.vtpm("doctor", status=None)
        assert doctor.status in {0, 65, 66, 69, 77, 78}, doctor
        assert "Traceback" not in doctor.err
        if refused:
            if str(path) in refused:
                assert look_at(path) == seen[0], "what was refused was not left as it was"
        elif boots_something_else(installation, kind):
            # A guest may boot what it likes; what is sealed to another kernel stays closed.
            installation.be_down()
        else:
            installation.is_right()
            if state != DOWN:
                check_no_clean_pcrs(stack, domid)
            installation.be_down()
            if file.is_written:  # else nobody has mended it, and it is put right for the next start
                damaged.accept()
    installation.be_down()
    installation.be_up()
    installation.is_right()
