# make bench | test | check | gpu | compat.  ARGS="..." goes to the command; VENV= uses PYTHON as it is, installing nothing.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
endif
AT_HAND := $(if $(wildcard $(READY)),$(RUN),$(PYTHON))

.PHONY: bench test check gpu compat clean

bench: $(READY)
	$(RUN) -m bench mnist $(ARGS)

test: $(READY)
	$(RUN) -m pytest -n auto $(ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# All tests with the oldest pair of torch and Triton that is tested, that of the GPU machines; some 5 GB to install.
compat: .venv-compat/ready
	.venv-compat/bin/python -m pytest -n auto $(ARGS)

.venv-compat/ready: pyproject.toml constraints-compat.txt
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --disable-pip-version-check -q --constraint constraints-compat.txt \
		--editable ".[test,bench]"
	touch $@

# GPU tests and benchmarks with the python at hand, which is that of .venv once it was made; nothing is installed.
# QUICK=1: in three minutes instead of nine; STEPS=ops,tests: some of the steps; OUT=DIR: where results go;
# DRY=1: a rehearsal on a CPU, every step on tiny shapes with a GPU that is only pretended
gpu: OPTIONS = $(if $(OUT),--out $(OUT)) $(if $(QUICK),--quick) $(if $(DRY),--dry-run) $(if $(STEPS),--steps $(STEPS))
gpu:
	$(AT_HAND) -m bench gpu $(OPTIONS) $(ARGS)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -q --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-compat build *.egg-info
