"""Generated sequences of commands, played on this engine and on swtpm.

Hypothesis draws the lines of a script (`script.py`). Where the two TPMs part, the script is made as
short as it gets and shown; `python -m tests.differential.replay FILE` plays it again. The budget is
in seconds (DIFFERENTIAL_BUDGET_S, 45 when not given), and `--seed N` draws other sequences. What is
drawn depends on the seed alone, never on the budget: a longer run begins with the shorter one.
"""

import itertools
import os
import random
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from protocol.return_codes import ReturnCode
from tests.differential.deviations.administration import ALLOW_MAINTENANCE
from tests.differential.other_tpm import needs_swtpm, other_tpm
from tests.differential.replay import play, played, shortened, unexplained
from tests.differential.script import AREAS, OPERATIONS, SECRETS, TEMPLATES, TRANSPORTS, Player
from tests.differential.sides import Theirs, ours, their_image
from tests.differential.test_differential import wrong_engine
from tpm12.commands import ALL

pytestmark = [pytest.mark.slow, needs_swtpm]

BUDGET_S = float(os.environ.get("DIFFERENTIAL_BUDGET_S", "45"))
SHORTEN_S = 30
ROUND = 20
"""Sequences drawn from one seed; the next ones are drawn from the next."""
ATTRIBUTES = (
    "1", "2", "4", "20002", "40004", "1001", "2001", "4001", "8001", "80000001", "10001", "40001",
    "20001", "80040004", "6", "0",
)  # fmt: skip
SMALL = st.integers(0, 4)
PCRS = st.sampled_from((0, 1, 9, 10, 16, 17, 20, 22, 23, 24))
LEGAL_PCRS = PCRS.filter(lambda index: index < 24)
SIZES = st.sampled_from((0, 1, 8, 9, 20))
WRITERS = st.sampled_from(("nobody", "owner", "area", "wrong"))
READERS = st.sampled_from(("nobody", "owner", "area"))
IN_AREA = (st.sampled_from(tuple(AREAS)), SIZES, SIZES)
ANY_SECRET = st.sampled_from(tuple(SECRETS))
DRAWN = set()
"""Operations that a rule draws."""


def line(word, *parts):
    """Lines of one operation."""
    DRAWN.add(word)
    return st.tuples(*parts).map(lambda drawn: " ".join([word, *map(str, drawn)]))


SESSIONS = st.one_of(
    line("oiap", ANY_SECRET),
    line("osap", st.sampled_from(("owner", "srk", "key", "counter")), ANY_SECRET),
    line("info", SMALL),
    line("make-under", SMALL),
    line("sign-under", SMALL, SMALL, SIZES),
    line("end", SMALL),
    line("reset"),
)
CONTEXTS = st.one_of(
    line("save-key", SMALL),
    line("save-session", SMALL),
    line("load-context", SMALL, st.sampled_from((0, 1))),
)
WRAPPED = st.one_of(
    line("pcr", LEGAL_PCRS), line("extend", LEGAL_PCRS, st.just("a")), line("oiap", ANY_SECRET),
    line("info", SMALL), line("make", st.just("signing")), line("sign", SMALL, st.just(20)),
    line("reload", SMALL), line("flush", SMALL), line("counter-read", SMALL), line("table"),
    line("read", READERS, *IN_AREA), line("write", WRITERS, *IN_AREA), line("reset"),
    line("save-key", SMALL), line("load-context", SMALL, st.just(1)),
    line("clear", st.just("owner")),
)  # fmt: skip
TRANSPORT = st.one_of(
    line("transport", st.sampled_from(tuple(TRANSPORTS))),
    line("through", SMALL, WRAPPED),
    line("through", SMALL, WRAPPED),
    line("release-transport", SMALL, SMALL),
    line("end-transport", SMALL),
)
PERMISSIONS = st.sampled_from(("0", "ffffffff", "1fffffff", "80000000", "4000", "40000"))
DELEGATION = st.one_of(
    line("family", st.sampled_from((0, 1, 1))),
    line("manage", SMALL, st.sampled_from(("on", "off", "lock", "end"))),
    line("delegate-owner", SMALL, PERMISSIONS),
    line("delegate-srk", SMALL, PERMISSIONS),
    line("dsap", SMALL),
    line("dsap-row", st.sampled_from((0, 1, 9))),
    line("load-row", SMALL, st.sampled_from((0, 1))),
    line("verify-delegation", SMALL),
    line("update-delegation", SMALL),
    line("table"),
    line("pubek", SMALL),
)
KEYS = st.one_of(
    line("make", st.sampled_from(tuple(TEMPLATES))),
    line("make", st.just("signing"), st.just("wrong")),
    line("reload", SMALL),
    line("sign", SMALL, SIZES),
    line("sign", SMALL, st.just(20), ANY_SECRET),
    line("sign-freely", SMALL),
    line("public", SMALL, st.sampled_from(("key", "wrong"))),
    line("quote", SMALL, LEGAL_PCRS),
    line("flush", SMALL),
    line("seal", st.sampled_from((0, 1, 20, 149))),
    line("seal", st.just(20), st.sampled_from((9, 10, 16))),
    line("unseal", SMALL),
    line("unseal", SMALL, st.just("wrong")),
)
PLATFORM_CONFIGURATION = st.one_of(
    line("extend", PCRS, st.sampled_from("ab"), SMALL),
    line("pcr", PCRS),
    line("pcr-reset", LEGAL_PCRS, SMALL),
)
MEMORY = st.one_of(
    line("define", st.sampled_from(tuple(AREAS)), st.sampled_from(ATTRIBUTES), SIZES),
    line("nv-lock"),
    line("write", WRITERS, *IN_AREA),
    line("read", READERS, *IN_AREA),
    line("counter"),
    line("increment", SMALL, st.sampled_from(("area", "wrong"))),
    line("release", SMALL),
    line("counter-read", SMALL),
)
OWNERSHIP = st.one_of(
    line("clear", st.sampled_from(("owner", "wrong"))),
    line("capability", st.just("4"), st.sampled_from(("flags", "volatile"))),
    line("capability", st.just("5"), st.sampled_from(("00000111", "00000104", "0000010a"))),
    line("capability", st.sampled_from(("7", "d")), st.just("-")),
    *[
        line(word)
        for word in (
            "take", "force-clear", "enable", "disable", "activate", "deactivate", "deactivate-now",
            "install", "no-install", "presence-command", "present", "absent", "presence-lock",
            "power", "resume", "make-ek",
        )
    ],
)  # fmt: skip


class Sequences(RuleBasedStateMachine):
    """Both TPMs, and the script so far.

    Attributes:
        deadline: When the budget ends; then what is drawn is not played any more.
        commands: The engine's.
        failure: The script that the two part at, and the difference.
        lines_played: Over all sequences.
    """

    deadline = 0.0
    commands = ALL
    failure = None
    lines_played = 0

    def __init__(self):
        super().__init__()
        self.is_over = self.failure is None and time.monotonic() > self.deadline
        self.lines: list[str] = []
        self.other = None

    @initialize(start=st.sampled_from(("owned", "owned", "owned", "with_ek", "factory")))
    def begin(self, start):
        if self.is_over:
            return
        self.lines.append(f"start {start}")
        self.context = other_tpm(their_image(start))
        self.other = self.context.__enter__()
        self.players = (Player(ours(start, self.commands)), Player(Theirs(self.other)))
        self.players[1].side.started()
        self.players[1].side.seen.clear()

    def play(self, text):
        if self.is_over:
            return
        self.lines.append(text)
        type(self).lines_played += 1
        for player in self.players:
            player.side.seen.clear()
            player.side._unnamed = 0
            player.play(text)
        found = unexplained(*[player.side.seen for player in self.players])
        if found:
            type(self).failure = (list(self.lines), found)
            raise AssertionError("\n".join([*self.lines, *map(str, found)]))

    def teardown(self):
        if self.other:
            self.context.__exit__(None, None, None)

    # Each as often as another, whatever the number of its operations.
    contexts = rule(text=CONTEXTS)(lambda self, text: self.play(text))
    transport = rule(text=TRANSPORT)(lambda self, text: self.play(text))
    delegation = rule(text=DELEGATION)(lambda self, text: self.play(text))
    sessions = rule(text=SESSIONS)(lambda self, text: self.play(text))
    keys = rule(text=KEYS)(lambda self, text: self.play(text))
    pcrs = rule(text=PLATFORM_CONFIGURATION)(lambda self, text: self.play(text))
    memory = rule(text=MEMORY)(lambda self, text: self.play(text))
    ownership = rule(text=OWNERSHIP)(lambda self, text: self.play(text))


def search(budget_s, first_seed, commands=ALL):
    """Draw sequences until two TPMs part or the budget is spent; the class, which knows."""
    machine = type(
        "Sequences",
        (Sequences,),
        {"deadline": time.monotonic() + budget_s, "commands": commands},
    )
    how = settings(
        max_examples=ROUND,
        stateful_step_count=40,
        phases=[Phase.generate],  # made shorter below, with a budget
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        database=None,
    )
    try:
        for number in itertools.count(first_seed):
            run_state_machine_as_test(seeded(number)(machine), settings=how)
            if time.monotonic() > machine.deadline:
                break
    except AssertionError:
        if machine.failure is None:
            raise
    return machine


@pytest.fixture
def first_seed(pytestconfig):
    """Of `--seed N`; in CI always the same, elsewhere always another."""
    chosen = pytestconfig.getoption("seed")
    if chosen is None and settings().derandomize:
        chosen = 0
    return random.SystemRandom().getrandbits(32) if chosen is None else chosen * ROUND


def shortest(lines, commands=ALL):
    """The failing script without what it does not need."""
    deadline = time.monotonic() + SHORTEN_S
    return shortened(
        lines, lambda fewer: time.monotonic() < deadline and bool(played(fewer, commands))
    )


@pytest.mark.timeout(300 + 2 * BUDGET_S)
def test_generated_sequences_are_answered_the_same(first_seed):
    machine = search(BUDGET_S, first_seed)
    if machine.failure:
        lines = shortest(machine.failure[0])
        script = "\n".join(lines)
        found = "\n".join(map(str, played(lines)))
        pytest.fail(f"the TPMs part; replay this:\n\n{script}\n\n{found}", pytrace=False)
    assert machine.lines_played > 0


@pytest.mark.parametrize(
    "lines",
    [
        # A context is as long as its maker likes, also where its length is all that can be seen.
        ("start owned", "make der", "transport encrypted", "through 0 save-key 0"),
    ],
    ids=["save-key"],
)
def test_what_generated_sequences_have_found(lines):
    assert not played(lines)


def test_a_wrong_engine_is_found_and_its_script_is_short(first_seed):
    wrong = wrong_engine("Extend", {ReturnCode.BADINDEX: ReturnCode.BAD_PARAMETER})
    machine = search(BUDGET_S, first_seed, wrong)
    assert machine.failure, "nothing was found in the time there is"
    lines = shortest(machine.failure[0], wrong)
    assert len(lines) == 2
    assert lines[1].startswith("extend 24")
    assert played(lines, wrong)
    assert not played(lines)


def test_a_named_deviation_is_passed_over_and_nothing_beside_it():
    asked = ["start owned", "clear owner", "capability 4 flags"]
    assert not played(asked)
    mine, other = ours("owned"), ours("owned")
    for side, lines in ((mine, asked), (other, asked)):
        play(side, lines)
    changed = bytearray(mine.seen[-1].response)
    changed[ALLOW_MAINTENANCE] = 0
    other.seen[-1] = replace(other.seen[-1], response=bytes(changed), shown="without maintenance")
    assert not unexplained(mine.seen, other.seen)
    changed[ALLOW_MAINTENANCE + 1] ^= 1
    other.seen[-1] = replace(other.seen[-1], response=bytes(changed), shown="and one more")
    assert len(unexplained(mine.seen, other.seen)) == 1


def test_every_operation_is_drawn_or_is_for_scripts_by_hand():
    assert OPERATIONS.keys() - {"start", "raw"} == DRAWN


def test_lines_that_are_none_are_refused():
    player = Player(ours("factory"))
    with pytest.raises(ValueError, match="no such operation"):
        player.play("dance")
