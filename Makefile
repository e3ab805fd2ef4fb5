# Every target works on a fresh machine: it first fills ./.venv, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# What `make demo` leaves, and `make bench` compares.
SMALL := demo/SmolLM2-135M-Instruct
# The newest release of each of vLLM's minor versions that we support.
COMPAT := 0.30.0 0.31.0 0.32.0

.PHONY: demo test lint aot bench compat clean

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

bench: $(READY) $(SMALL)-requant-w4/config.json
	$(BIN)/requant bench $(SMALL)-requant-w4 --against $(SMALL)

compat: $(COMPAT:%=compat-%)

# Not .venv: every version of vLLM wants an environment of its own.
compat-%:
	@test -x .venv-compat/$*/bin/python || $(PYTHON) -m venv .venv-compat/$*
	.venv-compat/$*/bin/python tools/install.py --vllm $* test
	.venv-compat/$*/bin/python -m pytest tests/vllm_requant/test_linear.py tests/e2e/test_serve.py

clean:
	rm -rf .venv .venv-compat demo build dist *.egg-info
