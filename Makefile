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
ENSEMBLES := $(wildcard notebooks/05_*.ipynb)
EXPLORER := $(wildcard notebooks/07_*.ipynb)
ENVIRONMENT = CLIPCAP_PRESET=$(PRESET) CLIPCAP_DATA=$(if $(DATA),$(abspath $(DATA))) MPLBACKEND=module://matplotlib_inline.backend_inline \
              TOKENIZERS_PARALLELISM=false
EXECUTE = $(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.timeout=-1 \
          --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False

NO_CDN = --HTMLExporter.require_js_url=data:, --HTMLExporter.mathjax_url=data:,  # figures need no script

.PHONY: workbook notebooks test lint lab html lock clean

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

workbook: .venv/.installed
	@mkdir -p runs/$(PRESET)/notebooks
	@$(ENVIRONMENT) $(EXECUTE) --output-dir runs/$(PRESET)/notebooks $(filter-out $(EXPLORER) $(ENSEMBLES),$(NOTEBOOKS))
	@$(ENVIRONMENT) OMP_NUM_THREADS=1 $(EXECUTE) --output-dir runs/$(PRESET)/notebooks $(EXPLORER) & explorer=$$!; \
	  $(ENVIRONMENT) $(EXECUTE) --output-dir runs/$(PRESET)/notebooks $(ENSEMBLES) \
	  && $(BIN)/python -m clipcap_lib leaderboard --preset $(PRESET); status=$$?; \
	  wait $$explorer && exit $$status  # neither reads what the other writes
	@echo "Executed notebooks: runs/$(PRESET)/notebooks; figures: figures/latest/$(PRESET)"

notebooks: .venv/.installed
	@CLIPCAP_FIGURES=$(CURDIR)/figures $(ENVIRONMENT) $(EXECUTE) --inplace $(NOTEBOOKS)

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

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
