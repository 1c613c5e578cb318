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
	@echo "The cat rows change, the dog, pizza and guitar stay nearly the same pictures. The edited model is $(OUT)/no-cat."

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

# Rows that are in the results file are not drawn again; remove it to measure anew: 3.6 hours of one core with bfloat16 in
# all. Two processes of one thread share them, which is faster than one of two.
QUALITY = $(BIN)/python -m benchmarks.compare --model emoji --fast --steps 8 --seeds 1 --split report --judge report \
	--results benchmarks/results/report-emoji.jsonl
ROWS = $(QUALITY) --threads 1 --editors ours mace uce speed rece
bench-quality: .venv/.installed
	{ $(ROWS) --concepts 100 --draws 5 && $(ROWS) --concepts 1 --draws 16; } & \
	$(ROWS) --concepts 5 10 50 --draws 5 20 5 && wait $$!
	$(QUALITY) --table --summary benchmarks/results/quality.json --curves docs/h4.svg

clean:
	rm -rf .venv out build *.egg-info
