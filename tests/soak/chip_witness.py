"""Says what is open in the hardware TPM; a program of its own, so that it can be let in and end.

python -m tests.soak.chip_witness SOCKET; waits for a line on stdin.
"""

import json
import sys
from pathlib import Path

from daemons.tis_link import TisLink
from daemons.world import SystemRng
from tests.soak.baseline import handles_of
from tpm12.client import TpmClient

sys.stdin.readline()
with TisLink(Path(sys.argv[1]), 0, use_interrupts=False) as link:

    def exchange(request: bytes) -> bytes:
        try:
            return link.exchange(request)
        finally:
            link.relinquish()  # or the manager could not go on

    sys.stdout.write(json.dumps(handles_of(TpmClient(exchange, rng=SystemRng()))))
