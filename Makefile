# `make` alone lists the targets. Needs Python 3.11 to 3.13 with venv, and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
BASE := $(VENV)/.base-installed
TEST := $(VENV)/.test-installed
ROBOMIMIC := $(VENV)/.robomimic-installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --constraint constraints.txt
LOCK_HEADER := \# Every package that the requirement files bring in, pinned; written by \`make lock\`, for Python 3.11 to 3.13.
CODE := robopref envs agents labelers experiments benchmarks tests

# Shows one line per package on a log, and one line that changes on a terminal.
define install
	set -euo pipefail; \
	echo "Installing $(1) into $(VENV) (a minute or two the first time)"; \
	$(PIP) $(foreach file,$(1),--requirement $(file)) | while read -r verb name rest; do \
		case "$$verb" in \
			Collecting) if [ -t 1 ]; then printf '\r\033[K  %s' "$$name"; else echo "  $$name"; fi ;; \
			Installing) if [ -t 1 ]; then printf '\r\033[K'; fi; echo "  writing the packages" ;; \
		esac; \
	done
endef

.PHONY: help
help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | while IFS=: read -r name rest; do \
		printf '  make %-12s %s\n' "$$name" "$${rest#*## }"; done

.PHONY: demo
demo: $(BASE) ## train, evaluate and film a policy from preferences; ARGS="--help" lists its options
	@$(BIN)/python -m experiments.demo $(ARGS)

.PHONY: install
install: $(BASE) ## make .venv with the pinned packages and the robopref command

.PHONY: test
test: lint ## lint, check types and run all tests; JOBS=8 runs them in eight processes
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

.PHONY: robomimic
robomimic: $(ROBOMIMIC) ## install robosuite and robomimic too (with torch, 2 GB), and run the tests that need them
	$(BIN)/python -m pytest -m robomimic $(ARGS)

.PHONY: lint
lint: $(TEST) ## check style and types only
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/python -m mypy

.PHONY: lock
lock: ## write constraints.txt anew (run it with Python 3.11, whose packages exist for the others too)
	rm -rf $(VENV)
	$(MAKE) --no-print-directory $(BASE) $(TEST) PIP="$(BIN)/python -m pip install --disable-pip-version-check --no-input"
	{ echo "$(LOCK_HEADER)"; $(BIN)/python -m pip freeze --exclude-editable; } > constraints.txt

.PHONY: clean
clean: ## remove .venv and every cache, and keep what experiments wrote
	rm -rf $(VENV) build dist robopref.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# A changed pin makes the environment anew: mujoco, for one, does not survive being downgraded in place.
$(BASE): requirements.txt constraints.txt
	@supported='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; \
	chosen=; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$candidate" -c "$$supported" 2>/dev/null; then chosen="$$candidate"; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
		echo "robopref needs Python 3.11, 3.12 or 3.13, and $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) -V 2>/dev/null || echo missing);" \
			"install one of them, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	if ! "$$chosen" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "This Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	"$$chosen" -m venv --clear $(VENV); \
	$(call install,requirements.txt); \
	touch $@

$(TEST): $(BASE) requirements-test.txt requirements-ray.txt
	@$(call install,requirements-test.txt requirements-ray.txt); \
	touch $@

$(ROBOMIMIC): $(TEST) requirements-robomimic.txt
	@$(call install,requirements-robomimic.txt); \
	touch $@
