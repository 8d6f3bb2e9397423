# Chores by one word. Run them in a virtual environment: pip install -e '.[dev]'
.PHONY: test lint format types bench compare figures profile gpu tune ci clean

test:
	pytest

lint:
	ruff check
	ruff format --check

format:
	ruff check --fix
	ruff format

types:
	mypy

bench:
	headrace bench smollm2

compare:
	python bench/vs_llama_cpp.py smollm2

# README's figures, on a quiet machine. LLAMA_PYTHON: a Python that has llama-cpp-python.
figures: llama-1b-Q4_K_M.gguf
	mkdir -p bench/results
	python bench/vs_llama_cpp.py smollm2 $< --json $(LLAMA_PYTHON:%=--llama-python %) >bench/results/compare.json
	headrace bench smollm2 --json >bench/results/bench-smollm2.json
	headrace bench $< --json >bench/results/bench-llama-1b.json
	python bench/first_token.py smollm2 --json >bench/results/first-token.json
	python bench/accuracy.py smollm2 gemma3:270m --json >bench/results/accuracy.json
	python bench/figures.py

# What docs/profile.md and its decision show, on a quiet machine.
profile:
	mkdir -p bench/results
	python bench/profile_cost.py smollm2
	headrace profile smollm2 --json >bench/results/profile-smollm2.json
	HEADRACE_PROFILE_SCREENSHOT=$(CURDIR)/docs/profile.png pytest tests/profile/test_page.py
	headrace profile smollm2

# What a GPU alone can tell; what is written to a file is kept.
GPU ?= bench/results/nvidia-h100
gpu: llama-1b-Q4_K_M.gguf llama-8b-Q4_K_M.gguf
	mkdir -p $(GPU)
	pytest -m gpu
	python bench/gpu.py --models llama-8b --json $(GPU)/decode-8b.json
	python bench/gpu.py --models llama-1b --json $(GPU)/decode-1b.json
	python bench/accuracy.py smollm2 gemma3:270m --device cuda --products dots tensor prompts floats
	python bench/endurance.py llama-1b-Q4_K_M.gguf --device cuda
	headrace bench llama-8b-Q4_K_M.gguf --device cuda
	python bench/serving.py llama-8b-Q4_K_M.gguf --device cuda --tokens 256 --batch-invariant
	python bench/serving.py llama-8b-Q4_K_M.gguf --device cuda --tokens 256

# The constants of the kernels for this GPU, into the package's tuned.json.
tune:
	mkdir -p $(GPU)
	python bench/tune.py --json $(GPU)/tune.json --update

llama-%-Q4_K_M.gguf:
	headrace synth llama-$* Q4_K_M -o $@

ci:
	.ci/run

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
