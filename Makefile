# make demo     from the example proteins to a pretrained, exported, evaluated model and its report
# make test     the whole test suite
# make lint     formatting, style and types
# make bench    every speed that is promised beside its bar, on this machine's CPU, in ten minutes
# make bench-gpu    what one GPU can tell, in eight minutes, into one folder (OUT); needs no virtual environment (PYTHON)
# make bench-finetune   memory, time and score of full, adapted and frozen fine-tuning, on this machine
# make kernels  the CUDA kernels of --fused-kernels, for the torch of PYTHON or of the virtual environment; needs nvcc
# make fuzz     random input for the C++ data code and the index reader, under sanitizers, for minutes
# make install  the package into the Python that PYTHON names, beside the torch that is there (containers, clusters)
# make clean    remove the virtual environment and what the demo made
PYTHON ?= python3
PIP = $(PYTHON) -m pip
VENV := .venv
PY := $(VENV)/bin/python
EXAMPLES := examples/data
DEMO := demo

.PHONY: demo test lint bench bench-gpu bench-finetune kernels fuzz install clean
.DELETE_ON_ERROR:

demo: $(DEMO)/.evaluated
	$(PY) tools/report.py --pretraining $(DEMO)/run --results $(DEMO)/results/* --output $(DEMO)/report/report.html

# Two processes: much of a test is starting programs. A file stays with one of them, which makes its datasets once.
test: $(VENV)/.test
	$(PY) -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.test
	$(PY) tools/benchmark.py suite cpu --output-dir $(or $(OUT),build/bench)

# With the Python that PYTHON names, and the torch that it has; the extension is built where it isn't yet.
bench-gpu:
	@PYTHONPATH=. $(PYTHON) -c 'import megatron_plm.data._native, megatron_plm.kernels._cpu' 2> /dev/null \
	  || $(PYTHON) setup.py -q build_ext --inplace --build-temp build/extension
	PYTHONPATH=. $(PYTHON) tools/benchmark.py suite gpu --output-dir $(or $(OUT),build/bench-gpu) $(SUITE_FLAGS)

bench-finetune: $(VENV)/.test
	$(PY) tools/benchmark.py finetune --data-dir $(EXAMPLES)/peptides

kernels: megatron_plm/kernels/_cuda_kernels.so
megatron_plm/kernels/_cuda_kernels.so: megatron_plm/kernels/build.py $(wildcard csrc/kernels/*)
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m megatron_plm.kernels.build --output $@

fuzz: $(VENV)/.test
	$(PY) tests/fuzz/fuzz.py --seconds 300 --keep build/fuzz

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info megatron_plm/*/_*.so

# --- installing ----------------------------------------------------------------------------------------------------
# pip builds the extension in an environment of its own, which sees constraints only through these variables: older pips
# read the first there, newer ones the second. The paths are relative because pip splits the values at spaces.
CONSTRAINTS =
EXTRAS = all

install: export PIP_CONSTRAINT = build/torch.txt $(CONSTRAINTS)
install: export PIP_BUILD_CONSTRAINT = constraints.txt
install:
	@mkdir -p build
	$(PYTHON) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > build/torch.txt
	$(PIP) install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'

# Our own environment has the versions of constraints.txt. torch goes first: whatever build of it pip chooses is kept.
INSTALL_HERE = $(MAKE) install PYTHON=$(PY) CONSTRAINTS=constraints.txt
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/data/* csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV): a download of hundreds of MB for the CPU, of several GB with CUDA ..."
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@echo "installing megatron-plm and what it needs ..."
	$(INSTALL_HERE)
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(INSTALL_HERE) EXTRAS=test
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1 tape-proteins==0.5
	@touch $@

# --- the demo, step by step ----------------------------------------------------------------------------------------
# A step runs again where its input, its code or this file changes; not where only the environment is renewed.
rooms = Makefile $(wildcard $(foreach room,$(1),megatron_plm/$(room).py megatron_plm/$(room)/*.py))

$(DEMO)/data/%.json: $(EXAMPLES)/pretrain_%.fasta.gz tools/preprocess_data.py $(wildcard csrc/data/*) \
    $(call rooms,data tokenizers) | $(VENV)/.installed
	@mkdir -p $(DEMO)/data
	$(PY) tools/preprocess_data.py --input $< --output-prefix $(DEMO)/data/$* --tokenizer esm2 --force

$(DEMO)/.pretrained: $(DEMO)/data/train.json $(DEMO)/data/valid.json launch/configs/demo.toml launch/pretrain.sh \
    $(wildcard csrc/cpu/*) $(call rooms,config data kernels model parallel philox tokenizers training)
	rm -rf $(DEMO)/run
	PYTHON=$(PY) launch/pretrain.sh --config launch/configs/demo.toml --data-path $(DEMO)/data/train \
	  --valid-data-path $(DEMO)/data/valid --save $(DEMO)/run
	@touch $@

$(DEMO)/.converted: $(DEMO)/.pretrained tools/convert_checkpoint.py $(call rooms,convert)
	$(PY) tools/convert_checkpoint.py --from native --to huggingface --input $(DEMO)/run --output $(DEMO)/huggingface --force
	$(PY) tools/convert_checkpoint.py --from native --to proteinlm-tape --input $(DEMO)/run --output $(DEMO)/tape --force
	@touch $@

PEPTIDES := csv --data_dir $(EXAMPLES)/peptides --sequence-column sequence --label-column label --kind classification \
  --batch_size 64 --num_train_epochs 6 --learning_rate 1e-3
STRUCTURES := --data_dir $(EXAMPLES)/structures --batch_size 4 --num_train_epochs 10 --learning_rate 1e-3
TAPE_TRAIN := $(PY) tape_finetune/tape_train.py
TO_RESULTS := --output_dir $(DEMO)/results --time_or_name demo --seed 1 --force
PRETRAINED := --from_pretrained $(DEMO)/tape

$(DEMO)/.evaluated: $(DEMO)/.converted $(wildcard $(EXAMPLES)/peptides/* $(EXAMPLES)/structures/*/*) \
    $(wildcard tape_finetune/*.py tape_finetune/*/*.py) Makefile
	rm -rf $(DEMO)/results
	for task in "$(PEPTIDES)" "secondary_structure $(STRUCTURES)" "contact_prediction $(STRUCTURES)"; do \
	  $(TAPE_TRAIN) transformer $$task $(PRETRAINED) $(TO_RESULTS) && \
	  $(TAPE_TRAIN) random $$task $(PRETRAINED) $(TO_RESULTS) && \
	  $(TAPE_TRAIN) onehot $$task $(TO_RESULTS) || exit; done
	@touch $@
