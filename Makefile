# Two commands set up all they need, as root or not, on a machine with Python 3.11 or newer:
#   make demo           the whole story on one screen
#   make test           all tests; PYTEST_ARGS="tests/tpm12 -k seal" for some of them
# As root, to be started by systemd (docs/systemd.md):
#   make install        programs and units below PREFIX (/usr/local), or DESTDIR/PREFIX for a package
# For developers:
#   make lint           style, types, direction of imports (make -k lint: all of them, also after a failure)
#   make coverage       which branches of the pure packages their tests reach
#   make bench          the stack against swtpm
#   make conformance    write docs/conformance.md anew
#   make clean          remove what these made
# The machine's own Python, if it is new enough: the users of the daemons and of some tests can run it
# too, which they cannot if it lies in somebody's home. And it is optimised, unlike what pyenv builds.
PYTHON ?= $(shell /usr/bin/python3 -c 'import ssl, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	2> /dev/null && echo /usr/bin/python3 || echo python3)
# One file's tests stay together: those of tests/system share a stack, in their order. What takes
# longest begins first (tests/conftest.py), not the file with the most tests.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: demo test coverage install lint style types layering bench conformance clean for-users for-developers

demo: for-users
	@.venv/bin/vtpm demo

test: for-developers
	.venv/bin/python -m pytest $(PYTEST_ARGS)

install: for-users
	.venv/bin/python systemd/install.py --prefix "$(PREFIX)" --destdir "$(DESTDIR)"

# Their own tests, not all: under coverage those of real processes would take a third longer.
coverage: for-developers
	.venv/bin/python -m pytest -q -n 2 tests/protocol tests/tpm12 tests/hwtpm --cov --cov-report=term-missing

lint: style types layering

style: for-developers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: for-developers
	.venv/bin/mypy

layering: for-developers
	.venv/bin/python -m pytest -q tests/test_tidy.py

bench: for-users
	.venv/bin/python -m benchmarks.compare

for-users:
	@$(PYTHON) bootstrap.py

for-developers:
	@$(PYTHON) bootstrap.py --dev

conformance: for-developers
	.venv/bin/python -m tests.conformance.page > docs/conformance.md.new
	mv docs/conformance.md.new docs/conformance.md

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
