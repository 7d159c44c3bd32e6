"""What a deviation is."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One question with two answers.

    Attributes:
        name: Short, unique.
        commands: The commands it shows in, without TPM_.
        libtpms, ours: What each does.
        section: Where the specification speaks of it; parts of TPM Main r116.
        steps: Patterns of "scenario: step" where both were seen to differ.
        test: The test of ours that holds our answer, where no scenario shows it.
        explains: For generated sequences: whether this is all that a request and the two responses
            to it differ by.
    """

    name: str
    commands: tuple[str, ...]
    libtpms: str
    ours: str
    section: str
    steps: tuple[str, ...] = ()
    test: str = ""
    explains: Callable[[bytes, bytes, bytes], bool] | None = None

    def covers(self, scenario: str, step: str) -> bool:
        return any(fnmatchcase(f"{scenario}: {step}", pattern) for pattern in self.steps)
