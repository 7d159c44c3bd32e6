"""A fake engine, and a bench that runs driver steps against a device in memory."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from hwtpm.tis_device import TisDevice
from hwtpm.tis_driver import Pause, WaitInterrupt
from protocol.tis_messages import Read, Write


def packet(ordinal=0x15, body=b"", tag=0x00C1):
    """A command, or with tag 0xC4 a response, with the right length in its header."""
    size = 10 + len(body)
    return tag.to_bytes(2, "big") + size.to_bytes(4, "big") + ordinal.to_bytes(4, "big") + body


@dataclass
class FakePort:
    """An engine that answers with its request behind a header, and notes the hash cycles."""

    established: bool = False
    hash_answers: dict = field(default_factory=dict)
    cycles: list = field(default_factory=list)
    executed: list = field(default_factory=list)

    def execute(self, request, locality):
        self.executed.append((locality, request))
        return packet(0, b"echo" + request, tag=0xC4)

    def hash_start(self):
        return self._cycle("start")

    def hash_data(self, data):
        return self._cycle("data", data)

    def hash_end(self):
        return self._cycle("end")

    def _cycle(self, name, data=b""):
        self.cycles.append((name, data))
        return self.hash_answers.get(name, True)


class Bench:
    """Runs driver steps against a device; a command is executed when `delay` waits have passed."""

    def __init__(self, device, port):
        self.device = device
        self.port = port
        self.now_s = 100.0
        self.delay = 0
        self.waits = []
        self.accesses = []
        self.interrupts = []
        self.on_wait = lambda: None

    def run(self, steps):
        answer = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as end:
                return end.value
            answer = self.perform(step)

    def perform(self, step):
        if isinstance(step, Read):
            answer = self.device.read(step.locality, step.offset, step.count)
            self.accesses.append(("read", step.locality, step.offset, answer))
        elif isinstance(step, Write):
            answer = None
            self.accesses.append(("write", step.locality, step.offset, step.data))
            self.device.write(step.locality, step.offset, step.data)
            self.execute()
        else:
            answer = self.wait(step)
        self.interrupts += self.device.take_interrupts()
        return answer

    def execute(self):
        pending = self.device.pending_command
        if pending is not None and self.delay == 0:
            self.device.complete(pending, self.port.execute(pending.request, pending.locality))

    def wait(self, step):
        self.waits.append(step)
        self.on_wait()
        if self.delay > 0 and step != Pause(0.0):
            self.delay -= 1
            self.execute()
            self.interrupts += self.device.take_interrupts()
        if isinstance(step, Pause):
            self.now_s += step.interval_s
        elif isinstance(step, WaitInterrupt):
            if self.interrupts:
                self.interrupts.pop(0)
            else:
                self.now_s += step.limit_s
        return self.now_s


@pytest.fixture(scope="session")
def make():
    return SimpleNamespace(packet=packet, port=FakePort, device=TisDevice, bench=Bench)


@pytest.fixture
def port():
    return FakePort()


@pytest.fixture
def device(port):
    powered = TisDevice(port)
    powered.power_on()
    return powered


@pytest.fixture
def bench(device, port):
    return Bench(device, port)
