# Trainer node and engine of one slot. The same image runs on CPU and GPU where torch's build knows both.
#   EXTRAS      parts of pyproject.toml to install; "trainer flash4" for GPUs
#   PACKAGES    Debian packages; "gcc libc6-dev" for GPUs: what torch.compile makes calls a C compiler when it runs
#   TORCH_ARGS  pip arguments for torch alone, such as an index with a CPU-only build (a third of the size)
FROM python:3.11-slim-bookworm

ARG EXTRAS=trainer
ARG TORCH_ARGS=
ARG PACKAGES=

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app
WORKDIR /app

RUN if [ -n "${PACKAGES}" ]; then apt-get update && apt-get install -y --no-install-recommends ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/*; fi

# torch first and alone, the largest layer; then the other dependencies, from pyproject.toml.
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_ARGS} torch
RUN python requirements.py ${EXTRAS} > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY shared shared
COPY trainer_node trainer_node
COPY deploy/node_health.py deploy/node_health.py

RUN useradd --uid 10001 --create-home podium && install -d -o podium /data /artifacts
USER podium
CMD ["python", "-m", "trainer_node"]
