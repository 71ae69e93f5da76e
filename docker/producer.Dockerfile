# The producer's side: the commands `shiwu` and `shiwu-hooks`, and `from shiwu import Client`, without torch.
#
#   docker build -f docker/producer.Dockerfile -t shiwu-producer .
#
# The base of the worker; docker/worker.Dockerfile has the origin of its digest.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba

# What is installed, as files of its own: a change of pyproject.toml that asks for nothing new installs nothing anew.
FROM ${PYTHON_IMAGE} AS requirements
WORKDIR /asked
COPY constraints.txt pyproject.toml ./
COPY docker/requirements.py docker/
RUN python3 docker/requirements.py metrics hooks watch > requirements.txt \
 && python3 docker/requirements.py --build-system > build-requirements.txt

FROM ${PYTHON_IMAGE} AS libraries
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
WORKDIR /build
COPY --from=requirements /asked/*.txt ./
RUN python3 -m venv --without-pip /opt/shiwu \
 && python3 -m pip --python /opt/shiwu/bin/python install --no-cache-dir -c constraints.txt -r requirements.txt

# Our own code is a layer of its own.
FROM libraries AS own
RUN python3 -m venv /opt/builder \
 && /opt/builder/bin/pip install --no-cache-dir -c constraints.txt -r build-requirements.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY producer producer
# The worker's code alone, without its libraries and its model, would only mislead.
RUN mkdir -p worker/shiwu_worker && touch worker/shiwu_worker/__init__.py \
 && /opt/builder/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && python3 -m pip --python /opt/shiwu/bin/python install --no-cache-dir --no-deps --prefix /opt/own dist/*.whl

FROM ${PYTHON_IMAGE}
# The base's own pip goes too: nothing is installed in an image that runs.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini=0.19.* \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    /usr/local/lib/python3*/site-packages/* \
 && groupadd --gid 10001 shiwu \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin shiwu
COPY --from=libraries /opt/shiwu /opt/shiwu
COPY --from=own /opt/own /opt/shiwu
ENV PATH=/opt/shiwu/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["/usr/bin/tini", "--", "shiwu"]
CMD ["--help"]
ARG VERSION=0.1.0
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="shiwu-producer" \
      org.opencontainers.image.description="Enqueues image tagging jobs for shiwu's workers and reads their answers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
