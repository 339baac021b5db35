# Every stage of granary as one command. All targets but `help` first make .venv (see setup).
# Folders and targets share names, so every target is phony.
.PHONY: help setup demo harvest train evaluate test faults fuzz check format test-compat bench
.DEFAULT_GOAL := help

PYTHON ?= python3
PY := .venv/bin/python
# Waiting OpenMP threads sleep instead of spinning: beside other work on the same cores that is several times faster.
export OMP_WAIT_POLICY ?= PASSIVE

# harvest, train, evaluate: set on the command line, e.g. `make harvest MODEL=pythia-160m TOKENS=2M`
MODEL ?= tiny
DATASET ?=
LAYERS ?=
TOKENS ?=
MASK_PROB ?= 0.3
MASK_STRING ?= ...
MASK_UNIT ?=
RANDOM_PROB ?=
SHARD ?=
DEVICE ?=
DRY_RUN ?=
CACHE ?= $(shell ls -td caches/*.zarr 2>/dev/null | head -n 1)# the cache harvested last
ARCH ?= batchtopk
K ?=
D_SAE ?=
MASKED_FRACTION ?= 0,0.5
SEEDS ?= 0
PRESET ?=
TRACK ?=
RUNS ?= runs
METRICS ?=
PROBE_DATA ?=
OUT ?=

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' Makefile | expand -t 22

setup: .venv/installed  ## make .venv and install what constraints.txt pins (torch first)

.venv/installed: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "granary needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet -r constraints.txt
	@# torch for CUDA brings the triton it needs; elsewhere the kernel's tests run in the interpreter of this one
	@$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --quiet triton==3.9.0 \
		|| echo "triton could not be installed (it has wheels for Linux): the tests of its kernel will be skipped"
	@touch $@

# The whole main job on the embedded model, offline. DEMO_SIZE=small is a smoke test of the same commands.
DEMO ?= demo
DEMO_SIZE ?= full
DEMO_SEEDS_full := 0,1,2
DEMO_SEEDS_small := 0
DEMO_HARVEST_full := 400k
DEMO_HARVEST_small := 100k
DEMO_TRAIN_full := 600k
DEMO_TRAIN_small := 60k
DEMO_RUNS = $(DEMO)/runs --cache $(DEMO)/cache.zarr --arch batchtopk --arch matryoshka --k 6 \
	--seed $(DEMO_SEEDS_$(DEMO_SIZE)) --tokens $(DEMO_TRAIN_$(DEMO_SIZE)) --batch-size 512 --lr 1e-3 --resume

demo: setup  ## harvest -> train -> evaluate -> report, on the embedded model: minutes on two cores
	@echo "1/5  harvest the embedded model, clean and masked"
	@$(PY) -m harvest --model tiny --tokens $(DEMO_HARVEST_$(DEMO_SIZE)) --mask-prob 0.3 --out $(DEMO)/cache.zarr
	@echo "2/5  train unmasked and masked SAEs from one read of the cache"
	@$(PY) -m train --out $(DEMO_RUNS) --d-sae 512 --masked-fraction 0,0.5
	@echo "3/5  train the noise control: Gaussian, displacing rows as much as the masking did"
	@$(PY) -m train --out $(DEMO_RUNS) --d-sae 512 --masked-fraction 0 --corrupt gaussian --match-strength 0.5
	@echo "4/5  train the capacity control: a smaller dictionary, nothing else changed"
	@$(PY) -m train --out $(DEMO_RUNS) --d-sae 220 --masked-fraction 0
	@echo "5/5  evaluate all of them against the known truth"
	@$(PY) -m evaluate $(DEMO)/runs

harvest: setup  ## MODEL= [DATASET= LAYERS= TOKENS= MASK_PROB= MASK_STRING= MASK_UNIT= RANDOM_PROB= SHARD= DEVICE= DRY_RUN=1 OUT=]: run the model, write a cache
	$(PY) -m harvest --model '$(MODEL)' $(if $(DATASET),--dataset '$(DATASET)') $(if $(LAYERS),--layers $(LAYERS)) \
		$(if $(TOKENS),--tokens $(TOKENS)) --mask-prob $(MASK_PROB) --mask-string '$(MASK_STRING)' \
		$(if $(MASK_UNIT),--mask-unit $(MASK_UNIT)) $(if $(RANDOM_PROB),--random-prob $(RANDOM_PROB)) \
		$(if $(SHARD),--shard $(SHARD)) $(if $(DEVICE),--device $(DEVICE)) $(if $(DRY_RUN),--dry-run) \
		--out '$(or $(OUT),caches/$(notdir $(MODEL)).zarr)'

train: setup  ## ARCH= [CACHE= K= D_SAE= MASKED_FRACTION= SEEDS= TOKENS= PRESET=paper TRACK= DEVICE= OUT=]: train SAEs from a cache
	$(PY) -m train --cache '$(or $(CACHE),caches/$(notdir $(MODEL)).zarr)' --arch $(ARCH) $(if $(K),--k $(K)) \
		$(if $(D_SAE),--d-sae $(D_SAE)) --masked-fraction $(MASKED_FRACTION) --seed $(SEEDS) \
		$(if $(TOKENS),--tokens $(TOKENS)) $(if $(PRESET),--preset $(PRESET)) $(if $(TRACK),--track $(TRACK)) \
		$(if $(DEVICE),--device $(DEVICE)) --resume --out '$(or $(OUT),runs)'

evaluate: setup  ## [RUNS= METRICS= PROBE_DATA= DEVICE=]: measure the runs, write report.html
	$(PY) -m evaluate '$(RUNS)' $(if $(METRICS),--metrics $(METRICS)) $(if $(PROBE_DATA),--probe-data '$(PROBE_DATA)') \
		$(if $(DEVICE),--device $(DEVICE))

test: setup  ## all tests, offline, on two cores
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# kill -9, signals, failing and full disks, damage; 1000 kills take half an hour on two cores.
TRIALS ?= 60

faults: setup  ## [TRIALS=1000]: strike the commands with faults, and print what came of it (docs/reliability.md)
	GRANARY_FAULT_TRIALS=$(TRIALS) $(PY) -m pytest -n 2 tests/faults

SECONDS ?= 300

fuzz: setup  ## [SECONDS=300]: files of strangers, changed at random, to everything that reads them; led by coverage
	$(PY) -m pip install --quiet atheris || echo "atheris could not be installed (it has wheels for Linux)"
	$(PY) tests/fuzz_guided.py --seconds $(SECONDS)

check: setup  ## lint, format, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: setup  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Other tools, in an environment of its own that sees what .venv has and installs the rest, or another version, in itself:
# a minute instead of four. dictionary-learning alone comes without what it needs to run models.
COMPAT := sae-lens==6.54.12 eai-sparsify==1.3.3
COMPAT_ALONE := dictionary-learning==0.1.0
COMPAT_PY := .venv-compat/bin/python
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
DICTIONARY_LEARNING ?=

.venv-compat/installed: .venv/installed
	$(PYTHON) -m venv .venv-compat
	$(PY) $(PURELIB) > "$$($(COMPAT_PY) $(PURELIB))/granary.pth"
	$(COMPAT_PY) -m pip install --quiet $(COMPAT)
	$(COMPAT_PY) -m pip install --quiet --no-deps $(COMPAT_ALONE)
	@touch $@

test-compat: setup .venv-compat/installed  ## [DICTIONARY_LEARNING=checkout RUNS=]: load runs in SAELens, dictionary_learning and sparsify
	$(PY) -m benchmarks.compat $(if $(DICTIONARY_LEARNING),--dictionary-learning '$(DICTIONARY_LEARNING)') \
		$(if $(filter command line,$(origin RUNS)),--runs '$(RUNS)')

# The libraries that benchmarks.step is beside: empty, or options such as
# PEERS='--saelens VENV --sparsify VENV --dictionary-learning CHECKOUT --dictionary-learning-env VENV' (docs/performance.md)
PEERS ?=

bench: setup  ## [PEERS=]: a training step against others; sweeps; cache to SAEs; loaders; harvest; the cache; evaluation; the model of many GPUs; the demo
	$(PY) -m benchmarks.size
	$(PY) -m benchmarks.step --rounds 5 $(PEERS)
	$(PY) -m benchmarks.sweep
	$(PY) -m benchmarks.end_to_end
	$(PY) -m benchmarks.harvest
	$(PY) -m benchmarks.loader
	$(PY) -m benchmarks.cache
	$(PY) -m benchmarks.evaluate
	$(PY) -m benchmarks.scale check
	$(PY) -m benchmarks.demo
