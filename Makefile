# make demo   see it work          make test   the tests          make lint   ruff and mypy
#
# Everything happens in the virtual environment $(VENV), made on first use. If the python in use has torch, that
# torch is used and never replaced; else TORCH is installed. TORCH=... on the command line always installs it:
#     make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
# What Diffusers tests of the models, pipelines and samplers that fastdiff knows, as far as a checkout has it. It takes
# hours; most of it can run offline, what needs a file of the hub fails with and without fastdiff.
DIFFUSERS_KNOWN := tests/models/unets tests/models/test_attention_processor.py tests/hooks tests/schedulers \
  $(patsubst %,tests/models/autoencoders/test_models_%.py,asymmetric_autoencoder_kl consistency_decoder_vae vq \
    $(addprefix autoencoder_,dc hunyuan_video kl kl_cogvideox kl_temporal_decoder ltx2_video ltx_video magvit \
      mochi tiny wan)) \
  $(patsubst %,tests/models/transformers/test_models_%.py,dit_transformer2d pixart_transformer2d \
    $(addprefix transformer_,allegro aura_flow bria bria_fibo chroma chronoedit cogvideox cogview3plus cogview4 \
      consisid cosmos flux flux2 hidream hunyuan_1_5 hunyuan_dit hunyuan_video hunyuan_video_framepack latte \
      longcat_image ltx ltx2 lumina2 mochi omnigen ovis_image qwenimage sana sd3 skyreels_v2 wan wan_vace z_image)) \
  $(addprefix tests/pipelines/,allegro animatediff audioldm2 aura_flow bria bria_fibo chroma chronoedit cogvideo \
    cogview3 cogview4 consisid consistency_models controlnet controlnet_flux controlnet_hunyuandit controlnet_sd3 \
    cosmos ddim ddpm deepfloyd_if dit flux flux2 hidream_image hunyuan_image_21 hunyuan_video hunyuan_video1_5 \
    hunyuandit ip_adapters kandinsky kandinsky2_2 kandinsky3 latent_consistency_models latent_diffusion latte \
    ledits_pp longcat_image ltx ltx2 lumina2 marigold mochi omnigen ovis_image pag pixart_alpha pixart_sigma pndm \
    qwenimage sana skyreels_v2 stable_audio stable_diffusion stable_diffusion_2 stable_diffusion_3 \
    stable_diffusion_adapter stable_diffusion_image_variation stable_diffusion_xl stable_unclip \
    stable_video_diffusion wan z_image) \
  $(patsubst %,tests/lora/test_lora_layers_%.py,auraflow cogvideox cogview4 flux flux2 hunyuanvideo ltx2 ltx_video \
    lumina2 mochi qwenimage sana sd sd3 sdxl wan wanvace z_image)
DIFFUSERS_TESTS ?= $(patsubst $(DIFFUSERS)/%,%,$(wildcard $(addprefix $(DIFFUSERS)/,$(DIFFUSERS_KNOWN))))
GPU_BUDGET ?= 600
# The oldest supported Diffusers; the newest is what pyproject.toml installs.
DIFFUSERS_MIN ?= 0.38.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
SOURCES := setup.py pyproject.toml $(foreach end,py cpp h cu cuh,$(wildcard csrc/*.$(end) csrc/*/*.$(end)))
# One thread per worker: the workers fill the cores, and one that has nothing left takes tests over from another. Many
# tests start Python, whose bytecode is kept even where the environment says not to.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal --disable-warnings \
  --tb=short

.DEFAULT_GOAL := help
.PHONY: help demo test test-diffusers-min test-triton test-triton-all diffusers-tests gpu lint build info clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28

demo: $(VENV)/.installed ## draw the same pictures with and without fastdiff.patch, and compare
	$(PY) -m fastdiff demo $(DEMO_ARGS)

test: $(VENV)/.installed $(VENV)/quantized ## run all tests; PYTEST_ARGS="-k norm" for some
	PYTHONPATH=$(VENV)/quantized $(PYTEST) $(PYTEST_ARGS)

test-diffusers-min: $(VENV)/diffusers-$(DIFFUSERS_MIN) $(VENV)/quantized ## the tests of patching with the oldest supported Diffusers
	FASTDIFF_TEST_REPEATED=1 PYTHONPATH=$<:$(VENV)/quantized $(PYTEST) tests/patching tests/schedulers $(PYTEST_ARGS)

diffusers-tests: $(VENV)/.installed ## Diffusers' own tests, patched: DIFFUSERS=/checkout; DIFFUSERS_TESTS=... for some
	@test -d "$(DIFFUSERS)/tests" || { echo "DIFFUSERS=$(DIFFUSERS) is not a checkout of Diffusers"; exit 2; }
	$(PIP) install parameterized requests-mock requests "httpx<1" # which its tests import
	cd $(DIFFUSERS) && HF_HUB_OFFLINE=1 PYTHONPATH=$(abspath $(DIFFUSERS))/src:$(CURDIR)/tests $(abspath $(PY)) -m pytest \
	  -p autopatch -p no:cacheprovider -W ignore -q $(DIFFUSERS_TESTS) $(PYTEST_ARGS)

test-triton: $(VENV)/.installed ## the same numbers asked of the Triton kernels, in Triton's interpreter
	TRITON_INTERPRET=1 FASTDIFF_TEST_BACKEND=triton $(PYTEST) -m "numerics or interpreted" tests/ops tests/triton_kernels $(PYTEST_ARGS)

test-triton-all: $(VENV)/.installed ## compile every Triton kernel in every configuration; takes long
	FASTDIFF_TEST_ALL=1 $(PYTEST) tests/build/test_triton_kernels.py $(PYTEST_ARGS)

# With PY=python3 that Python is taken as it is, with its packages, and the extension is built in place.
gpu: ## on a machine with a GPU: build, its tests, all benchmarks, in GPU_BUDGET=600 seconds; goes on where it stopped
	@start=$$(date +%s); \
	  $(if $(filter command%,$(origin PY)),$(PY) setup.py build_ext --inplace,$(MAKE) $(VENV)/.installed) && \
	  $(PY) -m fastdiff bench gpu --budget $$(($(GPU_BUDGET) - $$(date +%s) + start))

lint: $(VENV)/.installed ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

build: $(VENV)/.ready ## rebuild the extension, or fail with the compiler's errors
	FASTDIFF_FORCE_EXT=1 $(PIP) install --verbose --no-build-isolation --no-deps -e .
	@touch $(VENV)/.installed

info: $(VENV)/.installed ## what is installed, built and usable
	$(PY) -m fastdiff info

clean: ## remove everything that was built or installed here
	rm -rf $(VENV) build dist *.egg-info fastdiff/_C.*.so fastdiff/_build.json .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, with torch. Another environment's torch is made visible by a .pth file: it works where $(PYTHON)
# itself belongs to a virtual environment, which --system-site-packages cannot look into.
$(VENV)/.ready:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "fastdiff needs Python 3.10 or newer"'
	$(PYTHON) -m venv --clear $(VENV)
ifeq ($(filter command% environment%,$(origin TORCH)),)
	@if torch=$$($(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); then \
	  echo "using the torch in $$torch"; \
	  echo "$$torch" > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_outer_torch.pth; \
	else set -x; $(PIP) install torch==2.13.0; fi
else
	$(PIP) install $(TORCH)
endif
	$(PIP) install --upgrade "setuptools>=77" "pybind11>=2.13" ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[test,demo,dev]"
	@touch $@
	@$(PY) -m fastdiff info

# What brings quantized weights, for the tests of them alone: wherever these are installed, Diffusers imports them, with
# warnings. They need nothing that is not there.
$(VENV)/quantized: | $(VENV)/.ready
	rm -rf $@
	$(PIP) install --no-deps --target $@ "gguf>=0.10" "torchao>=0.15" "bitsandbytes>=0.48"
	@touch $@

$(VENV)/diffusers-$(DIFFUSERS_MIN): $(VENV)/.installed
	rm -rf $@
	$(PIP) install --no-deps --target $@ diffusers==$(DIFFUSERS_MIN)
	$(PIP) install "httpx<1" # which newer ones do not need
	@touch $@
