# Every target sets up .venv by itself. Nothing is installed outside it.
#   make PYTHON=python3.12 install      another interpreter (3.11 or newer)
PYTHON ?= python3
EXTRAS ?= cpu,encoder,train,import,dev
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
NOT_ALONE := slow or cluster or docker or gpu or browser or compat

# On Linux pip's usual build of torch brings CUDA along, 3 GB that the CPU does not need. PyTorch's
# "Start locally" page names an index of CPU builds:  make TORCH_FLAGS="--index-url <that index>" install
TORCH := torch==2.13.0
TORCH_FLAGS ?=

.PHONY: help install demo serve test check test-slow sim test-compat test-browser bench proto format clean
.PHONY: cluster cluster-down cluster-status test-cluster test-on-cluster test-docker test-gpu load

help:
	@echo "make demo          index real text, ask it questions, leave the server running"
	@echo "make cluster       a whole cluster on this machine, plain processes; needs etcd"
	@echo "make cluster-down  stop it; its data stays in cluster-data"
	@echo "make test          the tests that need nothing else, in a few minutes"
	@echo "make check         style, types, house rules, fresh generated code"
	@echo "make test-slow     crash, recall and differential tests at full length"
	@echo "make test-cluster  real clusters on this machine, broken in every way; needs etcd"
	@echo "make test-on-cluster   the tests of one server, against a cluster"
	@echo "make test-docker   the image and the compose file; needs Docker"
	@echo "make test-gpu      the encoder on the GPUs that torch sees"
	@echo "make sim           the replication core in a simulated cluster, 5,000 seeds (SEEDS=)"
	@echo "make test-compat   LangChain, LlamaIndex, Haystack and mem0 against a server"
	@echo "make test-browser  the dashboard in Chromium"
	@echo "make bench         the measurements of the README; hours on a small machine"
	@echo "make load          latency against offered rate on a cluster of its own, 5 minutes (LOAD=--quick)"
	@echo "make install       only set up .venv"
	@echo "make clean         remove what was built; data folders stay"

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Shoal needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python pyproject.toml
	$(PIP) install $(TORCH_FLAGS) $(TORCH)
	$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/shoal demo

serve: $(STAMP)
	$(BIN)/shoal serve

cluster: $(STAMP)
	$(BIN)/shoal cluster up

cluster-down: $(STAMP)
	$(BIN)/shoal cluster down

cluster-status: $(STAMP)
	$(BIN)/shoal cluster status

test: $(STAMP)
	$(BIN)/python -m pytest -m "not ($(NOT_ALONE))"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-cluster: $(STAMP)
	$(BIN)/python -m pytest -m "cluster and not slow"

# Browser and other people's packages are left to their own targets.
test-on-cluster: $(STAMP)
	$(BIN)/python -m pytest --cluster -m "not ($(NOT_ALONE))" tests/http tests/differential tests/recall

test-docker: $(STAMP)
	$(BIN)/python -m pytest -m docker

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

SEEDS ?= 5000
sim: $(STAMP)
	$(BIN)/python -m tests.sim --seeds $(SEEDS)

test-compat: $(STAMP)
	$(PIP) install --quiet --editable '.[$(EXTRAS),compat]'
	$(BIN)/python -m pytest -m compat

test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy shoal coordinator storage_node index_node monitor encoder
	$(BIN)/python -m pytest -q tests/test_tidy.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

load: $(STAMP)
	$(BIN)/python tests/load $(LOAD)

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. $$(find proto -name '*.proto')

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
