"""The programs under test: a scratch stack with its guest, the simulator alone, and swtpm."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from daemons.launcher_client import LauncherClient
from daemons.listeners import Kind, connect
from daemons.places import Places
from daemons.ring_client import RingClient
from protocol.tpmif import (
    MESSAGE_BYTES_MAX,
    BackendConnected,
    BackendWaiting,
    Finished,
    FrontendRing,
)

Exchange = Callable[[bytes], bytes]
VTPM = Path(sys.executable).with_name("vtpm")
EXAMPLES = Path(__file__).parent.parent / "examples" / "trusted-dom0"
READY_S = 60.0
IMAGE_BYTES = 2 << 20
SECOND_VTPM = (EXAMPLES / "vtpm-guest2.cfg").read_text()
RING_GUEST = """
name="bench"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
memory=64
vtpm=["backend=vtpm-guest2"]
"""


def stream_exchange(path: Path) -> Exchange:
    """Whole commands over a Unix stream socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(path))

    def exchange(request: bytes) -> bytes:
        connection.sendall(request)
        response = connection.recv(4096)
        while len(response) < 10 or len(response) < int.from_bytes(response[2:6], "big"):
            more = connection.recv(4096)
            if not more:
                raise ConnectionError(f"{path} closed the connection")
            response += more
        return response

    return exchange


class Wire:
    """How requests reach a TPM. Only `exchange` is timed: a send, and the receive of the answer.

    Args:
        exchange: Sends a message, gives the answer.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def message_of(self, request: bytes) -> bytes:
        """What goes over the wire for a request."""
        return request

    def response_of(self, answer: bytes) -> bytes:
        """The response in an answer."""
        return answer


class RingWire(Wire):
    """A frontend that has only the state machine: a backend's time, not its client's.

    Args:
        path: The backend's ring socket.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(self._exchange)
        self._ring = FrontendRing(0)
        self._socket = connect(path, Kind.SEQPACKET, timeout_s=READY_S)
        while not self._ring.is_attached:
            event = self._ring.receive(self._socket.recv(MESSAGE_BYTES_MAX))
            if isinstance(event, BackendWaiting):
                self._socket.send(self._ring.publish())
            elif isinstance(event, BackendConnected):
                self._socket.send(self._ring.connected())
            else:
                raise ConnectionError(f"the backend at {path} said {event}")

    def message_of(self, request: bytes) -> bytes:
        """The kick that carries a request."""
        return self._ring.submit(request)

    def response_of(self, answer: bytes) -> bytes:
        """The packet of a kick."""
        event = self._ring.receive(answer)
        if not isinstance(event, Finished):
            raise ConnectionError(f"the backend said {event}")
        return event.packet

    def _exchange(self, message: bytes) -> bytes:
        self._socket.send(message)
        return self._socket.recv(MESSAGE_BYTES_MAX)


class Program:
    """A TPM simulator on a socket, running.

    Args:
        command: Starts it; it serves at `path`.
        path: Its socket.
    """

    def __init__(self, command: list[str], path: Path) -> None:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.pid = self._process.pid
        end = time.monotonic() + READY_S
        while True:
            try:
                self.exchange = stream_exchange(path)
                self.exchange(_GET_VERSION)
                break
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command[0]} did not start") from error
                time.sleep(0.001)
        self.first_answer_s = time.perf_counter() - started

    def pin(self, cpu: int) -> None:
        """Pin it, with all its threads, to one CPU."""
        pin(self.pid, cpu)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


_GET_VERSION = bytes.fromhex("00c10000001200000065 00000006 00000000")


def swtpm(folder: Path) -> Program:
    """Debian's swtpm, TPM 1.2, powered on and started; its state is in the folder."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "sock"
    return Program(
        [
            *("swtpm", "socket", "--server", f"type=unixio,path={path}"),
            *("--tpmstate", f"dir={folder}", "--flags", "not-need-init,startup-clear"),
        ],
        path,
    )


def simulator(folder: Path) -> Program:
    """`vtpm simulator`, its state in the folder."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "sock"
    return Program(
        [str(VTPM), "simulator", "--state", str(folder / "state"), "--socket", str(path)], path
    )


def pin(pid: int, cpu: int) -> None:
    """Pin a process, with all its threads, to one CPU."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {cpu})


class Stack:
    """The trusted domain 0 of the examples in a scratch root, and one vTPM for the ring."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "root"
        self._places = Places(self._root)
        images = self._root / "images"
        images.mkdir(parents=True, mode=0o700)
        for name in ("vtpmmgr-stubdom", "vtpm-guest1", "vtpm-guest2", "guest1"):
            path = images / f"{name}.img"
            path.write_bytes(bytes(IMAGE_BYTES))
            path.chmod(0o600)
        kernel, initrd = folder / "kernel", folder / "initrd"
        kernel.write_bytes(b"a kernel")
        initrd.write_bytes(b"an initrd")
        self._vtpm(
            *("image", "make", str(images / "guest1.img"), "--kernel", str(kernel)),
            *("--initrd", str(initrd), "--cmdline", "root=/dev/xvda ro"),
        )
        self._vtpm("up", str(EXAMPLES / "vtpmmgr.cfg"))
        self.create_s: dict[str, float] = {}
        for name in ("vtpm-guest1", "guest1", "vtpm-guest2"):
            started = time.perf_counter()
            self._vtpm("create", str(EXAMPLES / f"{name}.cfg"))
            self.create_s[name] = time.perf_counter() - started
        self._client = LauncherClient(self._places)
        self._client.call("attach_external", config_text=RING_GUEST, pid=os.getpid())

    def _vtpm(self, *arguments: str) -> None:
        command = [str(VTPM), *arguments]
        environment = {**os.environ, "VTPM_ROOT": str(self._root)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")

    def open_tpm0(self) -> Wire:
        """The guest's device."""
        return Wire(stream_exchange(self._places.domain("guest1").tpm0))

    def open_ring(self) -> Wire:
        """A vTPM's ring, without a guest in between."""
        return RingWire(self._places.domain("vtpm-guest2").ring_socket)

    def open_ring_client(self) -> Wire:
        """The same by the client that guests use, whose time is then part of the figure."""
        ring = RingClient(self._places.domain("vtpm-guest2").ring_socket)
        ring.connect(READY_S)
        return Wire(ring.exchange)

    def pids(self) -> dict[str, int]:
        """Process of each domain that has one of its own."""
        rows = self._client.call("list")
        return {row["name"]: row["pid"] for row in rows if row["pid"] and row["name"] != "bench"}

    def all_pids(self) -> dict[str, int]:
        """As `pids`, and the chip's."""
        chip = self._client.call("status")["chip"]["pid"]
        return self.pids() | ({"hwtpm": chip} if chip else {})

    def pin(self, cpu: int) -> None:
        """Pin every daemon and the chip, with all their threads, to one CPU."""
        for pid in self.all_pids().values():
            pin(pid, cpu)

    def facts(self) -> dict[str, str]:
        """Memory of each process, and how long `vtpm create` took until the domain was ready."""
        found = {}
        for name, pid in self.pids().items():
            found[f"memory of {name}"] = memory_of(pid)
        for name, seconds in self.create_s.items():
            found[f"vtpm create {name}.cfg"] = f"{seconds * 1000:.0f} ms until ready"
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._vtpm("down")
        shutil.rmtree(self._root, ignore_errors=True)


def memory_of(pid: int) -> str:
    """Proportional and private memory of a process."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value, *_ = line.split()
        fields[key] = int(value)
    private = fields["Private_Clean:"] + fields["Private_Dirty:"]
    return f"PSS {fields['Pss:'] / 1024:.1f} MiB, private {private / 1024:.1f} MiB"
