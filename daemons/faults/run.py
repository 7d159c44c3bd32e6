"""A plan applied to a stack that runs or starts: processes from here, all else in the daemons."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from daemons.errors import ExitCode, Failure
from daemons.faults.control import FaultControl, Line
from daemons.faults.plan import (
    EVERY_DOMAIN,
    LAUNCHER,
    ROLES,
    Fault,
    FaultPlan,
    Kind,
    PlanError,
    What,
)
from daemons.faults.schedule import Due, schedule
from daemons.faults.stopped import Process, Stopped
from daemons.guest.tpm0_client import Tpm0Client
from daemons.launcher.processes import is_alive, send_signal
from daemons.places import CHIP_NAME, DOMAIN0_NAME, Places
from daemons.registry import Registry, Role

HEALTHY_S: Final = 60.0
"""How long a stack may take to be whole again after the last fault."""
ANSWER_S: Final = 20.0
"""How long a guest's TPM may take to answer at the end."""
LOOK_AGAIN_S: Final = 0.02
TELL_AGAIN_S: Final = 5.0
START_MAX_S: Final = 60.0
"""A stack that starts is left alone after so long, or it might never come up."""
PCR_READ: Final = bytes.fromhex("00c1 0000000e 00000015 00000000")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """A line of the run log.

    Attributes:
        at_s: Seconds after the start of the run.
        fault: Number in the plan.
        where: The place.
        what: The fault, or "continue" for the end of a stop.
        operation: Which message or step it was; 0 for a fault of a process.
        note: Why it was not done, if it was not.
    """

    at_s: float
    fault: int
    where: str
    what: str
    operation: int = 0
    note: str = ""

    def as_json(self) -> dict[str, object]:
        """The line for programs."""
        return {
            "at_s": round(self.at_s, 4),
            **{k: v for k, v in asdict(self).items() if k != "at_s"},
        }

    def __str__(self) -> str:
        operation = f", operation {self.operation}" if self.operation else ""
        note = f": {self.note}" if self.note else ""
        return f"{self.at_s:8.3f} s  fault {self.fault}: {self.what} {self.where}{operation}{note}"


@dataclass(slots=True, kw_only=True)
class FaultRun:
    """One run of a plan.

    Attributes:
        places: Of the installation.
        ask: Calls a method of the launcher.
        revive: Starts a launcher that was killed, as `vtpm up` does.
        tell: Called with each line of the run log.
        step: Called with what is being done.
        injected: The run log.
        operations: How many messages, steps or readings there were at which each fault inside a
            daemon could have happened, by its number.
    """

    places: Places
    ask: Callable[[str], Any]
    revive: Callable[[], None]
    tell: Callable[[Injected], None]
    step: Callable[[str], None]
    injected: list[Injected] = field(default_factory=list)
    operations: dict[int, int] = field(default_factory=dict)
    _before: dict[str, Row] = field(default_factory=dict)
    _begun: float = 0.0
    _begun_at: float = 0.0
    _stopped: Stopped = field(default_factory=Stopped)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _launcher_kills: int = 0
    _launcher_back_s: float = 0.0
    _is_starting: bool = False
    _is_over: threading.Event = field(default_factory=threading.Event)

    def run(self, plan: FaultPlan, content: bytes, name: str, for_s: float) -> list[str]:
        """Apply a plan to a stack that runs.

        Args:
            plan: What to do.
            content: Its file, as the daemons get it.
            name: What messages call it.
            for_s: How long, in seconds.

        Returns:
            What is not as it was; nothing, if the stack is whole and nobody has lost anything.

        Raises:
            Failure: The plan does not fit this stack, or the stack was not whole before.
        """
        self._before = self._rows()
        roles = roles_of(self._before)
        check_fits(plan, name, roles)
        self._check_is_whole()
        domains = hooked_domains(plan, roles)
        with FaultControl(self.places, domains) as control, self._stopped:
            for domain in domains:
                self._give_hooks(control, domain)
            control.arm(content)
            with contextlib.suppress(KeyboardInterrupt):
                self._inject(plan, for_s, control)
            self._end(plan, control)
        return self._problems()

    def start(
        self,
        plan: FaultPlan,
        content: bytes,
        for_s: float,
        bring_up: Callable[[], None],
        roles: Mapping[str, str],
    ) -> list[str]:
        """Apply a plan to a stack while it starts, from its first process on.

        Args:
            plan: What to do; it fits the stack (`check_fits`).
            content: Its file, as the daemons get it.
            for_s: How long, in seconds; at least until the stack is up.
            bring_up: Starts the stack; it may be called again when the launcher was killed.
            roles: The role of each domain that will be there.

        Returns:
            As `run`; also why the stack did not come up.
        """
        problems: list[str] = []
        self._is_starting = True
        with FaultControl(self.places, hooked_domains(plan, roles)) as control, self._stopped:
            control.arm(content)
            with ThreadPoolExecutor(1, thread_name_prefix="faults") as threads:
                injecting = threads.submit(self._inject, plan, for_s, control)
                try:
                    self._bring_up(bring_up)
                    self._before = self._rows()
                except Failure as failure:
                    problems = [f"the stack did not come up: {failure.what}: {failure.why}"]
                    self._is_over.set()
                except BaseException:  # also an interrupt: the other thread has to end
                    self._is_over.set()
                    raise
                finally:
                    self._is_starting = False
                with self._over_when_interrupted():
                    injecting.result()
            self._end(plan, control)
        return problems or self._problems()

    def never_happened(self, plan: FaultPlan) -> list[Fault]:
        """The faults of a plan that the run did not come to, or that found nobody."""
        happened = {line.fault for line in self.injected if not line.note}
        return [fault for fault in plan.faults if fault.number not in happened]

    def _bring_up(self, bring_up: Callable[[], None]) -> None:
        """Start the stack, as often as its launcher is killed meanwhile."""
        while True:
            kills = self._launcher_kills
            try:
                bring_up()
            except Failure:
                with self._turn:  # a kill is counted when its victim has already gone
                    if self._launcher_kills == kills:
                        raise
                continue
            with self._turn:
                if self._launcher_kills == kills:
                    self._is_starting = False
                    return

    @contextlib.contextmanager
    def _over_when_interrupted(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self._is_over.set()
        except BaseException:  # the other thread is waited for, and must not take its time
            self._is_over.set()
            raise

    def _end(self, plan: FaultPlan, control: FaultControl) -> None:
        self._stopped.resume_all()
        control.disarm()
        self._tell_lines(control.new_lines())
        self.operations = {fault.number: control.operations(fault) for fault in plan.hooked}

    # -- before

    def _check_is_whole(self) -> None:
        unwell = [f"{n} is {row['state']}" for n, row in self._before.items() if not _is_well(row)]
        if unwell:
            raise Failure(
                "no faults are injected",
                why=f"the stack is not whole: {', '.join(unwell)}",
                next_step="vtpm status",
                exit_code=ExitCode.UNAVAILABLE,
            )

    def _give_hooks(self, control: FaultControl, domain: str) -> None:
        """Start a daemon anew, as after a crash, so that it finds its page."""
        record = Registry(self.places.registry).get(domain)
        if record is None or record.uid != os.geteuid():
            raise Failure(
                f"no faults are injected into {domain}",
                why="it runs as another user, who cannot reach what this one writes",
                next_step="Use faults of processes, or a stack of your own: vtpm up",
                exit_code=ExitCode.NO_PERMISSION,
            )
        self.step(f"{domain}: killed once, to start with hooks")
        self._signal(domain, signal.SIGKILL)

        def is_there() -> bool:
            row = self._rows().get(domain)
            return row is not None and _is_well(row) and control.has_hooks(domain, row["pid"])

        if not _wait(is_there):
            raise Failure(
                f"no faults are injected into {domain}",
                why="it has not come back with hooks after it was killed",
                next_step=f"Look at {self.places.domain(domain).log}",
                exit_code=ExitCode.UNAVAILABLE,
            )

    # -- the run

    def _inject(self, plan: FaultPlan, for_s: float, control: FaultControl) -> None:
        self._begun, self._begun_at = time.monotonic(), time.time()
        faults = {fault.number: fault for fault in plan.faults}
        is_start = self._is_starting
        due = deque(schedule(plan, START_MAX_S if is_start else for_s))
        told_s = 0.0
        length = f"{for_s:g} s" + (", and until the stack is up" if is_start else "")
        self.step(f"injecting for {length}")
        while self._is_starting or self._passed_s() < for_s or (due and not is_start):
            if self._is_over.is_set() or self._has_been_taken_down():
                return
            while due and due[0].at_s <= self._passed_s():
                self._do(due[0], faults[due.popleft().number])
            self._tell_lines(control.new_lines())
            if self._passed_s() >= told_s + TELL_AGAIN_S:
                told_s = self._passed_s()
                self.step(f"{len(self.injected)} injected after {told_s:.0f} s")
            time.sleep(LOOK_AGAIN_S)

    def _do(self, due: Due, fault: Fault) -> None:
        name = fault.where.domain
        note = ""
        # We were starting it then, and could not look. Were each kill that was due meanwhile made
        # up for, and followed by a start, a run would go on long after its end.
        is_late = name == LAUNCHER and due.at_s < self._launcher_back_s
        if due.is_end:
            self._stopped.resume(fault.number)
            what = "continue"
        elif is_late:
            what, note = fault.what.value, "not done, it was being started"
        elif fault.what is What.STOP:
            what = fault.what.value
            process = self._process_of(name)
            is_done = process is not None and self._stopped.stop(fault.number, process)
            note = "" if is_done else "not done, it has no process now"
        else:
            what = fault.what.value
            note = "" if self._kill(name) else "not done, it has no process now"
        at_s = self._passed_s()
        self._add(
            Injected(at_s=at_s, fault=fault.number, where=str(fault.where), what=what, note=note)
        )
        if name == LAUNCHER and fault.what is What.KILL and not is_late and not self._is_starting:
            self.revive()
            self._launcher_back_s = self._passed_s()

    def _kill(self, name: str) -> bool:
        with self._turn:
            process = self._signal(name, signal.SIGKILL)
            if process is not None and name == LAUNCHER:
                self._launcher_kills += 1
                _wait(lambda: not is_alive(*process))
        return process is not None

    def _signal(self, name: str, number: signal.Signals) -> Process | None:
        """Send a signal to a domain's process; which it was, None if there was none."""
        process = self._process_of(name)
        return process if process is not None and send_signal(*process, number) else None

    def _process_of(self, name: str) -> Process | None:
        record = Registry(self.places.registry).get(_record_name(name))
        if record is None or record.pid is None or record.start_time is None:
            return None
        return record.pid, record.start_time

    def _tell_lines(self, lines: list[Line]) -> None:
        for line in lines:
            self._add(
                Injected(
                    at_s=max(0.0, line["time"] - self._begun_at),
                    fault=line["fault"],
                    where=line["where"],
                    what=line["what"],
                    operation=line["operation"],
                )
            )

    def _add(self, injected: Injected) -> None:
        self.injected.append(injected)
        self.tell(injected)

    def _passed_s(self) -> float:
        return time.monotonic() - self._begun

    # -- after

    def _problems(self) -> list[str]:
        self.step("waiting for the stack to be whole")
        after: dict[str, Row] = {}

        def is_whole() -> bool:
            # What is judged is what was seen last: a kill that was on its way when the plan ended
            # may still hit somebody between two looks.
            nonlocal after
            if not self._are_alive():
                return False
            after = self._rows()
            return all(name in after and _is_well(after[name]) for name in self._before)

        if not _wait(lambda: self._has_been_taken_down() or is_whole()):
            after = self._rows()
        elif self._has_been_taken_down():
            return [
                "it was taken down meanwhile: its launcher has ended, and by no fault of the plan"
            ]
        problems = []
        for name, before in self._before.items():
            row = after.get(name)
            if row is None:
                problems.append(f"{name} is gone")
            elif not _is_well(row):
                problems.append(f"{name} is {row['state']}")
            elif row["role"] == Role.GUEST.value and row["domid"] != before["domid"]:
                problems.append(f"{name} has booted again, with its vTPM reset: its programs ended")
            elif row["role"] == Role.GUEST.value and row["vtpms"] and not self._answers(name):
                problems.append(f"the TPM of {name} does not answer")
        return problems

    def _has_been_taken_down(self) -> bool:
        """Has the launcher ended otherwise than by us? We start it again ourselves, nobody else."""
        process = self._process_of(LAUNCHER)
        return not self._is_starting and (process is None or not is_alive(*process))

    def _are_alive(self) -> bool:
        registry = Registry(self.places.registry)
        for name in self._before:  # the launcher may not have heard yet of one that has just died
            record = registry.get(_record_name(name))
            if record is None or record.pid is None or record.start_time is None:
                return False
            if not is_alive(record.pid, record.start_time):
                return False
        return True

    def _answers(self, guest: str) -> bool:
        tpm0 = self.places.domain(guest).tpm0
        try:
            with Tpm0Client(tpm0, answer_s=ANSWER_S) as device:
                return device.exchange(PCR_READ)[6:10] == bytes(4)
        except (Failure, OSError):
            return False

    def _rows(self) -> dict[str, Row]:
        return rows_of(self.ask("status"))


def rows_of(status: Row) -> dict[str, Row]:
    """The launcher, the chip and the domains of a status, by the names that a plan has for them."""
    rows = {row["name"]: row for row in status["domains"]}
    return {LAUNCHER: status["launcher"], CHIP_NAME: status["chip"], **rows}


def roles_of(rows: Mapping[str, Row]) -> dict[str, str]:
    """The role of each."""
    return {name: str(row["role"]) for name, row in rows.items()}


def check_fits(plan: FaultPlan, name: str, roles: Mapping[str, str]) -> None:
    """Check that every place of a plan is there.

    Args:
        plan: The plan.
        name: What messages call it.
        roles: The role of each domain, the chip and the launcher.

    Raises:
        PlanError: One is not.
    """
    for fault in plan.faults:
        domain = fault.where.domain
        called = f"[[fault]] number {fault.number}"
        if domain != EVERY_DOMAIN and domain not in roles:
            raise PlanError(name, f"{called}: there is no {domain} here, but {', '.join(roles)}")
        has_it = ROLES.get(fault.kind)
        if has_it is not None and domain != EVERY_DOMAIN and roles[domain] not in has_it:
            raise PlanError(name, f"{called}: {domain} has no such place")


def hooked_domains(plan: FaultPlan, roles: Mapping[str, str]) -> list[str]:
    """Who has to have hooks for a plan, in the order of their names."""
    domains = {fault.where.domain for fault in plan.hooked}
    if EVERY_DOMAIN in domains:
        domains |= {name for name, role in roles.items() if role in ROLES[Kind.CLOCK]}
    return sorted(domains - {EVERY_DOMAIN})


def _record_name(name: str) -> str:
    return DOMAIN0_NAME if name == LAUNCHER else name


def _is_well(row: Row) -> bool:
    return row["state"] == "running" and row["pid"] is not None


def _wait(is_so: Callable[[], bool], patience_s: float = HEALTHY_S) -> bool:
    """Look again and again; other processes do not tell us."""
    deadline = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True
