"""A launcher that says what a test wants, on the real socket, and ways to run the command."""

import json
import os
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from daemons.cli.app import app
from daemons.errors import Failure
from daemons.listeners import Kind, listen
from daemons.places import Places

ROWS = [
    {
        "name": "vtpm-guest1",
        "domid": 2,
        "role": "vtpm",
        "label": "system_u:vm_r:vtpm_t",
        "state": "running",
        "pid": 102,
        "restarts": 1,
        "memory": 8,
        "vif": [],
    },
    {
        "name": "guest1",
        "domid": 3,
        "role": "guest",
        "label": "system_u:vm_r:guest_t",
        "state": "running",
        "pid": 103,
        "restarts": 0,
        "memory": 1024,
        "vif": ["mac=00:01:02:03:04:05,bridge=br0"],
    },
    {
        "name": "guest2",
        "domid": 4,
        "role": "guest",
        "label": "system_u:vm_r:guest_t",
        "state": "failed: nothing to boot",
        "pid": None,
        "restarts": 5,
        "memory": 1024,
        "vif": [],
    },
]


class FakeLauncher:
    """Answers with `answers[method]`: a result, a Failure, or a function of the parameters."""

    def __init__(self, places):
        self.places = places
        self.calls = []
        self.answers = {"list": ROWS}
        self.progress = {}
        places.prepare()
        self._listener = listen(places.launcher_socket, Kind.STREAM)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self):
        self._listener.socket.shutdown(2)
        self._thread.join(10)
        self._listener.close()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.socket.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as lines:
                for line in lines:
                    for answer in self._answer(json.loads(line)):
                        lines.write(json.dumps(answer).encode() + b"\n")
                    lines.flush()

    def _answer(self, request):
        method, params, number = request["method"], request["params"], request["id"]
        self.calls.append((method, params))
        for text in self.progress.get(method, ()):
            yield {"id": number, "progress": text}
        answer = self.answers.get(method)
        if callable(answer):
            answer = answer(params)
        if isinstance(answer, Failure):
            error = {
                "what": answer.what,
                "why": answer.why,
                "next_step": answer.next_step,
                "exit_code": int(answer.exit_code),
            }
            yield {"id": number, "error": error}
        else:
            yield {"id": number, "result": answer}


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path)


@pytest.fixture
def launcher(places):
    fake = FakeLauncher(places)
    yield fake
    fake.close()


@pytest.fixture
def vtpm(places):
    """Run `vtpm ARGS...` in this process on the test's root."""
    runner = CliRunner()

    def run(*args, **environment):
        return runner.invoke(
            app, [str(arg) for arg in args], env={"VTPM_ROOT": str(places.root), **environment}
        )

    return run


@pytest.fixture
def vtpm_process(places):
    """Run `vtpm ARGS...` as a process of its own on the test's root."""

    def run(*args, **environment):
        return subprocess.run(
            [sys.executable, "-m", "daemons.cli.main", *map(str, args)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "VTPM_ROOT": str(places.root), **environment},
        )

    return run
