# The container image for compose.yaml. NEVER BUILT, see there.
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends git make gawk && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/medfocusclip
COPY pyproject.toml requirements.lock README.md Makefile ./
COPY medfocus medfocus
COPY flows flows
RUN make install
ENV PATH=/opt/medfocusclip/.venv/bin:$PATH
# The mounted checkout belongs to another account, and git refuses to read it without this setting.
RUN git config --system --add safe.directory /project
