"""structlog as the daemons have it: without rich, which only colours what people's terminals show.

structlog takes rich along where it is installed, and the `vtpm` command installs it: some 70 ms of
processor time and 5 MB for each daemon at each start, all of it code that the firmware does not
measure (`launcher/measuring.py`, LIBRARIES). The daemons' lines are made by `logs.py` alone.
"""

from __future__ import annotations

import sys
from typing import Any, cast

_is_hidden = "rich" not in sys.modules
if _is_hidden:
    cast("dict[str, Any]", sys.modules)["rich"] = None  # as if it were not installed
try:
    import structlog as structlog  # noqa: PLC0414 - what this module is for
finally:
    if _is_hidden:
        del sys.modules["rich"]
