# Chores by one word. Run them in a virtual environment: pip install -e '.[dev]'
.PHONY: test lint format types bench compare ci clean

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

ci:
	.ci/run

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
