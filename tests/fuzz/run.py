"""Fuzz one target, led by coverage.

    python -m tests.fuzz.run TARGET [CORPUS_DIRECTORY] [libFuzzer options]

New inputs go into the corpus directory (a temporary one, if none is given); an input that raises is
written to `crash-...` where this was started. See README.md.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["protocol", "tpm12", "hwtpm", "daemons"]):
    from tests.fuzz.targets import TARGETS, kept


def main():
    name, *options = sys.argv[1:] or [""]
    if name not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz.run {{{','.join(TARGETS)}}} [DIRECTORY] [OPTIONS]")
    target, seeds = TARGETS[name]
    if not options or options[0].startswith("-"):
        options.insert(0, tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    corpus = Path(options[0])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number:04}").write_bytes(seed)
    for path in kept(name):
        (corpus / path.name).write_bytes(path.read_bytes())
    atheris.Setup([sys.argv[0], *options], target)
    atheris.Fuzz()


main()
