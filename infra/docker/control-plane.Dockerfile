# The control plane: API and controller. No torch, no ray.
#   docker build -f infra/docker/control-plane.Dockerfile -t patchwork/control-plane:0.1.0 .
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL may be given with --build-arg where packages come from a mirror.
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
# An environment variable, not an option: it holds for the build's own packages too.
ENV PIP_CONSTRAINT=/src/constraints.txt
RUN python -m venv /opt/patchwork && /opt/patchwork/bin/pip install --no-cache-dir '.[server]'

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/patchwork /opt/patchwork
ENV PATH=/opt/patchwork/bin:$PATH PYTHONUNBUFFERED=1
# The same number in both images: they share the volume with data sets.
RUN useradd --create-home --uid 10001 patchwork && install -d -o patchwork /data
USER patchwork
WORKDIR /home/patchwork
EXPOSE 8400
CMD ["python", "-m", "orchestrator.api.server"]
