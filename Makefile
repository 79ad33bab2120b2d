# The two commands that matter: `make serve` and `make test`. Both install what is missing on a Debian or Ubuntu machine.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CACHE := .cache
MODELS ?= models
SERVE_ARGS ?=
PIP := $(PY) -m pip install --disable-pip-version-check
CORE := $(wildcard aiorch_server/_core/*.pyx aiorch_server/_core/*.pxd aiorch_server/include/*.h \
    backends/aiorch_backends/*/*.pyx backends/aiorch_backends/*/*.h) setup.py

.PHONY: serve test test-sanitize leak-run fuzz chaos lint compile debug models bench-micro bench-peers bench-memory \
    bench-profile bench-rollout bench-optimizer clean

serve: $(CACHE)/examples $(CACHE)/compiled models
	$(VENV)/bin/aiorch serve --model-repository $(MODELS) --log-level warning $(SERVE_ARGS)

# one process per folder, two at a time where there are two cores: tests/lanes.py
TEST_FOLDERS ?= meta core unit contract integration chaos

test: $(CACHE)/test $(CACHE)/compiled
	@exec $(PY) tests/lanes.py $(TEST_FOLDERS) -- $(TEST_ARGS)

# docs/safety.md says what these three find. SANITIZE=address (ASan, UBSan, leaks) or thread (ThreadSanitizer).
# Left out: tests/meta (nothing compiled runs there) and what measures the process's own memory or speed (a sanitizer
# keeps freed memory aside, and takes its time). ThreadSanitizer is for our threads and their queues: it runs the tests
# that have them, and neither frameworks nor processes of clients, because those have threads of their own that it cannot
# see into. Each folder of the contract is a run of its own, and each row of the table.
SANITIZE ?= address
SANITIZED_address ?= tests/core $(filter-out %__pycache__,$(sort $(wildcard tests/contract/[a-z]*))) tests/unit \
    tests/chaos tests/integration
SANITIZED_thread ?= tests/core/test_scheduler.py tests/core/test_cancel.py tests/core/test_compiled.py \
    tests/core/test_passes.py tests/core/test_quota.py tests/core/test_shares.py tests/core/test_desk.py \
    tests/contract/security/test_security_passes.py tests/contract/security/test_security_streams.py \
    tests/contract/http2 tests/contract/door tests/contract/rest
SKIPPED := --deselect tests/core/test_leaks.py --deselect tests/core/test_h2_leaks.py \
    --deselect tests/contract/door/test_door_threads.py::test_a_held_interpreter \
    --deselect tests/core/test_passes.py::test_memory_is_bounded_and_given_back \
    --deselect tests/contract/door/test_door_tls.py::test_two_thousand_connections_leave_nothing \
    --deselect tests/integration/test_footprint.py::test_a_server_of_one_onnx_model_stays_small \
    --deselect tests/unit/test_execution_thread_executor.py::test_loading_leaves_no_scratch_memory_behind

test-sanitize: $(CACHE)/test
	$(PY) tests/sanitize/run.py $(SANITIZE) --results tests/sanitize/results.json $(SANITIZED_$(SANITIZE)) \
	    -- $(SKIPPED) $(TEST_ARGS)
	$(PY) tests/sanitize/report.py

# mixed traffic for so long; memory, descriptors, threads and objects must come back
SECONDS ?= 120
leak-run: $(CACHE)/test $(CACHE)/compiled
	$(PY) tests/core/leaks/traffic.py --seconds $(SECONDS) --results tests/core/leaks/results.json
	$(PY) tests/sanitize/report.py

# each target for so long; FUZZ_TARGETS="session scan", see tests/fuzz/README.md
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= session,frames,landing,scan,text,batch,protobuf,response
fuzz: $(CACHE)/test $(CACHE)/clang
	$(PY) tests/fuzz/run.py --seconds $(FUZZ_SECONDS) --targets "$(FUZZ_TARGETS)" --results tests/fuzz/results.json
	$(PY) tests/sanitize/report.py

# kill -9 at so many moments for each database; the same SEED asks for the same, though threads run as they like
ROUNDS ?= 50
SEED ?= 1
chaos: $(CACHE)/test $(CACHE)/compiled
	$(PY) tests/chaos/run.py --rounds $(ROUNDS) --seed $(SEED) --results tests/chaos/results.json
	$(PY) tests/sanitize/report.py

lint: $(CACHE)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

compile: $(CACHE)/compiled

debug: $(CACHE)/test
	AIORCH_DEBUG=1 $(PY) setup.py -q build_ext --inplace --force

models: $(CACHE)/examples $(CACHE)/compiled
	$(PY) examples/prepare.py $(MODELS)

bench-micro: $(CACHE)/test $(CACHE)/compiled
	$(PY) benchmarks/micro/run.py

# QUICK=1 finishes within ten minutes
bench-peers: $(CACHE)/test $(CACHE)/compiled
	@command -v openssl >/dev/null || deploy/install-packages openssl
	$(PY) benchmarks/peers/run.py
	$(PY) benchmarks/report.py

bench-memory: $(CACHE)/test $(CACHE)/compiled
	$(PY) benchmarks/scenarios/memory.py
	$(PY) benchmarks/report.py

# QUICK=1 finishes within ten minutes
bench-rollout: $(CACHE)/test $(CACHE)/compiled
	@command -v openssl >/dev/null || deploy/install-packages openssl
	$(PY) benchmarks/scenarios/rollout.py
	$(PY) benchmarks/report.py

# QUICK=1 finishes within ten minutes
bench-optimizer: $(CACHE)/test $(CACHE)/compiled
	$(PY) benchmarks/optimizer/run.py
	$(PY) benchmarks/report.py

bench-profile: $(CACHE)/test $(CACHE)/compiled
	@command -v perf >/dev/null || deploy/install-packages linux-perf
	$(PY) benchmarks/profiles/run.py
	$(PY) benchmarks/report.py

clean:
	rm -rf $(CACHE) build dist *.egg-info aiorch_server/_core/*.so aiorch_server/_core/*.c aiorch_server/_core/*.html \
	    backends/aiorch_backends/*/*.so backends/aiorch_backends/*/*.c

# ---- what the targets above need; each stamp is remade when what it stands on changes

$(CACHE)/system: deploy/install-packages Makefile
	@mkdir -p $(CACHE)
	deploy/install-packages --build
	@touch $@

$(VENV)/bin/python: | $(CACHE)/system
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch first: with a CPU build of it in place nothing below pulls in a CUDA build
$(CACHE)/base: $(CACHE)/system | $(VENV)/bin/python
	@echo "== installing Python packages (a few minutes the first time)"
	$(PIP) "setuptools>=77" wheel "Cython>=3.1,<4"
	$(PIP) "torch==2.13.0"
	@touch $@

$(CACHE)/examples: pyproject.toml setup.py $(CACHE)/base
	@echo "== installing the frameworks, compiling the core"
	$(PIP) --no-build-isolation -e ".[examples]"
	@touch $@ $(CACHE)/compiled

# the tests' packages include those of the examples
$(CACHE)/test: pyproject.toml setup.py $(CACHE)/base
	@echo "== installing what the tests need, compiling the core"
	$(PIP) --no-build-isolation -e ".[test]"
	@# asks for the distribution "tensorflow"; what it needs of it is in tensorflow-cpu
	$(PIP) --no-deps "tensorflow-serving-api>=2.21,<3"
	@command -v prometheus >/dev/null && command -v h2load >/dev/null && command -v curl >/dev/null \
	    || deploy/install-packages prometheus nghttp2-client curl
	@command -v espeak-ng >/dev/null || deploy/install-packages espeak-ng
	@command -v rsync >/dev/null || deploy/install-packages rsync
	@command -v redis-server >/dev/null || deploy/install-packages redis-server
	@command -v mariadbd >/dev/null && ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 \
	    || deploy/install-packages postgresql mariadb-server
	@command -v node >/dev/null && command -v npm >/dev/null || deploy/install-packages nodejs npm
	@touch $@ $(CACHE)/examples $(CACHE)/compiled

$(CACHE)/clang: | $(CACHE)/system
	@command -v clang >/dev/null || deploy/install-packages clang llvm
	@ls "$$(clang -print-resource-dir)"/lib/linux/libclang_rt.fuzzer_no_main-*.a >/dev/null 2>&1 \
	    || deploy/install-packages "libclang-rt-$$(clang -dumpversion | cut -d. -f1)-dev"
	@touch $@

$(CACHE)/compiled: $(CORE) $(CACHE)/base
	@echo "== compiling the core"
	$(PY) setup.py -q build_ext --inplace
	@touch $@
