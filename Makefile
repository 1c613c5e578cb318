PYTHON ?= python3
# The CPU build comes first: a bare torch would bring gigabytes of GPU libraries. `make TORCH=torch` for those.
TORCH ?= torch==2.13.0
MODEL ?= emoji
OUT ?= out
BIN := .venv/bin

.PHONY: demo test lint slow bench-quality clean

.venv/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/realera-edit erase $(MODEL) "cat face" --preserve "dog face" --output $(OUT)/no-cat --force
	$(BIN)/python -m benchmarks.grid --model $(MODEL) --template "a noto emoji of a {}" --erase "cat face" --preserve "dog face" \
		--rows "cat face: erased" "kitty: an alias" "dog face: preserved" "pizza: unrelated" "guitar: unrelated" \
		--out $(OUT)/demo.png
	@echo "Look at $(OUT)/demo.png: each row is a prompt, left the original model, right the edited one, same seeds."
	@echo "The cat rows change, the dog stays a dog, pizza and guitar stay nearly the same pictures. The edited model is $(OUT)/no-cat."

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

# Rows that are in the results file are not drawn again; remove it to measure anew (about an hour).
QUALITY = $(BIN)/python -m benchmarks.compare --model ../shared/models/emoji-sd --fast --steps 12 --split report \
	--judge report --results benchmarks/results/report.jsonl
bench-quality: .venv/.installed
	$(BIN)/pip install --quiet --editable ".[dev,bench]"
	$(QUALITY) --seeds 2 --concepts 10 --draws 2 --editors ours uce mace speed rece
	$(QUALITY) --seeds 1 --concepts 50 --draws 1 --editors ours uce mace speed
	$(QUALITY) --seeds 2 --concepts 1 --draws 4 --editors ours uce mace speed
	$(QUALITY) --table --summary benchmarks/results/quality.json --curves docs/h4.svg
	$(BIN)/python -m benchmarks.compare --model emoji --steps 8 --split report --judge report --seeds 1 \
		--concepts 1 --draws 8 --editors ours mace uce speed --results benchmarks/results/report-emoji-1.jsonl \
		--summary benchmarks/results/quality-emoji-1.json
	$(BIN)/python -m benchmarks.compare --model emoji --steps 8 --split report --judge report --seeds 1 \
		--concepts 10 --draws 3 --editors ours mace uce speed --results benchmarks/results/report-emoji-10.jsonl \
		--summary benchmarks/results/quality-emoji-10.json
	$(BIN)/python -m benchmarks.compare --model emoji --fast --steps 8 --split report --judge report --seeds 1 \
		--concepts 100 --draws 1 --editors ours mace uce speed --results benchmarks/results/report-emoji.jsonl \
		--summary benchmarks/results/quality-100.json

clean:
	rm -rf .venv out build *.egg-info
