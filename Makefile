# `make` lists the targets. Every one sets up .venv first, which takes no time when nothing changed.

PYTHON ?= python3
RECIPE ?= configs/quickstart.yaml
QUANT ?= q4_k_m
# settings for the script, as key=value
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
READY := $(VENV)/ready-$(DEVICE)

.DEFAULT_GOAL := help
.PHONY: help setup doctor download data train chat webui webchat api eval runs merge gguf test test-quick bench torture lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## build .venv from the pinned requirements, for a GPU or a CPU
$(READY): requirements.txt requirements-$(DEVICE).txt requirements-unsloth.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("error: python is %d.%d; the pinned packages need 3.11 to 3.13: make setup PYTHON=python3.12" % v)'
	@echo "setting up $(VENV) for a $(DEVICE) machine; a first time downloads for minutes"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-$(DEVICE).txt -r requirements-dev.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-unsloth.txt
	@rm -f $(VENV)/ready-* && touch $@

doctor: $(READY) ## say whether RECIPE will run on this machine, and change nothing
	@$(PY) train.py $(RECIPE) --dry-run $(ARGS)

download: $(READY) ## put the embedded model on the disk (python download.py ORG/NAME fetches another)
	@$(PY) download.py

data: $(READY) ## check the data of RECIPE and show samples as they will be learned
	@$(PY) preview.py $(RECIPE) $(ARGS)

train: $(READY) ## fine-tune the model of RECIPE; the default takes minutes on two CPU cores
	@$(PY) train.py $(RECIPE) $(ARGS)

chat: $(READY) ## talk to the newest run
	@$(PY) chat.py $(ARGS)

webui: $(READY) ## open the whole flow in a browser; ARGS="--host H --port P"
	@$(PY) webui.py $(ARGS)

webchat: $(READY) ## talk to the newest run in a browser
	@$(PY) webui.py --chat $(ARGS)

api: $(READY) ## serve the newest run to programs that speak OpenAI's API
	@$(PY) api.py $(ARGS)

eval: $(READY) ## measure the newest run on data that it has not seen, before and after training
	@$(PY) evaluate.py $(ARGS)

runs: $(READY) ## list all runs with their key figures
	@$(PY) evaluate.py --runs

merge: $(READY) ## merge the newest run into a 16-bit model, and prove it
	@$(PY) merge.py $(ARGS)

gguf: $(READY) ## make a GGUF of the newest run for llama.cpp and Ollama; QUANT=q4_k_m,q8_0
	@$(PY) quantize.py --type $(QUANT) $(ARGS)

test: $(READY) ## run every test
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-quick: $(READY) ## run the tests that train nothing, in about two minutes
	@$(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(READY) ## train the same job with this kit and with others, and compare; ARGS="--jobs identity --steps 3"
	@$(PY) bench/compare.py $(ARGS)

torture: $(READY) ## try to break the kit for an hour or two, and print what it survived; ARGS="--share 0.1": a tenth
	@ONECARD_TORTURE=1 $(PY) -m pytest -q tests/evaluation/test_interruptions.py
	@$(PY) bench/torture.py $(ARGS)

lint: $(READY) ## check style, format, and the code for security faults of high severity
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@$(VENV)/bin/bandit -q -lll -r . -x ./.venv,./.cache,./models,./saves,./data,./shared,./tests

clean: ## delete .venv and .cache; models and runs stay
	@rm -rf $(VENV) .cache
