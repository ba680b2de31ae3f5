# `make demo` and `make test` work in a bare checkout: each sets up .venv (once; about 5 minutes and 2 GB) and fetches a real
# Llama checkpoint (93 MB), tests a real BERT one too (84 MB), before it starts.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
LATEST_TESTS := tests/modeling $(addprefix tests/, \
	evaluation/test_by_length.py training/test_checkpointing.py evaluation/test_evaluation.py \
	evaluation/test_evaluation_context.py stages/test_finetuning.py stages/test_finetuning_lengths.py \
	stages/test_finetuning_stops.py hub/test_generation_settings.py runs/test_glue_resume.py hub/test_hub.py \
	hub/test_model_card.py training/test_schedules.py training/test_trackers.py stages/test_transfer.py \
	runs/test_same_bits.py runs/test_resume_kinds.py)
SMOLLM2 := .cache/smollm2-135m-instruct

PYTEST_ARGS ?=
# Tiny models gain nothing from threads: on two cores, two processes of one thread each take about half the time.
WORKERS ?= 2
# A file stays in one process, in the order of tests/conftest.py: the longest files first.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export TOKENIZERS_PARALLELISM := false

.NOTPARALLEL:

.PHONY: demo test test-latest install checkpoint minilm style quality tests test-gpu build clean

demo: install checkpoint ## convert, train and measure SmolLM2-135M on the CPU
	@echo "== Demo: SmolLM2-135M to hybrid linear attention, on this machine"
	$(BIN)/python scripts/demo.py

test: install quality checkpoint minilm tests ## what CI runs
	@echo "== All checks and tests passed"

test-latest: checkpoint minilm $(LATEST)/installed ## the tests that depend on transformers, with its newest release
	@echo "== Tests on the CPU with constraints-latest.txt ($(WORKERS) processes)"
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest $(PARALLEL) -m "not gpu and not multi_gpu" --durations=15 $(PYTEST_ARGS) $(LATEST_TESTS)

install: $(VENV)/installed ## set up .venv

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== Set-up: a virtual environment in $(VENV), with the tested versions of constraints.txt"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt --editable ".[dev,eval,quant]"
	@touch $@

# Its own packages come first, and then those of .venv: only what differs is installed.
$(LATEST)/installed: $(VENV)/installed constraints-latest.txt
	@echo "== Set-up: $(LATEST), with what constraints-latest.txt has in other versions than $(VENV)"
	$(BIN)/python -m venv --clear $(LATEST)
	shared=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		own=$$($(LATEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		echo "import site; site.addsitedir('$$shared')" > $$own/shared.pth
	$(LATEST)/bin/python -m pip install --disable-pip-version-check --progress-bar off --requirement constraints-latest.txt
	@touch $@

checkpoint: install ## fetch SmolLM2-135M-Instruct for the demo and the tests
	@echo "== Checkpoint: SmolLM2-135M-Instruct in $(SMOLLM2)"
	$(BIN)/python scripts/fetch_smollm2.py

minilm: install ## fetch all-MiniLM-L6-v2 for the tests
	@echo "== Checkpoint: all-MiniLM-L6-v2 in .cache/all-minilm-l6-v2"
	$(BIN)/python scripts/fetch_minilm.py

style: install ## format and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install ## lint, format and types
	@echo "== Quality: ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tests: install
	@echo "== Tests on the CPU ($(WORKERS) processes)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not multi_gpu" --durations=15 $(PYTEST_ARGS)

test-gpu: install checkpoint ## the tests that need a GPU; each file in its own process, which an illegal access would spoil
	@status=0; for file in tests/gpu/test_*.py; do \
		$(BIN)/python -m pytest -m "gpu or multi_gpu" $(PYTEST_ARGS) $$file || status=1; \
	done; exit $$status

build: install ## a wheel and a source archive in dist/
	$(BIN)/python -m build

clean: ## remove what builds leave (not .venv, not the checkpoint)
	rm -rf build dist *.egg-info out
