# make workbook   everything, from drawing the corpora to the boards' table (add DATA=folder PRESET=flickr8k-small for real)
# make test       all tests          make lint   style          make lab   JupyterLab on the notebooks
# make notebooks  refresh the outputs and figures that are committed
# make html       the executed notebooks as HTML that needs no network, in runs/<preset>/html
# make lock       pin the tree of dependencies again             make clean  remove what was made, .venv included

PYTHON ?= python3
PRESET ?= miniature
DATA ?=
BIN := .venv/bin
NOTEBOOKS := $(sort $(wildcard notebooks/0*.ipynb))
ENVIRONMENT = CLIPCAP_PRESET=$(PRESET) CLIPCAP_DATA=$(if $(DATA),$(abspath $(DATA))) MPLBACKEND=module://matplotlib_inline.backend_inline \
              TOKENIZERS_PARALLELISM=false
EXECUTE = $(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.timeout=-1 \
          --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False

NO_CDN = --HTMLExporter.require_js_url=data:, --HTMLExporter.mathjax_url=data:,  # figures need no script

.PHONY: workbook execute notebooks test lint lab html lock clean

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# DONE is newer than all that a finished run rests on: a file changed, added or taken away (that changes its folder) comes after it
DONE := runs/$(PRESET)/notebooks/.done
RESTS_ON = runs/$(PRESET) $(CLIPCAP_RUNS) $(NOTEBOOKS) clipcap_lib requirements.lock $(DATA)

workbook: .venv/.installed
	@mkdir -p runs/$(PRESET)/notebooks
	@if [ "$$(cat $(DONE) 2>&1)" = "data: $(DATA)" ] \
	    && [ -z "$$(find $(RESTS_ON) -name __pycache__ -prune -o ! -path clipcap_lib -newer $(DONE) -print -quit)" ]; \
	  then echo "Done before, nothing has changed"; else $(MAKE) --no-print-directory execute; fi
	@$(BIN)/python -m clipcap_lib leaderboard --preset $(PRESET)
	@echo "data: $(DATA)" > $(DONE).new && mv $(DONE).new $(DONE) && touch $(DONE)
	@echo "Executed notebooks: runs/$(PRESET)/notebooks; figures: figures/latest/$(PRESET)"

execute: .venv/.installed
	@$(ENVIRONMENT) $(EXECUTE) --output-dir runs/$(PRESET)/notebooks $(NOTEBOOKS)

notebooks: .venv/.installed
	@CLIPCAP_FIGURES=$(CURDIR)/figures $(ENVIRONMENT) $(EXECUTE) --inplace $(NOTEBOOKS)

test: .venv/.installed
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=10

lint: .venv/.installed
	$(BIN)/ruff check .

lab: .venv/.installed
	$(ENVIRONMENT) $(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=. --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly

html: .venv/.installed
	$(BIN)/jupyter nbconvert --to html $(NO_CDN) --output-dir runs/$(PRESET)/html runs/$(PRESET)/notebooks/*.ipynb

lock:
	uv pip compile --universal --python-version 3.11 --extra test --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf .venv runs figures/latest build *.egg-info .pytest_cache .ruff_cache
