"""Who may talk to whom: rules over labels, and nothing else. Pure but for reading its own file.

Xen ships no rules for its vTPM types; its platform document only wishes for some. They are the
built-in policy here:

- the manager takes rings of vTPMs only;
- a vTPM takes rings of guests and of domain 0 only, if the users are the same or one is system_u;
- only the manager and domain 0 reach the hardware TPM, through the pages that `iomem` granted.

Invariants:
- What no rule allows is refused.
- A policy file replaces the built-in policy whole; one that is not understood stops the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.labels import Label, LabelError, matches_pattern
from daemons.private_files import read_checked
from daemons.registry import DomainRecord, Role, VtpmDevice
from daemons.strict_toml import Table, TomlError

SYSTEM_USER: Final = "system_u"
RULES_MAX: Final = 256
POLICY_BYTES_MAX: Final = 64 * 1024


class NotAllowed(Failure):
    """The policy does not let two domains talk."""


class PolicyError(Failure):
    """The policy file is not understood."""


@dataclass(frozen=True, slots=True)
class LocalityRule:
    """`locality=PATTERN=N,N`: which localities frontends with such labels may claim."""

    pattern: str
    """A label, or a star and the end of one."""
    localities: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Frontends of one type may use backends of another."""

    frontend: str
    """A label's type."""
    backend: str
    """A label's type."""
    needs_same_user: bool = True
    """Both users are equal, or one is system_u."""

    def __str__(self) -> str:
        users = ", with the same user or system_u" if self.needs_same_user else ""
        return f"{self.frontend} -> {self.backend}{users}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """All rules, and the labels of domains that name none."""

    rules: tuple[Rule, ...]
    default_labels: dict[Role, str]
    source: str

    def default_label(self, role: Role) -> str:
        """Give the label of a domain whose config has no seclabel."""
        return self.default_labels[role]

    def admit(self, frontend: DomainRecord, backend: DomainRecord, device: VtpmDevice) -> None:
        """Let a frontend use a backend, or say why not.

        Args:
            frontend: Who connects.
            backend: Who is connected to.
            device: The frontend's device that is to be served.

        Raises:
            NotAllowed: the device is of another backend or none of the frontend's, or no rule
                allows it.
        """
        if device not in frontend.vtpms or device.backend != backend.name:
            raise _not_allowed(
                frontend, backend, f"{frontend.name} has no such vtpm device of {backend.name}"
            )
        self.check_labels(frontend, backend)

    def check_labels(self, frontend: DomainRecord, backend: DomainRecord) -> None:
        """Check the rules alone.

        Raises:
            NotAllowed: no rule allows it; both labels and the nearest rule are named.
        """
        # A record's label was checked when it was read; one made in memory may be anything.
        try:
            front, back = Label.parse(frontend.label), Label.parse(backend.label)
        except LabelError as error:
            raise _not_allowed(frontend, backend, str(error)) from error
        nearest: list[Rule] = []
        for rule in self.rules:
            if (rule.frontend, rule.backend) == (front.type, back.type):
                if not rule.needs_same_user or _share_user(front, back):
                    return
                nearest.append(rule)
        if nearest:
            why = f"the users differ, and the rule is {nearest[0]}"
        else:
            taken = [str(rule) for rule in self.rules if rule.backend == back.type]
            allowed = "; ".join(taken) if taken else "none at all"
            why = f"no rule of {self.source} allows it; rules for {back.type}: {allowed}"
        raise _not_allowed(frontend, backend, why)


BUILT_IN: Final = Policy(
    rules=(
        Rule(frontend="vtpm_t", backend="vtpmmgr_t", needs_same_user=False),
        Rule(frontend="guest_t", backend="vtpm_t"),
        Rule(frontend="domU_t", backend="vtpm_t"),
        Rule(frontend="dom0_t", backend="vtpm_t"),
        Rule(frontend="vtpmmgr_t", backend="hwtpm_t", needs_same_user=False),
        Rule(frontend="dom0_t", backend="hwtpm_t", needs_same_user=False),
    ),
    default_labels={
        Role.HWTPM: "system_u:system_r:hwtpm_t",
        Role.MANAGER: "system_u:system_r:vtpmmgr_t",
        Role.VTPM: "system_u:system_r:vtpm_t",
        Role.GUEST: "system_u:system_r:domU_t",
        Role.DOMAIN0: "system_u:system_r:dom0_t",
    },
    source="the built-in policy",
)
"""The rules that hold without a policy file."""


def claimable_localities(label: str, rules: Iterable[LocalityRule]) -> frozenset[int]:
    """Tell which localities a frontend may put in its requests to a vTPM.

    Without rules it is locality 0 (Xen lets a guest claim all 256). With rules, a label that none
    of them means may claim nothing, and one that several mean may claim what each allows.
    """
    listed = tuple(rules)
    if not listed:
        return frozenset({0})
    meant = [rule.localities for rule in listed if matches_pattern(label, rule.pattern)]
    return frozenset().union(*meant)


def load(path: Path) -> Policy:
    """Read the policy file; the built-in policy where there is none.

    The file (TOML) has `[labels]` with a label per role (manager, vtpm, guest, domain0, hwtpm; each
    optional) and any number of `[[allow]]` with frontend, backend and, optionally, same_user.

    Raises:
        PolicyError: it cannot be believed or understood.
    """
    content = read_checked(path, POLICY_BYTES_MAX)
    return BUILT_IN if content is None else parse(content, str(path))


def parse(content: bytes, source: str) -> Policy:
    """Read a policy from TOML.

    Raises:
        PolicyError: not TOML (with line and column), an unknown key, or a value that is none.
    """
    try:
        file = Table.parse(content)
        labels = file.take_table("labels")
        policy = Policy(
            rules=tuple(_rule(table) for table in file.take_tables("allow", RULES_MAX)),
            default_labels={role: _label(labels, role) for role in Role},
            source=source,
        )
        labels.finish()
        file.finish()
    except (TomlError, LabelError) as error:
        raise PolicyError(
            f"the policy {source} is refused",
            why=str(error),
            next_step="Correct the file, or remove it to have the built-in policy",
            exit_code=ExitCode.CONFIGURATION,
        ) from error
    return policy


def _rule(table: Table) -> Rule:
    rule = Rule(
        frontend=table.take_text("frontend"),
        backend=table.take_text("backend"),
        needs_same_user=table.take_flag("same_user", default=True),
    )
    table.finish()
    for type_ in (rule.frontend, rule.backend):
        if Label.parse(f"u:r:{type_}").type != type_:
            raise TomlError(f"{type_!a} is not the type of a label")
    return rule


def _label(table: Table, role: Role) -> str:
    return str(Label.parse(table.take_text(role.value, BUILT_IN.default_labels[role])))


def _share_user(one: Label, other: Label) -> bool:
    return one.user == other.user or SYSTEM_USER in {one.user, other.user}


def _not_allowed(frontend: DomainRecord, backend: DomainRecord, why: str) -> NotAllowed:
    return NotAllowed(
        f"{frontend.name} ({frontend.label}) may not use {backend.name} ({backend.label})",
        why=why,
        next_step="Look at seclabel=, vtpm= and iomem= in the config files, and at"
        " etc/vtpm/policy.toml",
        exit_code=ExitCode.NO_PERMISSION,
    )
