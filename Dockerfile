# The container of paco_ds. On CPU:
#     docker build -t paco_ds .
# On CUDA; the base has the compiler of the CUDA version that torch was built with:
#     docker build -t paco_ds:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg DEVICE=cuda .
# Runs, shards and recipes are mounted at /shared; a job starts as in docs/cluster.md.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
# g++ and headers for what torch and DeepSpeed compile, ssh and pdsh for hosts by ssh
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-dev g++ openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/paco_ds
ENV PATH=/opt/paco_ds/bin:$PATH PIP_NO_CACHE_DIR=1

FROM python AS wheel
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY paco_ds paco_ds
COPY ds_configs ds_configs
COPY shards shards
RUN pip wheel --no-deps --wheel-dir /wheel .

FROM python
ARG DEVICE=cpu
COPY constraints.txt /opt/paco_ds/constraints.txt
# torch first, in a layer of its own: it changes seldom and is most of the image
RUN if [ "$DEVICE" = cpu ]; then export PIP_INDEX_URL=https://download.pytorch.org/whl/cpu; fi \
    && pip install --constraint /opt/paco_ds/constraints.txt torch torchvision
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --constraint /opt/paco_ds/constraints.txt /wheel/*.whl
RUN useradd --create-home --uid 10001 paco && mkdir /shared && chown paco /shared
USER 10001
WORKDIR /shared
CMD ["paco-train", "--help"]
