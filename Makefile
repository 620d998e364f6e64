PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Two threads beside another job are slower than one.
export OMP_NUM_THREADS ?= 1
# Set, as images of CI like it, each process of a test would compile all modules anew: ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo check test test-all test-lowest lint typecheck docs proof assets

help:
	@echo 'make install    .venv with the tested versions'
	@echo 'make demo       distill, sample, compare and evaluate the tiny model on a CPU, into runs/demo'
	@echo 'make check      ruff, mypy and the tests that load no model (about a minute)'
	@echo 'make test       ruff, mypy and the tests but for the long suites of processes and plans, on two cores'
	@echo 'make test-all   ruff, mypy and all tests'
	@echo 'make test-lowest  tests with the lowest versions that pyproject.toml allows (downloads some GB)'
	@echo 'make docs       the documentation as a site, into build/site'
	@echo 'make proof      distill and judge every arm of the README table (about an hour)'
	@echo 'make assets     train the embedded models again, into runs/'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("rats-video needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make install PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	# torch alone first: resolved with the rest, pip may prefer a build that brings the CUDA packages.
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/rats-video run --config tiny --output runs/demo

# A file stays on one of the two workers, which makes what its tests share once. The long suites come first by name and
# are begun first. (Not loadgroup: with pytest 9.2, pytest-xdist 3.8 groups nothing.)
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

check: lint typecheck
	$(BIN)/pytest $(WORKERS) -m 'not pipeline'

test: lint typecheck
	$(BIN)/pytest $(WORKERS) -m 'not slow'

test-all: lint typecheck
	$(BIN)/pytest $(WORKERS)

# Each bound as an exact version. torch and transformers change what the stock pipelines do: their contract is run too.
LOWEST := .venv-lowest/bin
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	mkdir -p build
	sed -n 's/^ *"\([a-zA-Z-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml > build/lowest.txt
	$(LOWEST)/pip install --quiet -c build/lowest.txt -e '.[dev]'
	$(LOWEST)/pytest $(WORKERS) -m 'not pipeline'
	$(LOWEST)/pytest $(WORKERS) tests/backbones

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy knows no package-dir mapping: show it the tree as installed, in links, so that cli/ is rats_video.cli.
typecheck: install
	rm -rf build/mypy/rats_video
	mkdir -p build/mypy/rats_video
	cd build/mypy/rats_video && ln -s ../../../rats_video/* ../../../cli ../../../configs ../../../datasets .
	cd build/mypy && ../../$(BIN)/mypy --config-file ../../pyproject.toml

# Strict, by mkdocs.yml: a broken link or anchor, or a page outside the navigation, is an error. -P: our datasets/ stays off
# sys.path. Not --quiet: it would silence the warnings that strict counts.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -P -m mkdocs build
	@echo 'build/site/index.html'

proof: install
	$(BIN)/python benchmarks/proof.py

assets: install
	$(BIN)/rats-video train vae --output runs/tiny-vae
	$(BIN)/rats-video train teacher --output runs/tiny-wan --set vae=runs/tiny-vae
	$(BIN)/rats-video train reward --output runs/shapes-reward --set model=runs/tiny-wan
	$(BIN)/rats-video train reward --config tiny-heldout --output runs/shapes-reward-heldout --set model=runs/tiny-wan
	$(BIN)/rats-video distill --output runs/tiny --set guard=null --set model=runs/tiny-wan --set reward.path=runs/shapes-reward
	$(BIN)/rats-video train reward --latent --output runs/shapes-latent-reward --set model=runs/tiny-wan \
		--set reward.path=runs/shapes-reward --set student=runs/tiny/student
