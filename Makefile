# Each target sets up what it needs: a virtual environment, pinned packages, hash-checked models.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One stamp for what `pip install .` brings, one for worlds on top, one for all that tests need: a pip call each.
LANGUAGE := $(VENV)/.installed
REWARDS := $(VENV)/.installed-rewards
DEV := $(VENV)/.installed-dev
SOURCES := common_jax tuco_jax reward_jax tests benchmarks examples

.PHONY: demo demo-reward test test-quick bench adapter gemma-pair fashion-mnist studies study-images study-locomotion check format clean
.DEFAULT_GOAL := demo
.NOTPARALLEL:

demo: $(LANGUAGE)
	$(BIN)/tuco-jax demo

demo-reward: $(REWARDS)
	$(BIN)/reward-jax demo

test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What a change most likely breaks: the rest takes three quarters of the time.
test-quick: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

# How the adapter that the demo ships is made: 10 minutes of training, 4 of answers on two cores.
adapter: $(LANGUAGE)
	$(BIN)/python -m tuco_jax.datasets.refusal_data --out runs/refusal-data
	$(BIN)/python -c 'from tuco_jax.datasets.assets import fetch; fetch("smollm2")'
	$(BIN)/tuco-jax finetune --config configs/tuco/finetune_refusal.yaml
	$(BIN)/python -m tuco_jax.evaluation.refusals --base .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
	  --tuned runs/refusal/adapter --prompts runs/refusal-data --out runs/refusal/refusals.json

# A pre-trained base taught to chat and to refuse: the second pair of the studies.
GEMMA := .cache/gemma3/gemma-3-270m-q4_k_m.gguf
gemma-pair: $(LANGUAGE)
	$(BIN)/python -m tuco_jax.datasets.chat_data --out runs/gemma-data
	$(BIN)/python -c 'from tuco_jax.datasets.assets import fetch; fetch("gemma3")'
	$(BIN)/tuco-jax finetune --config configs/tuco/finetune_gemma_chat.yaml --resume true
	$(BIN)/python -m tuco_jax.evaluation.refusals --base $(GEMMA) --tuned runs/gemma-chat/adapter \
	  --prompts runs/gemma-data --out runs/gemma-chat/refusals.json
	$(BIN)/python -m tuco_jax.evaluation.refusals --base $(GEMMA) --tuned runs/gemma-chat/adapter \
	  --prompts runs/gemma-data/harmless.jsonl --max_new_tokens 60 --out runs/gemma-chat/chat.json

# Every study on both pairs, some two hours on two cores and more, gathered in docs/results/tuco. MWE: the
# folder `persona` of github.com/anthropics/evals.
STUDIES := web-chat conjugate floors output-co many-shot broken broken-wild alpha-mmlu gcg
MWE ?=
studies: $(LANGUAGE)
	@test -d runs/gemma-chat/adapter || { echo "the second pair is missing: make gemma-pair"; exit 2; }
	for run in $(STUDIES) $(if $(MWE),alpha-mwe); do \
	  options="$${run%-wild} --config configs/tuco/study_$$(echo $$run | tr - _).yaml"; \
	  if [ $$run = alpha-mwe ]; then options="$$options --data $(MWE)"; fi; \
	  $(BIN)/tuco-jax study $$options --out runs/studies/smollm2/$$run || exit; \
	  $(BIN)/tuco-jax study $$options --out runs/studies/gemma/$$run \
	    --base $(GEMMA) --tuned runs/gemma-chat/adapter || exit; \
	done
	$(BIN)/python -m tuco_jax.studies.collect \
	  --pairs '[runs/studies/smollm2, runs/studies/gemma]' --out docs/results/tuco

# Fashion-MNIST into the cache, of Debian's package or of DATA=FOLDER; the study of images fetches it, too.
fashion-mnist: $(LANGUAGE)
	$(BIN)/python -m reward_jax.data.images.fashion $(if $(DATA),--data $(DATA))

# Relative rewards of robots that walk: tiny is HalfCheetah in minutes, cpu all three in an hour or two,
# ablations what the reward hangs on, energy the dear reward and one distilled from it, unet the paper's network and
# what quicker sampling costs, paper the paper's sizes, for a GPU.
SIZE ?= tiny
study-locomotion: $(REWARDS)
	$(BIN)/reward-jax study locomotion --config configs/reward/study_locomotion_$(SIZE).yaml

# Relative rewards of images, of Fashion-MNIST or DATA=FOLDER: tiny in 15 minutes on two quiet cores, cpu in some two
# hours by the steps of tiny, paper for a GPU.
DATA ?=
study-images: $(REWARDS)
	$(BIN)/reward-jax study images --config configs/reward/study_images_$(SIZE).yaml $(if $(DATA),--data $(DATA))

bench: $(DEV)
	$(BIN)/python -m benchmarks.tuco
	$(BIN)/python -m benchmarks.tuco --precisions
	$(BIN)/python -m benchmarks.int8
	$(BIN)/python -m benchmarks.steer
	$(BIN)/python -m benchmarks.reward
	$(BIN)/python -m benchmarks.images
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.load_images
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.soak

check: $(DEV)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/common/test_imports.py tests/common/test_words.py

format: $(DEV)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "no virtual environment: is the package python3-venv there?"; exit 2; }

$(REWARDS): EXTRAS := [rewards]
$(REWARDS): HOLDS := $(LANGUAGE)
$(DEV): EXTRAS := [rewards,dev]
$(DEV): HOLDS := $(LANGUAGE) $(REWARDS)
$(LANGUAGE) $(REWARDS) $(DEV): $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.$(EXTRAS)'
	@touch $(HOLDS) $@
