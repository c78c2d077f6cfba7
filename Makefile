# make demo    trains PaCo on 2 ranks on images that ship with the project, minutes
# make test    the tests of every change
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
OLD := fa700ad
SHARDS := data/fashion-mnist-lt/manifest.json
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help prerequisites venv demo demo-compare test soak same lint format tree pages docs bench clean

help:
	@echo 'make demo          train PaCo with DeepSpeed on 2 ranks, on real long-tailed images; page: runs/demo/report.html'
	@echo 'make demo-compare  cross-entropy, Balanced Softmax and PaCo, 3 seeds each; page: runs/demo-compare/comparison.html'
	@echo 'make test          the tests of every change'
	@echo 'make soak          long runs: the full demo, the comparison; record: docs/soak.md'
	@echo 'make same          prove that results are those of an older version, OLD=REVISION (default: 0.8.0)'
	@echo 'make lint          ruff and mypy;  make format: rewrite with ruff'
	@echo 'make tree          which room of the code imports which, and what goes against the data'"'"'s way'
	@echo 'make docs          the documentation as a site: build/site;  make pages: its pages that are generated from settings'
	@echo 'make bench         speed and memory against rivals on the same work'
	@echo 'make venv          only install into .venv;  make clean: remove .venv, data/ and runs/'

prerequisites:
	@.ci/prerequisites $(PYTHON)

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt | prerequisites
	@echo 'installing into .venv (torch with CUDA libraries is 5 GB; minutes)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip  # older ones resolve for minutes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(SHARDS): shards/fashion-mnist-lt.yaml $(wildcard shards/fashion-mnist-lt/*.gz) | $(INSTALLED)
	$(BIN)/python tools/build_shards.py build $< --output $(@D) --overwrite

demo: $(INSTALLED) $(SHARDS)
	$(BIN)/deepspeed --num_gpus 2 paco_ds/train.py --config ds_configs/recipes/demo.yaml --output runs/demo

demo-compare: $(INSTALLED) $(SHARDS)
	$(BIN)/python tools/reproduce.py --table ds_configs/tables/demo.yaml --output runs/demo-compare --seeds 3

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

soak: $(INSTALLED) $(SHARDS)
	$(BIN)/python tools/soak.py
	cp runs/soak.md docs/soak.md

same: $(INSTALLED)
	$(BIN)/python tools/compare_versions.py --old $(OLD)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tree:
	@$(PYTHON) tools/tree.py

pages: $(INSTALLED)
	$(BIN)/python tools/reference.py
	$(BIN)/python tools/drawings.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python tools/bench/loss.py
	$(BIN)/python tools/bench/attention.py
	$(BIN)/python tools/bench/key_encoder.py
	$(BIN)/python tools/bench/centers.py
	$(BIN)/python tools/bench/key_queue.py
	$(BIN)/python tools/bench/watching.py
	$(BIN)/python tools/bench/saving.py
	$(BIN)/python tools/bench/log.py
	$(BIN)/python tools/bench/scale.py
	$(BIN)/python tools/bench/step.py
	$(BIN)/python tools/bench/shards.py
	$(BIN)/python tools/bench/stream.py
	$(BIN)/python tools/bench/shuffle.py
	$(BIN)/python tools/bench/views.py
	$(BIN)/python tools/bench/inference.py --rounds 1

clean:
	rm -rf .venv data runs
