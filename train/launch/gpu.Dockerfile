# Builds an image that fine-tunes on NVIDIA GPUs, with the versions of constraints.txt. From the repository's root:
#
#   docker build -f train/launch/gpu.Dockerfile -t phi3-jax-gpu:1 .
#
# The image has the command phi3-jax, and runs as a user without rights over the machine.

# --- Place 1 of 2: the image of Python, which must be 3.11 for the versions of constraints.txt.
ARG PYTHON=python:3.11.13-slim-bookworm

# --- Place 2 of 2: more packages, with their versions, such as "datasets==4.0.0".
ARG PACKAGES=""

# --- Nothing below needs a change.
# The build needs pip and the sources; the image has only what they install.
FROM ${PYTHON} AS build
ARG PACKAGES
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY phi3_jax phi3_jax
COPY train train
# hadolint ignore=SC2086
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -c train/launch/constraints.txt ".[train]" "jax[cuda13]" ${PACKAGES}

FROM ${PYTHON}
RUN useradd --create-home --uid 1000 phi3
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/phi3
CMD ["phi3-jax", "finetune", "--help"]
