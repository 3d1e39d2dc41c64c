# `make` lists the targets. Variables on the command line reach the program: make serve HYPER_PORT=9000
SHELL := /bin/sh
.DEFAULT_GOAL := help

# cpu or gpu: the engine's build. Each has its own environment, because the two cannot share one.
DEVICE ?= cpu
VENV ?= $(if $(filter gpu,$(DEVICE)),.venv-gpu,.venv)
INSTALL := requirements/install.sh $(VENV) $(DEVICE)
BIN := $(VENV)/bin
# WORK: folder for training audio, features and runs. PROCESSES: training processes; must divide the batch size.
WORK ?= build
PROCESSES ?= 2

.PHONY: help serve test test-fleet check bench stress bench-train sbom venv lock bank scenes train calibrate grpo eval clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

serve: ## Start the service with the embedded checkpoint (options: HYPER_PORT=9000, HYPER_CHECKPOINT=DIR, ...)
	@$(INSTALL)
	@exec $(BIN)/hyper serve

test: ## Run every test, the real engine included (ARGS="-k name" selects tests)
	@$(INSTALL) train baseline dev load
	@exec $(BIN)/python -m pytest $(ARGS)

test-fleet: ## Test a fleet of two replicas on Ray Serve (installs the extra fleet; a minute on two quiet cores)
	@$(INSTALL) train dev fleet
	@exec $(BIN)/python -m pytest tests/server/test_fleet.py $(ARGS)

check: ## Check lint, format, types and the Dockerfile
	@$(INSTALL) train dev load
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile

bench: ## Compare the service with vLLM's own server, bare engines, transformers and llama.cpp (ARGS="--rounds 3"; 20 minutes)
	@$(INSTALL) train small
	@exec env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m loadtests bench $(ARGS)

stress: ## Measure the documented limits under hostile input, overload and faults (ARGS="--quick"; 20 minutes; resumes)
	@$(INSTALL) train dev
	@exec env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m loadtests stress $(ARGS)

bench-train: ## Compare a Stage II step with a plain trainer's; check resume, weight sync and masks (5 minutes)
	@$(INSTALL) train
	@exec env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m training.cli.bench tests/assets/clips $(ARGS)

sbom: ## Write the software bill of materials to WORK/sbom-DEVICE.cdx.json (CycloneDX)
	@$(INSTALL) dev
	@$(BIN)/python requirements/sbom.py $(WORK)/sbom-$(DEVICE).cdx.json --lock requirements/$(DEVICE).txt \
	  $(if $(filter cpu,$(DEVICE)),--lock requirements/torch-cpu.txt)

venv: ## Build .venv from the lock files and check its imports (DEVICE=gpu for an NVIDIA card)
	@$(INSTALL)

lock: ## Update the lock files from pyproject.toml (UPGRADE=--upgrade takes newer releases)
	@$(INSTALL) dev
	@requirements/lock.sh $(VENV)

bank: ## Download voices and recordings to WORK=build and synthesize the lines of every voice
	@$(INSTALL) train data
	@exec $(BIN)/hyper data bank --work $(WORK)

scenes: ## Mix voices and recordings into training clips and compute their encoder states
	@$(INSTALL) train data
	@exec $(BIN)/hyper data scenes --work $(WORK)

train: ## Train Stage I of the embedded checkpoint, or resume it, and export to WORK/hyper-mini (BASE=DIR: start from its decoder)
	@$(INSTALL) train
	@exec $(BIN)/hyper train mini_sft $(WORK)/runs/mini_sft --work $(WORK) --processes $(PROCESSES) $(if $(BASE),--base $(BASE)) \
	  --export $(WORK)/hyper-mini --overwrite $(if $(wildcard $(WORK)/runs/mini_sft/recipe.json),--resume)

calibrate: ## Calibrate the pause gate of CHECKPOINT (default WORK/hyper-mini) like the embedded checkpoint's
	@$(INSTALL) train data
	@exec $(BIN)/hyper checkpoint calibrate $(or $(CHECKPOINT),$(WORK)/hyper-mini) --work $(WORK) --max-pauses 3 --window-tokens 1 --rest-tokens 8 \
	  --section ENV

grpo: ## Train Stage II on the calibrated WORK/hyper-mini and export to WORK/hyper-mini-grpo
	@$(INSTALL) train
	@exec $(BIN)/hyper train mini_grpo $(WORK)/runs/mini_grpo --work $(WORK) --base $(WORK)/hyper-mini \
	  --export $(WORK)/hyper-mini-grpo --overwrite $(if $(wildcard $(WORK)/runs/mini_grpo/recipe.json),--resume)

eval: ## Print the model card's figures as one JSON line (CHECKPOINT=DIR: for another checkpoint)
	@$(INSTALL) train data
	@exec $(BIN)/hyper eval --suite held-out --json --work $(WORK) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

clean: ## Remove environments and caches; keep built data and runs
	rm -rf .venv .venv-gpu .pytest_cache .ruff_cache .hypothesis *.egg-info
