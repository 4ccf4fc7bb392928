# make demo   from the example proteins to a pretrained, exported, evaluated model and its report
# make test   the whole test suite
# make lint   formatting, style and types
# make bench  training speed against transformers on this machine
# make clean  remove the virtual environment and what the demo made
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/data/*)
EXAMPLES := examples/data
DEMO := demo

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(DEMO)/.evaluated
	$(PY) tools/report.py --pretraining $(DEMO)/run --results $(DEMO)/results/* --output $(DEMO)/report/report.html

test: $(VENV)/.test
	$(PY) -m pytest

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.test $(DEMO)/data/train.json
	$(PY) tools/benchmark.py train --data-path $(DEMO)/data/train --preset esm2-8m --check

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info megatron_plm/data/_native*.so

# --- the virtual environment ---------------------------------------------------------------------------------------
# torch goes first and alone: the version is pinned, and whatever build of it pip's settings choose is kept.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[all]'
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

# --- the demo, step by step ----------------------------------------------------------------------------------------
$(DEMO)/data/%.json: $(EXAMPLES)/pretrain_%.fasta.gz $(VENV)/.installed
	@mkdir -p $(DEMO)/data
	$(PY) tools/preprocess_data.py --input $< --output-prefix $(DEMO)/data/$* --tokenizer esm2 --force

$(DEMO)/.pretrained: launch/configs/demo.toml $(DEMO)/data/train.json $(DEMO)/data/valid.json
	rm -rf $(DEMO)/run
	PYTHON=$(PY) launch/pretrain.sh --config $< --data-path $(DEMO)/data/train --valid-data-path $(DEMO)/data/valid --save $(DEMO)/run
	@touch $@

$(DEMO)/.converted: $(DEMO)/.pretrained
	$(PY) tools/convert_checkpoint.py --from native --to huggingface --input $(DEMO)/run --output $(DEMO)/huggingface --force
	$(PY) tools/convert_checkpoint.py --from native --to proteinlm-tape --input $(DEMO)/run --output $(DEMO)/tape --force
	@touch $@

PEPTIDES := csv --data_dir $(EXAMPLES)/peptides --sequence-column sequence --label-column label --kind classification \
  --batch_size 64 --num_train_epochs 6 --learning_rate 1e-3
STRUCTURES := --data_dir $(EXAMPLES)/structures --batch_size 4 --num_train_epochs 10 --learning_rate 1e-3
TAPE_TRAIN := $(PY) tape_finetune/tape_train.py
TO_RESULTS := --output_dir $(DEMO)/results --time_or_name demo --seed 1 --force
PRETRAINED := --from_pretrained $(DEMO)/tape

$(DEMO)/.evaluated: $(DEMO)/.converted $(wildcard $(EXAMPLES)/peptides/* $(EXAMPLES)/structures/*/*)
	rm -rf $(DEMO)/results
	$(TAPE_TRAIN) transformer $(PEPTIDES) $(PRETRAINED) $(TO_RESULTS)
	$(TAPE_TRAIN) random $(PEPTIDES) $(PRETRAINED) $(TO_RESULTS)
	$(TAPE_TRAIN) onehot $(PEPTIDES) $(TO_RESULTS)
	for task in secondary_structure contact_prediction; do \
	  $(TAPE_TRAIN) transformer $$task $(STRUCTURES) $(PRETRAINED) $(TO_RESULTS) && \
	  $(TAPE_TRAIN) onehot $$task $(STRUCTURES) $(TO_RESULTS) || exit; done
	@touch $@
