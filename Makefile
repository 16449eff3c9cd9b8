# Two commands: `make train` (the main job) and `make test` (the fast tests). Each makes .venv first.
PYTHON ?= python3
# Pins the tested versions; `make test CONSTRAINTS=` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SANITIZE_PYTHON ?= $(shell sh tests/find_python312.sh)
# Else every process that a test starts compiles the library anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: gpu-dry-run train test long compile fuzz mutate coverage lint types docs sanitize package clean

train: .venv/train
	$(BIN)/python examples/train_gpt.py $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

long: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long $(ARGS)

# Every kernel with every Triton that is supported, the oldest first, for GPUs that need not be here.
TRITON ?= 3.6.0 3.7.1 3.9.0
compile: $(TRITON:%=.venv-triton-%/done)
	set -e; for version in $(TRITON); do .venv-triton-$$version/bin/python -W ignore -m bench compile $(ARGS); done

# Only Triton is its own: the rest, torch first, is .venv's.
.venv-triton-%/done: .venv/dev
	$(BIN)/python -m venv .venv-triton-$*
	.venv-triton-$*/bin/python $(PIP) --no-deps triton==$*
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; $(BIN)/python -c "$$purelib" \
	  > "$$(.venv-triton-$*/bin/python -c "$$purelib")/everything_else.pth"
	touch $@

# N random cases against the truth, from a seed that is printed: `make fuzz N=20000 SEED=7` tries the same ones again.
N ?= 20000
SEED ?= $(shell date +%s)
fuzz: .venv/dev
	FUZZ_CASES=$(N) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest tests/fuzz -n 2 --dist worksteal $(ARGS)

# Faults put into the library one at a time: do the tests notice? ARGS: modules, --count, --seed.
mutate: .venv/dev
	$(BIN)/python tests/mutation/run.py $(ARGS)

# Lines that the fast tests reach, kernels by way of the interpreter; then those of the CPU kernels in C, by gcov.
coverage: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered \
	  -m 'not long and not struck' $(ARGS)
	sh tests/coverage_c.sh $(CURDIR)/$(BIN)/python

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# The pages of docs/ and the API reference from the docstrings: open build/docs/index.html.
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The programs that check and measure a GPU, on tiny sizes on the CPU; with a GPU: `python -m bench gpu`.
gpu-dry-run: .venv/dev
	$(BIN)/python -m bench gpu --dry-run $(ARGS)

.venv-sanitize/done: tests/sanitize-requirements.txt
	test -z '$(SANITIZE_PYTHON)' || { $(SANITIZE_PYTHON) -m venv .venv-sanitize && \
	  .venv-sanitize/bin/python $(PIP) -r $< && touch $@; }

package: .venv/dev
	$(BIN)/python tests/check_package.py

# The CPU kernels under gcc's sanitizers; the others on their compiled IR, without a GPU: out-of-bounds accesses, races, undefined operations.
sanitize: .venv/dev
	sh tests/sanitize_cpu.sh $(CURDIR)/$(BIN)/python
ifeq ($(SANITIZE_PYTHON),)
	@echo "SANITIZER NOT RUN: it needs Python 3.12 or 3.13, and none was found (set SANITIZE_PYTHON)" >&2
else
	$(MAKE) .venv-sanitize/done
	printf '%s\n' 'token_stats binary kl_div' 'cross_entropy grad_in_forward drop_in' | xargs -P 2 -I {} sh -c \
	  'PYTHONPATH=. .venv-sanitize/bin/python -m ttsem.sanitize pytest $$(printf "tests/*/test_%s.py " {}) -q $(ARGS)'
endif

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(INSTALL) -e '.[train]'
	@touch $@

.venv/dev: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-sanitize .venv-triton-* build dist *.egg-info runs
