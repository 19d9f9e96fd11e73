# From a fresh clone:  make demo | make test | make bench | make docs
# Each makes .venv, installs what is needed, builds the native module and runs. Stamps in .venv see to it
# that a second call repeats no step whose inputs did not change.
#
#   make test ARGS="-k prune -x -n 0"     arguments for pytest (-n 0: in one process); likewise ARGS for bench
#   make demo DEMO="--output_dir my/run"  arguments for fuseopt finetune
#   make test PYTHON=python3.12           another interpreter (make clean first)
#
# torch: if $(PYTHON) has torch >= 2.6, .venv uses that one as it is. Otherwise pip installs the version in
# constraints.txt from wherever pip is set up to look. On Linux the default index has the CUDA build, which works
# without a GPU but is large; PyTorch's index for CPU wheels has a small one, named for one call by
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
ARGS   ?=
DEMO   ?= --output_dir runs/demo --overwrite

VENV := .venv
RUN  := $(VENV)/bin/python
PIP  := $(RUN) -m pip --disable-pip-version-check --quiet --quiet
# Folders are listed too: theirs is the time stamp that changes when a file is added or removed.
CSRC := $(shell find csrc -type d -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' 2>/dev/null)

# Prints "VERSION FOLDER" of the torch that $(PYTHON) sees, or nothing if there is none or it is too old.
FIND_TORCH := from importlib import metadata as m; d = m.distribution("torch"); v = d.version; \
  tuple(map(int, v.split(".")[:2])) >= (2, 6) and print(v, d.locate_file(""))

.PHONY: help demo test sanitize bench docs clean
help:
	@echo 'make demo    fine-tune a small pretrained model with fused, verified optimizers; results in runs/demo'
	@echo 'make test    run the tests'
	@echo 'make sanitize   the same of the CUDA kernels, which run on the CPU, under the sanitizers of g++'
	@echo 'make bench   measure a step against torch; results as JSON'
	@echo 'make docs    build the pages under docs/ into build/site'
	@echo 'make clean   remove what the others made, except runs/'

demo: $(VENV)/built
	$(RUN) -m fuseopt finetune --config examples/finetune/demo.yaml $(DEMO)

test: $(VENV)/built
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)

# tests/emulation compiles the kernels with g++. Python has no sanitizer, so its library is loaded before it.
sanitize: $(VENV)/built
	$(RUN) tests/emulation/build.py --sanitize
	FUSEOPT_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(RUN) -m pytest -q -s tests/test_cuda_*.py $(ARGS)  # -s: the report goes to stderr

bench: $(VENV)/built
	$(RUN) -m bench $(ARGS)

# The variable silences an advertisement of the theme.
docs: $(VENV)/built
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict -f docs/mkdocs.yml

clean:
	rm -rf $(VENV) build dist *.egg-info fuseopt/_C*.so .pytest_cache .benchmarks .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, with fuseopt in editable form; the native module is the next step.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo 'fuseopt: $(PYTHON) was not found; name a Python >= 3.10: make PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fuseopt needs Python 3.10 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo 'fuseopt: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	@set -e; found=$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null || true); \
	if [ -n "$$found" ]; then \
	  version=$${found%% *}; folder=$${found#* }; echo "Using torch $$version from $$folder"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	  echo "$$folder" > $$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_from_outside.pth; \
	  sed "s/^torch==.*/torch==$$version/" constraints.txt > $(VENV)/constraints.txt; \
	  if [ -d "$$folder/triton" ]; then sed -i '/^triton==/d' $(VENV)/constraints.txt; fi; \
	else \
	  echo "$(PYTHON) has no torch >= 2.6; installing the one in constraints.txt"; \
	  $(PYTHON) -m venv $(VENV); \
	  cp constraints.txt $(VENV)/constraints.txt; \
	fi
	@echo "Installing into $(VENV); the first time this takes a minute or more"
	$(PIP) install -c $(VENV)/constraints.txt setuptools pybind11 ninja
	@# The module compiles while pip downloads. What goes wrong there is said by the next rule, which does the same.
	$(RUN) setup.py -q build_ext --inplace >/dev/null 2>&1 & \
	  FUSEOPT_NATIVE=0 $(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[finetune,test]'; \
	  status=$$?; wait; exit $$status
	$(PIP) install -c $(VENV)/constraints.txt --no-deps timm  # it would add torchvision; its optimizers do without
	@touch $@

# ninja compiles only what changed. Without a compiler this says so, the torch reference does the work, and the
# next call tries again.
ifeq ($(wildcard fuseopt/_C*.so),)
.PHONY: $(VENV)/built
endif
$(VENV)/built: $(VENV)/installed $(CSRC)
	$(RUN) setup.py -q build_ext --inplace
	@touch $@
