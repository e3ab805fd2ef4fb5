# Every target works on a fresh machine: it first fills ./.venv, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# What `make demo` leaves, and `make bench` compares.
SMALL := demo/SmolLM2-135M-Instruct
# The newest release of each of vLLM's minor versions that we support.
COMPAT := 0.30.0 0.31.0 0.32.0

# What vLLM 0.32 and 0.33 bring to a GPU; here it is the newest one.
TRITON := 3.6.0 3.8.0

.PHONY: demo test lint aot aot-vllm bench compat clean

$(READY): pyproject.toml tools/install.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py demo test lint
	@touch $@

demo: $(READY)
	$(BIN)/python tools/demo.py

$(SMALL)-requant-w4/config.json: | $(READY)
	$(BIN)/python tools/demo.py

# Two files at a time: most of a test runs on one thread, and a file shares its models and servers.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=25

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

aot: $(READY)
	$(BIN)/python -m requant_kernels.aot

aot-vllm: $(TRITON:%=aot-triton-%)

# The kernels whose code a compiler's version changes most.
aot-triton-%: $(READY)
	@test -d .venv-triton/$* || { rm -rf .venv-triton/$*.part && $(BIN)/pip install -q --no-deps --target .venv-triton/$*.part triton==$* && mv .venv-triton/$*.part .venv-triton/$*; }
	PYTHONPATH=.venv-triton/$* $(BIN)/python -m requant_kernels.aot --only middle

bench: $(READY) $(SMALL)-requant-w4/config.json
	$(BIN)/requant bench $(SMALL)-requant-w4 --against $(SMALL)

compat: $(COMPAT:%=compat-%)

# Not .venv: every version of vLLM wants an environment of its own.
compat-%:
	@test -x .venv-compat/$*/bin/python || $(PYTHON) -m venv .venv-compat/$*
	.venv-compat/$*/bin/python tools/install.py --vllm $* test
	.venv-compat/$*/bin/python -m pytest tests/vllm_requant/test_linear.py tests/vllm_requant/test_in_flight.py tests/e2e/test_serve.py

clean:
	rm -rf .venv .venv-compat .venv-triton demo build dist *.egg-info
