# make demo       install, then the whole pipeline on real text, with a look at the result
# make test       install, then lint, types and every test
# make test-fast  the same without the slow tests
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-fast lint

$(VENV)/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11. Run make PYTHON=/path/to/python3.11 instead." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/run requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/run
	$(RUN) scripts/make_demo_corpus.py --output demo/corpus.txt --overwrite
	$(RUN) scripts/prepare_data.py --input demo/corpus.txt --output demo/data --vocab-size 4096 --overwrite
	$(RUN) scripts/train.py --config configs/demo.yaml --overwrite
	$(RUN) scripts/evaluate.py --model demo/run/best_model --data demo/data/test.txt
	$(RUN) scripts/generate.py --model demo/run/best_model --prompt "Return the" --max-tokens 100 --top-p 0.9
	@echo
	@echo "The model is in demo/run, its metrics in demo/run/metrics.jsonl; to look at the curves:"
	@echo "  $(VENV)/bin/tensorboard --logdir demo/run/tensorboard"
	@echo "Next: docs/guide.md, your own text through the same four commands."

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(RUN) -m pytest

test-fast: lint
	$(RUN) -m pytest -m "not slow"
