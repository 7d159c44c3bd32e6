"""vtpm crashsweep: what is refused before anything is made."""

import pytest

from daemons.errors import ExitCode


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e300", "0", "x"])
def test_patience_is_a_number_of_seconds(vtpm, seconds):
    refused = vtpm("crashsweep", "--patience", seconds, "--", "true")
    assert refused.exit_code == ExitCode.USAGE
    assert "--patience" in refused.output
