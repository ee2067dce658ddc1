# `make demo` and `make test` are for users; the rest is for those who change the code (CONTRIBUTING.md).
# A bare machine needs make, Python 3.11 or newer with venv, and a package index that pip can reach.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys, venv; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := torch==2.13.0
RULES := deploy/kubernetes/components/monitoring/rules.yaml
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(STAMP) ## install, then kill a training job and a daemon and see nothing lost
	@$(BIN)/ckptd demo

.PHONY: test
test: $(STAMP) ## the tests that need no GPU and little time
	@$(BIN)/pytest -m "not slow and not gpu"

.PHONY: test-all
test-all: $(STAMP) ## every test that needs no GPU
	@$(BIN)/pytest -m "not gpu"

.PHONY: lint
lint: $(STAMP) ## format, lint, types, layers, protos, generated files
	@ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo
	buf lint
	fresh=$$(mktemp -d)
	trap 'rm -rf "$$fresh"' EXIT
	$(call generate,$$fresh)
	for file in proto/ckptd_api/v1/*_pb2*; do
		cmp "$$file" "$$fresh/$${file#proto/}" || { echo "stale: run make proto" >&2; exit 1; }
	done
	python -m ckptd.config | cmp - docs/CONFIG.md || { echo "stale: run make docs" >&2; exit 1; }
	python -m ckptd.metrics | cmp - docs/METRICS.md || { echo "stale: run make docs" >&2; exit 1; }
	python deploy/kubernetes/rules.py | cmp - $(RULES) || { echo "stale: run make docs" >&2; exit 1; }

.PHONY: bench
bench: $(STAMP) ## measure; a few minutes on an idle machine
	@python -m bench.run

.PHONY: proto
proto: $(STAMP) ## write the modules generated from the protos
	@$(call generate,proto)

.PHONY: docs
docs: $(STAMP) ## write the documentation generated from the code
	@python -m ckptd.config > docs/CONFIG.md
	python -m ckptd.metrics > docs/METRICS.md
	python deploy/kubernetes/rules.py > $(RULES)

.PHONY: clean
clean: ## remove what is not in the repository's care: environment and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist .demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define generate
python -m grpc_tools.protoc -I proto --python_out=$(1) --grpc_python_out=$(1) \
	--mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) proto/ckptd_api/v1/*.proto
endef

# torch by itself and first: only so is the CPU build taken where the index offers one.
$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then
		echo "no Python 3.11 or newer with venv: install one (Debian: python3-venv), or set PYTHON" >&2; exit 1
	fi
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
