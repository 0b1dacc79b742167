# Everything runs in .venv, which is made on first use and made again when pyproject.toml or constraints.txt changes.
#
#   PYTHON=...  the Python to make .venv with; otherwise the first of $(PYTHONS) that will do
#   CXX=...     the C++ compiler for compiled populations; otherwise g++, or else clang++

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHONS := python3.11 python3.12 python3.13 python3.14 python3 python
BIN := .venv/bin
READY := .venv/.installed

# Make has a CXX of its own; only one that was asked for counts. PyTorch looks for g++ unless CXX is set.
ifneq ($(filter default undefined,$(origin CXX)),)
CXX := $(shell command -v g++ >/dev/null 2>&1 && echo g++ || { command -v clang++ >/dev/null 2>&1 && echo clang++; })
endif
ifneq ($(strip $(CXX)),)
export CXX
endif

# Sets $python, or says what was tried and stops. A Python that will do prints an empty reason.
define FIND_PYTHON
python=; tried=; \
for name in $(or $(PYTHON),$(PYTHONS)); do \
	reason=$$($$name -c 'import sys; from importlib.util import find_spec; \
print("is Python %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) \
else "" if find_spec("venv") and find_spec("ensurepip") else "has no venv module")' 2>/dev/null) \
		|| reason='not found, or does not run'; \
	if [ -z "$$reason" ]; then python=$$name; break; fi; \
	tried="$$tried\n  $$name: $$reason"; \
done; \
if [ -z "$$python" ]; then \
	printf "Perennial needs Python 3.11 or later with its venv module. Tried:$$tried\n" >&2; \
	printf 'Debian, Ubuntu: apt-get install python3 python3-venv python3-dev. macOS: brew install python@3.11.\n' >&2; \
	printf 'Or name one: make PYTHON=/path/to/python\n' >&2; \
	exit 1; \
fi
endef

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: check $(READY) ## Run the demo study; prints a table and where the report is
	$(BIN)/perennial run demo --out runs/demo

.PHONY: test
test: check lint ## Lint, then the quick tests: every kind of check
	$(BIN)/python -m pytest -n auto

.PHONY: test-slow
test-slow: check $(READY) ## The tests that take longer, and more variants of the quick ones
	$(BIN)/python -m pytest -m slow

.PHONY: lint
lint: $(READY) ## Style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: docs
docs: $(READY) ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo 'The documentation is at docs/_build/html/index.html'

.PHONY: bench
bench: check $(READY) ## Run every benchmark
	@set -e; for file in benchmarks/*.py; do \
		[ -e "$$file" ] || { echo 'There are no benchmarks yet.'; exit 0; }; \
		echo "$$file"; $(BIN)/python "$$file"; \
	done

.PHONY: clean
clean: ## Remove caches and built documentation; .venv and runs stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist docs/_build docs/generated
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: check
check: ## Say what this machine lacks: Python, a C++ compiler
	@if [ -x $(BIN)/python ]; then python=$(BIN)/python; else $(FIND_PYTHON); fi; \
	if [ -z "$(CXX)" ] || ! command -v "$(CXX)" >/dev/null 2>&1; then \
		printf 'A C++ compiler is needed to compile populations. Tried: %s\n' "$(or $(CXX),g++ clang++)" >&2; \
		printf 'Debian, Ubuntu: apt-get install g++. Fedora: dnf install gcc-c++. macOS: xcode-select --install.\n' >&2; \
		printf 'Or name one: make CXX=/path/to/compiler\n' >&2; \
		exit 1; \
	fi; \
	headers=$$($$python -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	if ! echo '#include <Python.h>' | "$(CXX)" -x c++ -fsyntax-only -I"$$headers" - >/dev/null 2>&1; then \
		printf '%s cannot compile against the headers of Python in %s.\n' "$(CXX)" "$$headers" >&2; \
		printf 'Debian, Ubuntu: apt-get install python3-dev. Fedora: dnf install python3-devel.\n' >&2; \
		exit 1; \
	fi

# Two installs: the build backend is pinned as everything else is, and pip needs no second environment to build in.
$(READY): pyproject.toml constraints.txt
	@$(FIND_PYTHON); \
	echo "Making .venv with $$python: one to three minutes" && \
	$$python -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation \
		-e '.[studies,lm,rl,trackers,dev,docs]'
	@touch $@
