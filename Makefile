# Two commands need nothing but make and Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
TUNED := runs/demo-tune
# Neither the demo nor the tests may take a GPU or TPU that happens to be there.
export JAX_PLATFORMS := cpu

.PHONY: demo demo-tune test test-slow test-faults test-faults-short test-kills soak test-tpu test-tpu-short lint format sample-data clean-demo

# Scores on the small tasks of data/eval, before and after training: they stand in the summary, the page and the card.
TASKS := eval.suite=quick

demo: .venv/eval.stamp clean-demo
	$(BIN)/easylm-mling train configs/demo.yaml run_dir=$(DEMO) $(TASKS) train.stop_at_step=55
	$(BIN)/easylm-mling train configs/demo.yaml run_dir=$(DEMO) $(TASKS)
	$(BIN)/easylm-mling export-hf $(DEMO) $(DEMO)-hf
	$(BIN)/easylm-mling sample $(DEMO)-hf --temperature 0.7 --top-k 20 --prompt "오늘 아침에" --prompt "今日は" --prompt "今天" --prompt "In the morning"
	$(BIN)/easylm-mling report $(DEMO)
	$(BIN)/easylm-mling summary $(DEMO)

# After `make demo`: adapters learn the sample conversations by heart; merged, asked, and scored beside what it was before.
demo-tune: .venv/test.stamp
	test -d $(DEMO)/checkpoints || $(MAKE) demo
	rm -rf $(TUNED) $(TUNED)-hf $(TUNED)-adapter
	$(BIN)/easylm-mling train configs/demo-tune.yaml run_dir=$(TUNED) init_from=$(DEMO)
	$(BIN)/easylm-mling export-hf $(TUNED) $(TUNED)-adapter --adapter --base $(DEMO)-hf
	$(BIN)/easylm-mling export-hf $(TUNED) $(TUNED)-hf
	echo "냉장고는 어때요?" | $(BIN)/easylm-mling chat $(TUNED)-hf --template gemma --temperature 0 --max-new-tokens 64
	$(BIN)/easylm-mling eval $(DEMO) --suite quick --dtype float32
	$(BIN)/easylm-mling eval $(TUNED) --suite quick --dtype float32 --baseline $(DEMO)/evaluations/110/results-quick.json

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What `make test` leaves out for its time.
test-slow: .venv/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not tpu_compiler"

# Of every kind of fault that `make test` leaves out, the shortest.
test-faults-short: .venv/test.stamp
	EASYLM_MLING_KILLS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "faults and not long" tests/faults tests/test_processes.py

test-faults: .venv/test.stamp
	$(BIN)/python -m pytest -m "faults or not faults" tests/faults tests/test_processes.py

# kill -9 at 50 random moments of steps and 50 of saves, of one process and of two; and one run with every disturbance (root).
test-kills: .venv/test.stamp
	EASYLM_MLING_KILLS=50 $(BIN)/python -m pytest -s -m faults tests/faults/test_kills.py

soak: .venv/test.stamp
	PYTHONPATH=. $(BIN)/python tests/faults/soak.py runs/soak

# Compiles real steps for real slices with the TPU's compiler, which needs no TPU; as training has them compiled.
test-tpu: .venv/tpu.stamp
	XLA_FLAGS= $(BIN)/python -m pytest -m tpu_compiler tests/test_plan.py

# Without the comparison of two compilations, which takes most of the time: part of each check of a change.
test-tpu-short: .venv/tpu.stamp
	XLA_FLAGS= $(BIN)/python -m pytest -m "tpu_compiler and not long" tests/test_plan.py

lint: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

sample-data: .venv/test.stamp
	$(BIN)/python data/make_sample.py

clean-demo:
	rm -rf $(DEMO) $(DEMO)-hf

.venv/run.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; found " + sys.version.split()[0] + ". Use: make PYTHON=/path/to/python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

.venv/eval.stamp: .venv/run.stamp requirements-eval.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-compile -r requirements-eval.lock
	touch $@

.venv/test.stamp: .venv/eval.stamp requirements-test.lock
	$(BIN)/python -m pip install --quiet -r requirements-test.lock
	touch $@

.venv/tpu.stamp: .venv/test.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[tpu]'
	touch $@
