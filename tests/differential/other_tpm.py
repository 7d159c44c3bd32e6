"""The other TPM 1.2: Debian's swtpm (libtpms), run as a child and driven over its two sockets.

The data socket carries commands; the control socket is power, locality and the hash sequence of a
dynamic launch, which have no ordinals.
"""

import contextlib
import hashlib
import shutil
import socket
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.tpm12.witness import number

END_S = 10
ANSWER_S = 60
_INIT, _SET_LOCALITY, _HASH_START, _HASH_DATA, _HASH_END = 2, 5, 6, 7, 8
_FORGET_VOLATILE = 1
_STATE_FILE = "tpm-00.permall"

needs_swtpm = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")


_HEADER_BYTES, _DIGEST_BYTES = 16, 20
_FLAGS_FROM_END = 16
"""Where libtpms' TPM_PERMANENT_FLAGS are: their version, a bitmap, then two empty tables."""
_FLAGS_VERSION, _FIPS = b"\0\2", 1 << 12


class OtherTpmEndedError(Exception):
    """The other TPM's process died, or stopped answering, in the middle of a command."""


class OtherTpm:
    """A running swtpm with power; `exchange` is what a Witness needs.

    Args:
        directory: Where it keeps its state.
        image: Permanent state that it begins with (what `permanent` gave), or None.
    """

    def __init__(self, directory: Path, image: bytes | None = None):
        self._state = directory / "state"
        self._state.mkdir()
        if image is not None:
            (self._state / _STATE_FILE).write_bytes(image)
        self._data, data = socket.socketpair()
        self._control, control = socket.socketpair()
        with data, control:
            arguments = ["--tpmstate", f"dir={self._state}", "--flags", "not-need-init"]
            arguments += ["--fd", str(data.fileno())]
            arguments += ["--ctrl", f"type=unixio,clientfd={control.fileno()}"]
            self._process = subprocess.Popen(
                [shutil.which("swtpm"), "socket", *arguments],
                pass_fds=(data.fileno(), control.fileno()),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._data.settimeout(ANSWER_S)
        self._control.settimeout(ANSWER_S)
        self._locality = 0
        self._is_as_started = True

    def close(self):
        """End the process."""
        self._data.close()
        self._control.close()
        self._process.terminate()
        self._process.wait(END_S)

    def permanent(self) -> bytes:
        """The permanent state as it is now on disk."""
        return (self._state / _STATE_FILE).read_bytes()

    def exchange(self, request: bytes, locality: int) -> bytes:
        """Send one command and wait for its response."""
        self._is_as_started = False
        if locality != self._locality:
            self._told(_SET_LOCALITY, bytes([locality]))
            self._locality = locality
        response = b""
        try:
            self._data.sendall(request)
            while len(response) < 6 or len(response) < number(response[2:6]):
                more = self._data.recv(8192)
                if not more:
                    raise OtherTpmEndedError
                response += more
        except OSError as error:
            raise OtherTpmEndedError from error
        return response

    def power_on(self):
        """TPM_Init: everything volatile is gone, saved state is kept.

        The first is its start itself: each makes an RSA key to test itself, which takes 0.4 s.
        """
        if self._is_as_started:
            self._is_as_started = False
            return
        self._told(_INIT, struct.pack(">I", _FORGET_VOLATILE))

    def hash_sequence(self, data: bytes):
        """HASH_START, HASH_DATA and HASH_END."""
        self._is_as_started = False
        self._told(_HASH_START)
        self._told(_HASH_DATA, struct.pack(">I", len(data)) + data)
        self._told(_HASH_END)

    def _told(self, order, body=b""):
        try:
            self._control.sendall(struct.pack(">I", order) + body)
            result = self._control.recv(4)
        except OSError as error:
            raise OtherTpmEndedError from error
        if result != bytes(4):
            raise AssertionError(f"swtpm refused control command {order}: {result.hex()}")


def in_fips_mode(permanent: bytes) -> bytes:
    """The same permanent state with TPM_PERMANENT_FLAGS.FIPS, which a maker sets.

    Args:
        permanent: Of a TPM without NV areas and without keys that the owner keeps.
    """
    state = permanent[_HEADER_BYTES:-_DIGEST_BYTES]
    assert hashlib.sha1(state).digest() == permanent[-_DIGEST_BYTES:]
    at = len(state) - _FLAGS_FROM_END + len(_FLAGS_VERSION)
    assert state[:at].endswith(_FLAGS_VERSION)
    flags = number(state[at : at + 4]) | _FIPS
    state = state[:at] + struct.pack(">I", flags) + state[at + 4 :]
    return permanent[:_HEADER_BYTES] + state + hashlib.sha1(state).digest()


@contextlib.contextmanager
def other_tpm(image=None):
    """Run one in a directory of its own, started up with ST_CLEAR by nobody yet."""
    with tempfile.TemporaryDirectory(prefix="swtpm-") as directory:
        other = OtherTpm(Path(directory), image)
        try:
            yield other
        finally:
            other.close()
