# make demo       install, then the whole pipeline on real text, with a look at the result
# make test       install, then lint, types and every test
# make test-fast  the same without the slow tests
# make faults     the fault campaigns, an hour or so; their table goes into docs/reliability.md
# make audit      known vulnerabilities of the pinned packages; needs the network
# make lock       the pins and their hashes anew, within the ranges of pyproject.toml; UPGRADE=1 takes the newest
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# Two test files at a time. Each has eight simulated devices: more would only starve them.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile

.PHONY: demo test test-fast lint faults audit lock

$(VENV)/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11. Run make PYTHON=/path/to/python3.11 instead." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/tools: requirements-tools.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet -r requirements-tools.txt
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
	$(RUN) -m pytest $(SIDE_BY_SIDE)

test-fast: lint
	$(RUN) -m pytest $(SIDE_BY_SIDE) -m "not slow"

faults: $(VENV)/dev
	cd tests && ../$(RUN) -m faults --write

audit: $(VENV)/tools
	$(VENV)/tools/bin/pip-audit --requirement requirements.txt --disable-pip --strict --progress-spinner off || { \
		echo "error: a package is vulnerable, or could not be asked about: see above. make lock UPGRADE=1 takes newer ones." >&2; \
		exit 1; }

LOCK = $(VENV)/tools/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

lock: $(VENV)/tools
	$(LOCK) pyproject.toml --output-file requirements.txt
	$(LOCK) --group tools --output-file requirements-tools.txt
