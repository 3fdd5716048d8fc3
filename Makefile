# The one task runner: people, pre-commit and CI call these targets and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.edgeseg-installed
# Of gpu and gpu-kit.
KIT       ?= gpu-kit
OUT       ?= gpu-results
PYTHON310 ?= python3.10

.DEFAULT_GOAL := help
.PHONY: help venv demo test unit gpu gpu-kit arm avx2 lint typecheck check pycuda docs pictures dist schemas format coverage modelopt bench encoders clean

help:            ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

venv: $(STAMP)   ## Make the virtual environment from the project's own files
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv       ## Build the demo FPN in INT8, run it on sample images, show the result
	$(BIN)/edgeseg build --arch fpn --precision int8 --force
	$(BIN)/edgeseg run engines/fpn-demo-int8 calibration/demo/val/images --output demo-output --overlay --limit 8 --force

test: lint docs  ## Lint, type-check, build the docs and run the whole test suite, two files at a time
	$(BIN)/mypy
	$(BIN)/pytest tests/integration/test_ray_cluster.py  # alone: Ray has processes of its own for every core
# In the order of testpaths: by itself xdist starts files of few tests last, and those are the long ones.
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --deselect tests/integration/test_ray_cluster.py

unit: venv       ## Run the fast tests only (seconds)
	$(BIN)/pytest -n 2 --dist loadfile tests/unit

gpu:             ## On a device: everything that needs a GPU and TensorRT, with PYTHON, which has them; raw JSON in OUT; FOLDERS: of gpu-kit
	$(PYTHON) tests/gpu/kit/on_device.py $(OUT) $(if $(FOLDERS),--folders $(FOLDERS)) $(KIT_OPTIONS)

gpu-kit: venv    ## Make what a GPU machine without a network needs, in KIT: engine folders, and TensorRT 8.5 with PYTHON310 in pieces
	$(BIN)/python tests/gpu/kit/folders.py $(KIT)
	tests/gpu/kit/pack.sh $(KIT)/pieces --python $(PYTHON310) --with tests --with pyproject.toml \
		--with $(KIT)/engines --with $(KIT)/images

arm: venv        ## Run the ARM folders on ARM's INT8 kernels, emulated by QEMU: accuracy, no times (needs Debian's packages)
	$(BIN)/pytest tests/emulated/test_emulated_arm.py

avx2: venv       ## Run INT8 on the kernels of an x86 CPU without VNNI, emulated by QEMU: no times (needs Debian's package)
	$(BIN)/pytest tests/emulated/test_emulated_avx2.py

lint: venv       ## ruff check and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: venv  ## mypy --strict; again with TensorRT's own names and signatures, by version
	$(BIN)/mypy
	MYPYPATH=tests:tests/gpu $(BIN)/mypy tests/gpu/*.py tests/gpu/kit/folders.py tests/gpu/kit/on_device.py # they cannot run here
	$(BIN)/python tests/recorded_tensorrt/stubs.py

check: lint typecheck ## Everything but the tests

pycuda: venv     ## Build pycuda for the tests of its CUDA layer; where it cannot be built, say why and go on
	$(BIN)/python tests/stub_cuda/install_pycuda.py

docs: venv       ## Build the site of docs/ into site/, strictly, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pictures: venv   ## Make the pictures of README and docs again (needs Chromium)
	$(BIN)/python docs/pictures.py

dist: venv       ## Build wheel and sdist into dist/, check them, install it without torch in the oldest and newest Python here (or PYTHONS="...") and run it
	$(BIN)/python tests/check_distribution.py $(foreach python,$(PYTHONS),--python $(python))

schemas: venv    ## Write the JSON schemas of manifest, bench report, decision and calibration table again (docs/schemas/)
	$(BIN)/python docs/schemas.py

format: venv     ## Let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: venv   ## Run the tests and show what they do not reach
	$(BIN)/pytest --cov=edgeseg --cov-report=term-missing:skip-covered

modelopt: .venv-modelopt/.installed ## Make the environment of the peer that needs one of its own (several GB)
.venv-modelopt/.installed: benchmarks/requirements-modelopt.txt
	$(PYTHON) -m venv .venv-modelopt
	.venv-modelopt/bin/pip install --quiet -r benchmarks/requirements-modelopt.txt
	@touch $@

bench: venv modelopt ## Measure everything in benchmarks/README.md again (about an hour and a half, on a machine that does nothing else)
	$(BIN)/pip install --quiet -c constraints.txt -r benchmarks/requirements-peers.txt
	for name in end_to_end architectures overhead files_to_masks nodes calibration harness_check tensorrt_rtx tensorrt_accuracy equalization results; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; done

encoders: venv   ## Build every family of encoders that benchmarks/results/encoders.json does not hold yet (hours); writes docs/encoders.md
	$(BIN)/python -m benchmarks.encoders

clean:           ## Remove caches and outputs, not the virtual environment
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov demo-output site dist build
