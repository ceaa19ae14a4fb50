# The gateway, and the podium command for keys, bootstrap and operators: no torch, starts in under a second.
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app
WORKDIR /app

# Dependencies first, from pyproject.toml alone: a change of code doesn't install them again.
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN python requirements.py gateway dashboard keys > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY shared shared
COPY gateway gateway
COPY trainer_node trainer_node
COPY podium podium

# New volumes take over these folders' owner.
RUN useradd --uid 10001 --create-home podium \
    && install -d -o podium /data /var/lib/podium /var/lib/prometheus \
    /keys /keys/broker /keys/gateway /keys/metrics /keys/trainer-a /keys/trainer-b
USER podium
EXPOSE 7999
CMD ["python", "-m", "gateway"]
