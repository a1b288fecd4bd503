# The front door. Every target sets up .venv itself, from a bare Python 3.11+ and a package index.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-wheel test-ceph test-cluster soak fuzz check bench clean

demo: .venv/ready  ## pack, protect to S3, verify, attack; runs/demo/report.html; PHOTOS=folder for yours
	$(BIN)/one4all demo $(if $(PHOTOS),--photos '$(PHOTOS)')

test: .venv/ready  ## all tests that need nothing but .venv
	$(BIN)/python -m pytest

test-fast: .venv/ready  ## those that take no time, and start neither Ray nor a server: a minute or so
	$(BIN)/python -m pytest -m 'not slow and not wheel and not ceph and not cluster'

test-wheel: .venv/ready  ## the wheel, in fresh environments outside this folder
	$(BIN)/python -m pytest -m wheel

test-ceph: .venv/ready  ## storage tests on a real S3 server; installs Debian's Ceph packages if it may
	sh tests/support/install_debian.sh "ceph-mon ceph-osd radosgw" radosgw ceph-mon ceph-osd
	$(BIN)/python -m pytest -m ceph

test-cluster: .venv/cluster  ## a Ray cluster on loopback addresses, and jobs submitted to it; a real Prometheus
	sh tests/support/install_debian.sh "prometheus promtool" prometheus
	$(BIN)/python -m pytest -m cluster

soak: .venv/ready  ## half an hour of protect with random kills and a failing store: runs/soak
	PYTHONPATH=tests $(BIN)/python tests/soak.py

fuzz: .venv/ready  ## ten minutes of broken images and shards, or MINUTES=60: runs/fuzz
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py $(if $(MINUTES),--minutes '$(MINUTES)')

check: .venv/ready  ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready  ## protect beside other programs; containers; training; a plan of a million shards
	$(BIN)/one4all bench
	$(BIN)/one4all bench --containers 400 --output runs/bench-containers.json
	$(BIN)/one4all bench --train --output runs/bench-train.json
	$(BIN)/one4all bench --plan-shards 1000000 --output runs/bench-plan.json
	$(BIN)/one4all bench --plan-images 1000000 --output runs/bench-plan-images.json

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say make PYTHON=python3.12"; exit 1; }
	@echo "setting up .venv: a few minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[all,dev,formats]'
	@touch $@

.venv/cluster: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[cluster]'
	@touch $@

clean:
	rm -rf .venv runs
