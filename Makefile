# `make` prints the verbs. Anything set on the command line reaches the program: make serve HYPER_PORT=9000
SHELL := /bin/sh
.DEFAULT_GOAL := help

# cpu or gpu: the engine's build. Each has an environment of its own, since the two cannot share one.
DEVICE ?= cpu
VENV ?= $(if $(filter gpu,$(DEVICE)),.venv-gpu,.venv)
INSTALL := requirements/install.sh $(VENV) $(DEVICE)
BIN := $(VENV)/bin
# Where training keeps its audio, features and runs, and how many processes train (a divisor of the batch).
WORK ?= build
PROCESSES ?= 2

.PHONY: help serve test check bench stress bench-train sbom venv lock bank scenes train calibrate grpo eval clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

serve: ## Start the service on the embedded checkpoint (HYPER_PORT=9000, HYPER_CHECKPOINT=DIR, ... may follow)
	@$(INSTALL)
	@exec $(BIN)/hyper serve

test: ## Run every test, the real engine included (ARGS="-k name" narrows)
	@$(INSTALL) train baseline dev load
	@exec $(BIN)/python -m pytest $(ARGS)

check: ## Lint, format, types, Dockerfile
	@$(INSTALL) train dev load
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile

bench: ## Measure the service beside vLLM's own server, bare engines and transformers (ARGS="--rounds 3"; 12 minutes)
	@$(INSTALL) train
	@exec env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m loadtests bench $(ARGS)

stress: ## Measure the documented limits under hostile input, overload and faults (ARGS="--quick"; 20 minutes; resumes)
	@$(INSTALL) train dev
	@exec env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m loadtests stress $(ARGS)

bench-train: ## Measure a step of Stage II beside a plain trainer's, and resume, sync and masks (5 minutes)
	@$(INSTALL) train
	@exec env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m training.cli.bench tests/assets/clips $(ARGS)

sbom: ## Write what the service is made of, libraries inside wheels included, to WORK/sbom-DEVICE.cdx.json (CycloneDX)
	@$(INSTALL) dev
	@$(BIN)/python requirements/sbom.py $(WORK)/sbom-$(DEVICE).cdx.json --lock requirements/$(DEVICE).txt \
	  $(if $(filter cpu,$(DEVICE)),--lock requirements/torch-cpu.txt)

venv: ## Build .venv from the lock files and check that it imports (DEVICE=gpu for an NVIDIA card)
	@$(INSTALL)

lock: ## Write the lock files anew from pyproject.toml (UPGRADE=--upgrade takes newer releases)
	@$(INSTALL) dev
	@requirements/lock.sh $(VENV)

bank: ## Fetch voices and recordings to WORK=build and let every voice speak its lines
	@$(INSTALL) train data
	@exec $(BIN)/hyper data bank --work $(WORK)

scenes: ## Mix the bank and the recordings into clips and their encoder states
	@$(INSTALL) train data
	@exec $(BIN)/hyper data scenes --work $(WORK)

train: ## Train the embedded checkpoint's Stage I, going on where it stopped, and export to WORK/hyper-mini (BASE=DIR: from its decoder)
	@$(INSTALL) train
	@exec $(BIN)/hyper train mini_sft $(WORK)/runs/mini_sft --work $(WORK) --processes $(PROCESSES) $(if $(BASE),--base $(BASE)) \
	  --export $(WORK)/hyper-mini --overwrite $(if $(wildcard $(WORK)/runs/mini_sft/recipe.json),--resume)

calibrate: ## Give CHECKPOINT (WORK/hyper-mini if not named) a gate as the embedded checkpoint has it
	@$(INSTALL) train data
	@exec $(BIN)/hyper checkpoint calibrate $(or $(CHECKPOINT),$(WORK)/hyper-mini) --work $(WORK) --max-pauses 3 --window-tokens 1 --rest-tokens 8 \
	  --section ENV --wanted-aborts 0.04

grpo: ## Train Stage II on WORK/hyper-mini, which must have been calibrated, and export to WORK/hyper-mini-grpo
	@$(INSTALL) train
	@exec $(BIN)/hyper train mini_grpo $(WORK)/runs/mini_grpo --work $(WORK) --base $(WORK)/hyper-mini \
	  --export $(WORK)/hyper-mini-grpo --overwrite $(if $(wildcard $(WORK)/runs/mini_grpo/recipe.json),--resume)

eval: ## Print the model card's figures as one JSON line (CHECKPOINT=DIR: of another checkpoint)
	@$(INSTALL) train data
	@exec $(BIN)/hyper eval --suite held-out --json --work $(WORK) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

clean: ## Remove environments and caches; leaves built data and runs
	rm -rf .venv .venv-gpu .pytest_cache .ruff_cache .hypothesis *.egg-info
