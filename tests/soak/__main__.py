"""A stack under load, attack, kills and damage for as long as wanted; anyone can start it.

    python -m tests.soak [--seed N] [--for SECONDS] [--log FILE] [--sabotage KIND]...

Three guests use their TPMs for everything a TPM is for and check every answer, while daemons are
killed and stopped one by one, in pairs and all at once, hostile peers are at every door, and files
are damaged, which must be refused. It ends with status 0 when each command was executed exactly
once and everything is at its baseline: memory, descriptors and threads of each daemon, keys and
sessions in each TPM, files and processes. Otherwise with 1, and the logs of the daemons are kept
beside the run log. `--sabotage` breaks something on purpose, which must be found.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.soak.sabotage import Kind, Sabotage
from tests.soak.soak import Outcome, RunLog, Soak
from tests.system.scratch_stack import scratch_stack


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit status is 0 when nothing was wrong."""
    options = _options(arguments)
    console = Console(stderr=True)
    log_path = options.log or Path(tempfile.gettempdir()) / f"vtpm-soak-{options.seed}.jsonl"
    log = RunLog(log_path)
    log.tell("begin", seed=options.seed, for_s=options.for_s, sabotage=options.sabotage)
    console.print(f"seed {options.seed}, for {options.for_s:g} s; run log {log_path}")
    outcome = _run(options, log, console, log_path)
    log.tell("end", problems=outcome.problems, figures=outcome.figures)
    log.close()
    _show(outcome, options.seed, log_path)
    return 1 if outcome.problems else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--for", dest="for_s", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--log", type=Path, help="the run log, one JSON object a line")
    parser.add_argument(
        "--sabotage",
        type=Kind,
        action="append",
        default=[],
        choices=list(Kind),
        help="a control: break this on purpose, which must be found",
    )
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, log: RunLog, console: Console, log_path: Path) -> Outcome:
    begun = time.monotonic()
    outcome = Outcome()
    with console.status("soaking") as spinner:

        def show(text: str) -> None:
            console.print(f"{time.monotonic() - begun:7.0f} s  {text}", highlight=False)
            spinner.update(text)

        sabotage = Sabotage(frozenset(options.sabotage))
        try:
            with scratch_stack() as stack:
                soak = Soak(stack, options.seed, options.for_s, log, show=show, sabotage=sabotage)
                outcome = soak.outcome
                soak.run()
                sabotage.clean_up(stack)
                if outcome.problems:
                    kept = log_path.with_suffix(".logs")
                    shutil.copytree(stack.places.log_dir, kept, dirs_exist_ok=True)
                    show(f"the daemons' logs are kept in {kept}")
        except AssertionError as error:  # what an orderly end has left behind
            outcome.problems.append(str(error))
    return outcome


def _show(outcome: Outcome, seed: int, log_path: Path) -> None:
    """The verdict, on stdout."""
    out = Console()
    phases = outcome.figures.pop("phases", {})
    table = Table(title="a PCRRead of each guest's program, milliseconds")
    for column in ("guest", "phase", "commands", "median", "99 %"):
        table.add_column(column, justify="left" if column in {"guest", "phase"} else "right")
    for guest, found in phases.items():
        for phase, figures in found.items():
            if isinstance(figures, dict):
                table.add_row(
                    guest,
                    phase,
                    str(figures["commands"]),
                    f"{figures['median_ms']:.2f}",
                    f"{figures['p99_ms']:.2f}",
                )
    if phases:
        out.print(table)
    for guest, found in phases.items():
        out.print(
            f"{guest}: longest exchange {found['longest_ms']} ms, booted {found['boots']} times"
        )
    out.print(", ".join(f"{count} {name}" for name, count in outcome.figures.items()))
    for problem in outcome.problems:
        out.print(f"problem: {problem}", markup=False)
    verdict = f"FAILED with {len(outcome.problems)} problems" if outcome.problems else "PASSED"
    out.print(f"{verdict}: seed {seed}, run log {log_path}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
