"""Drives a store through every crash and every failure, and says where it broke its promise.

A scenario is a program over stores: `prepare` gives disks that hold a known state, `run` opens the
stores and makes changes, telling a `Witness` of each before and after, `look` opens what is left
and says which state it finds. The promise: what `look` finds is what was acknowledged last, or what
was under way; it opens; and that stays so when the power fails again while it opens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from daemons.errors import Failure
from tests.power_loss.machine import Fault, Machine, Plan, PowerLoss

State = Hashable


@dataclass(slots=True)
class Witness:
    """What a client was told."""

    acknowledged: State
    possible: set[State] = field(default_factory=set)
    """States of changes that were begun since, and not acknowledged: each may be found."""
    refused: int = 0

    def change(self, state: State, make: Callable[[], None]) -> None:
        """Make one change that leads to `state`; a `Failure` of it is the client's to see."""
        self.possible.add(state)
        try:
            make()
        except Failure:
            self.refused += 1
            return
        self.acknowledged = state
        self.possible = set()

    @property
    def allowed(self) -> set[State]:
        """What may be found."""
        return {self.acknowledged, *self.possible}


class Scenario(Protocol):
    """One program over stores."""

    initial: State

    def prepare(self) -> dict[str, bytes]:
        """Disks on which `initial` is durable."""

    def run(self, machine: Machine, witness: Witness) -> None:
        """Open the stores and make changes."""

    def look(self, machine: Machine) -> State:
        """Open what is there, and say what it is. Raises Failure when it does not open."""

    def go_on(self, machine: Machine) -> None:
        """Open what is there, change it, and see that the change is found."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A promise that was not kept."""

    where: str
    found: str


@dataclass(slots=True)
class Sweep:
    """All crashes of one scenario.

    Args:
        scenario: The program.
        budget: How many disks are tried for each point at which the power fails.
        again_budget: The same for a power loss during recovery.
        ignores_sync: A protection that is taken away.
    """

    scenario: Scenario
    budget: int = 64
    again_budget: int = 4
    ignores_sync: Callable[[str, int], bool] = lambda _disk, _number: False
    disks_tried: int = 0
    points: int = 0

    def power_losses(self) -> Iterator[Broken]:
        """The power fails at each operation, and again at each operation of each recovery."""
        start = self.scenario.prepare()
        for point in itertools.count():
            machine = Machine(start, Plan(power_fails_at=point, ignores_sync=self.ignores_sync))
            witness = Witness(self.scenario.initial)
            is_over = self._ran_through(machine, witness)
            self.points += 1
            yield from self._after(machine, witness, f"power fails at {_last(machine)}", point)
            if is_over:
                return

    def failures(self, *, then_power_loss: bool = True) -> Iterator[Broken]:
        """Each operation fails in each way; the program goes on; then the power fails."""
        start = self.scenario.prepare()
        length = self._length(start)
        for point, fault in itertools.product(range(length), Fault):
            where = f"{fault.value} at operation {point}"
            machine = Machine(start, Plan(fails_at={point: fault}, seed=point + 1))
            witness = Witness(self.scenario.initial)
            self._ran_through(machine, witness)
            self.points += 1
            yield from self._after(machine, witness, where, point)
            if not then_power_loss:
                continue
            for later in range(point + 1, machine.operations):
                plan = Plan(fails_at={point: fault}, power_fails_at=later, seed=point + 1)
                off = Machine(start, plan)
                told = Witness(self.scenario.initial)
                self._ran_through(off, told)
                yield from self._after(off, told, f"{where}, power fails at {later}", later)

    def _length(self, start: dict[str, bytes]) -> int:
        machine = Machine(start)
        witness = Witness(self.scenario.initial)
        assert self._ran_through(machine, witness)
        assert not witness.refused
        return machine.operations

    def _ran_through(self, machine: Machine, witness: Witness) -> bool:
        try:
            self.scenario.run(machine, witness)
        except PowerLoss:
            return False
        except Failure:
            witness.refused += 1  # it did not even open: with a failing disk that is right
        return True

    def _after(self, machine: Machine, witness: Witness, where: str, seed: int) -> Iterator[Broken]:
        for left in machine.after_power_loss(self.budget, seed):
            self.disks_tried += 1
            after = Machine(left)
            yield from self._looked(after, witness, where)
            yield from self._power_lost_again(left, after.operations, witness, where)

    def _looked(self, machine: Machine, witness: Witness, where: str) -> Iterator[Broken]:
        try:
            found = self.scenario.look(machine)
            if found not in witness.allowed:
                yield Broken(where, f"found {found!r}, allowed {witness.allowed!r}")
                return
            self.scenario.go_on(machine)
        except Failure as failure:
            yield Broken(where, str(failure))

    def _power_lost_again(
        self, left: dict[str, bytes], most: int, witness: Witness, where: str
    ) -> Iterator[Broken]:
        if not self.again_budget:
            return
        for point in range(most):
            machine = Machine(left, Plan(power_fails_at=point))
            try:
                self.scenario.look(machine)
            except PowerLoss:
                pass
            except Failure:
                return  # told by `_looked` already
            else:
                return
            for again in machine.after_power_loss(self.again_budget, point):
                self.disks_tried += 1
                yield from self._looked(
                    Machine(again), witness, f"{where}, and again at {point} of recovery"
                )


def _last(machine: Machine) -> str:
    number = machine.operations - 1
    return f"operation {number} ({machine.log[-1] if machine.log else 'none'})"
