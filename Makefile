# Two commands set up all they need, as root or not, on a machine with Python 3.11 or newer:
#   make demo    the whole story on one screen
#   make test    all tests
PYTHON ?= python3

.PHONY: demo test lint bench clean

demo:
	@$(PYTHON) bootstrap.py
	@.venv/bin/vtpm demo

test:
	@$(PYTHON) bootstrap.py --dev
	.venv/bin/python -m pytest $(PYTEST_ARGS)

lint:
	@$(PYTHON) bootstrap.py --dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench:
	@$(PYTHON) bootstrap.py
	.venv/bin/python -m benchmarks.compare

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
