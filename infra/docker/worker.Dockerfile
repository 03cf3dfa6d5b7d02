# A Ray node, head or worker: Python, torch, DeepSpeed, Ray and this package. The same Python as the control plane's.
#   docker build -f infra/docker/worker.Dockerfile -t patchwork/worker:0.1.0 .
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL may be given with --build-arg; torch comes with CUDA unless the index says otherwise.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY vit vit
COPY workers workers
COPY orchestrator orchestrator
ENV PIP_CONSTRAINT=/src/constraints.txt
RUN python -m venv /opt/patchwork && /opt/patchwork/bin/pip install --no-cache-dir '.[worker]'

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/patchwork /opt/patchwork
# The raylet's PATH decides which Python the constant commands of Ray jobs find.
ENV PATH=/opt/patchwork/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 patchwork && install -d -o patchwork /data
USER patchwork
WORKDIR /home/patchwork
CMD ["ray", "start", "--help"]
