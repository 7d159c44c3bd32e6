"""What is known of each ordinal: the engine's declaration, the table, the tests, the comparison."""

import ast
import csv
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from protocol.constants import Ordinal
from tests.differential.deviations import DEVIATIONS
from tpm12.commands import ALL

ROOT = Path(__file__).parents[2]
_CSV = ROOT / "tests" / "vectors" / "ordinals.csv"
_AGREED = ROOT / "tests" / "differential" / "agreed.json"
_SENDERS = {"send", "auth", "frame"}
"""Calls of the tests whose first argument is an ordinal."""

EVERY = -1
"""Stands for all commands."""

REFUSED = {
    "CertifySelfTest": "deleted in 1.2: a 1.1 command that signs the result of a self-test",
    "GetCapabilitySigned": "deleted in 1.2; TPM_GetCapability in a logged transport session",
    "GetAuditEvent": "deleted in 1.2: the audit log is the host's, TPM_GetAuditDigest its proof",
    "GetAuditEventSigned": "deleted in 1.2, as TPM_GetAuditEvent",
    "GetOrdinalAuditStatus": "deleted in 1.2; the list comes with TPM_GetAuditDigest",
    "Init": "a signal of the platform and no command",
    "SetRedirection": "optional: there is no device to redirect to",
    "FieldUpgrade": "optional: the engine is upgraded as a program is",
}
"""Ordinals that the engine does not have, and why. They answer as an unknown ordinal does."""
REFUSAL = "BAD_ORDINAL"
OUTSIDE = {
    "DeepQuote": "of Xen: the vTPM's daemon passes it to the manager",
    "ParentSignEK": "of Xen: the vTPM's daemon passes it to the manager",
}
"""Ordinals of a vTPM that the engine leaves to the daemon around it."""


@dataclass
class Row:
    """One ordinal.

    Attributes:
        section: Paragraph of TPM Main r116 Part 3, or where else it is from.
        is_done: The engine has it.
        tests: How many test functions name it.
        agreed: Return codes that libtpms and we gave to the same requests.
        deviations: Names of the deviations that showed, or are known.
    """

    ordinal: int
    name: str
    section: str
    is_done: bool
    tests: int
    agreed: tuple[str, ...] = ()
    deviations: tuple[str, ...] = field(default=())


def table():
    """Rows of the table of ordinals."""
    return list(csv.DictReader(_CSV.read_text().splitlines()))


def missing_from_the_engine():
    """Names that the table has and the engine has not."""
    there = {declared.ordinal for declared in ALL}
    return {row["name"] for row in table() if int(row["ordinal"], 16) not in there}


# -- counting tests --------------------------------------------------------------------------------


@cache
def tests_by_ordinal():
    """How many test functions name each ordinal.

    A function names an ordinal if in it stands `Ordinal.NAME`, or a call of `send`, `auth` or
    `frame` whose first argument is its number or a constant for it, or the call of a function of
    the same file, or imported from another file of the tests, that does so. A test function is one
    whose name begins with `test_`; parameters don't multiply it. One with the parameter `declared`
    is of every command.
    """
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted((ROOT / "tests").rglob("*.py"))
    }
    constants = {module: _constants(tree) for module, tree in files.items()}
    functions = {}
    for module, tree in files.items():
        imported = _imported(tree)
        known = {
            name: constants[where][name]
            for name, where in imported.items()
            if name in constants.get(where, {})
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named, called = _read(node, known | constants[module])
                places = {(imported.get(word, module), word) for word in called}
                functions[module, node.name] = (named, places)
    return _count(functions)


def _imported(tree):
    """Names that come from other files of the tests: which."""
    return {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.")
        for alias in node.names
    }


def _constants(tree):
    """Constants of a module that are integers."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            for name, number in pairs:
                if isinstance(name, ast.Name) and isinstance(number, ast.Constant):
                    found[name.id] = number.value
    return {name: number for name, number in found.items() if type(number) is int}


def _read(function, constants):
    """What a function names, and what it calls."""
    named, called = set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "Ordinal":
            member = getattr(Ordinal, node.attr, None)
            named |= {int(member)} if isinstance(member, int) else set()
        elif isinstance(node, ast.arg) and node.arg == "declared":
            named.add(EVERY)
        elif isinstance(node, ast.Name) and node.id in constants:
            named |= _of_its_name(node.id, constants[node.id])
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                called.add(node.func.id)
            if getattr(node.func, "id", getattr(node.func, "attr", "")) in _SENDERS and node.args:
                first = node.args[0]
                named.add(constants.get(getattr(first, "id", ""), getattr(first, "value", None)))
    return {each for each in named if type(each) is int}, called


def _of_its_name(name, number):
    """A constant that has the name of the ordinal that is its number, or a piece of it."""
    member = Ordinal(number).name if number in set(Ordinal) else ""
    return {number} if name in member else set()


def _count(functions):
    def reach(place):
        found, seen, todo = set(), {place}, [place]
        while todo:
            named, called = functions[todo.pop()]
            found |= named
            new = {each for each in called - seen if each in functions}
            seen |= new
            todo += new
        return found

    tests = [reach(place) for place in functions if place[1].startswith("test_")]
    ordinals = [int(row["ordinal"], 16) for row in table()]
    return {
        ordinal: sum(ordinal in found or EVERY in found for found in tests) for ordinal in ordinals
    }


# -- all of it -------------------------------------------------------------------------------------


def rows():
    """Every ordinal of the table."""
    agreed = {}
    for kept in json.loads(_AGREED.read_text()).values():
        for ordinal, codes in kept["agreed"].items():
            agreed.setdefault(int(ordinal, 16), set()).update(codes)
    counts, missing = tests_by_ordinal(), missing_from_the_engine()
    return [
        Row(
            ordinal=(ordinal := int(row["ordinal"], 16)),
            name=row["name"],
            section=row["section"],
            is_done=row["name"] not in missing,
            tests=counts[ordinal],
            agreed=tuple(sorted(agreed.get(ordinal, ()))),
            deviations=tuple(
                deviation.name for deviation in DEVIATIONS if row["name"] in deviation.commands
            ),
        )
        for row in table()
    ]
