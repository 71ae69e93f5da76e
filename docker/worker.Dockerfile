# The worker, for NVIDIA GPUs or for CPUs alone:
#
#   docker build -f docker/worker.Dockerfile -t shiwu-worker .
#   docker build -f docker/worker.Dockerfile -t shiwu-worker-cpu --build-arg DEVICE=cpu .
#   docker build -f docker/worker.Dockerfile -t shiwu-worker-compile --build-arg COMPILER=g++ .
#
# The base is plain Python, not nvidia/cuda: torch's wheels bring the CUDA libraries they were built with, exactly
# pinned, and a CUDA base would hold cuBLAS and cuDNN a second time. The driver comes from the host.
#
# The digest is that of the index of all architectures, as `docker buildx imagetools inspect NAME:TAG` prints it. It was
# taken from public repositories that pin the same, not from a registry: look before a release.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba

# What is installed, as files of its own: a change of pyproject.toml that asks for nothing new installs nothing anew.
FROM ${PYTHON_IMAGE} AS requirements
WORKDIR /asked
COPY constraints.txt pyproject.toml ./
COPY docker/requirements.py docker/
RUN python3 docker/requirements.py worker otel obstore > requirements.txt \
 && python3 docker/requirements.py --build-system > build-requirements.txt \
 && grep --max-count=1 '^torch==' constraints.txt > torch.txt

FROM ${PYTHON_IMAGE} AS libraries
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
WORKDIR /build
COPY --from=requirements /asked/*.txt ./
# cuda: torch from the usual index, with CUDA's libraries; cpu: from torch's own index of builds without them.
ARG DEVICE=cuda
ARG TORCH_CPU_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN case "${DEVICE}" in \
      cuda) set -- -c constraints.txt ;; \
      cpu) set -- --no-deps --index-url "${TORCH_CPU_INDEX_URL}" ;; \
      *) echo "DEVICE: expected cuda or cpu, got ${DEVICE}" >&2; exit 2 ;; \
    esac \
 && python3 -m venv --without-pip /opt/shiwu \
 && python3 -m pip --python /opt/shiwu/bin/python install --no-cache-dir "$@" -r torch.txt
RUN python3 -m pip --python /opt/shiwu/bin/python install --no-cache-dir -c constraints.txt -r requirements.txt

# Our own code is a layer of its own: a new version of it moves megabytes, not gigabytes.
FROM libraries AS own
RUN python3 -m venv /opt/builder \
 && /opt/builder/bin/pip install --no-cache-dir -c constraints.txt -r build-requirements.txt
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY producer producer
COPY worker worker
RUN /opt/builder/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && python3 -m pip --python /opt/shiwu/bin/python install --no-cache-dir --no-deps --prefix /opt/own dist/*.whl

# A model of the hub, baked in into /models/<MODEL>; run with SHIWU_MODEL=/models/<MODEL>.
#
#   --build-arg MODEL=OFA-Sys/chinese-clip-vit-base-patch16 --build-arg MODEL_REVISION=<commit>
#
# The worker's own command downloads and checks it, so that a build ends with an error where a file is missing. All
# files get one time, so that a new version of our code leaves the layer of the same model as it was.
#
# Without MODEL the folder is empty, for a volume. It is not declared a VOLUME: every container would begin by copying
# a model that is baked in.
FROM libraries AS model
ARG MODEL=""
ARG MODEL_REVISION=""
COPY --from=own /opt/own /opt/shiwu
RUN mkdir /models \
 && if [ -n "${MODEL}" ]; then \
      SHIWU_MODEL="${MODEL}@${MODEL_REVISION:?expected a commit of the model}" \
        /opt/shiwu/bin/shiwu-worker --fetch-model "/models/${MODEL}"; \
    fi \
 && find /models -exec touch --date=@0 {} +

FROM ${PYTHON_IMAGE}
# The base's own pip goes too: nothing is installed in an image that runs.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini=0.19.* \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    /usr/local/lib/python3*/site-packages/* \
 && groupadd --gid 10001 shiwu \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin shiwu \
 && mkdir -p /etc/shiwu/labels
# SHIWU_COMPILE needs a compiler at run time: Triton one for C, inductor one for C++ on a CPU. Python's headers, which
# both include, are a part of the base.
ARG COMPILER=none
RUN case "${COMPILER}" in \
      none) ;; \
      g++) apt-get update \
        && apt-get install --yes --no-install-recommends g++=4:12.2.* \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log ;; \
      *) echo "COMPILER: expected none or g++, got ${COMPILER}" >&2; exit 2 ;; \
    esac
COPY --from=libraries /opt/shiwu /opt/shiwu
COPY --from=model /models /models
COPY --from=own /opt/own /opt/shiwu
# The root may be read-only: what is written at run time goes to /tmp and /dev/shm. NVIDIA_VISIBLE_DEVICES is not set
# here, or a container that asked for no GPU would see all of them. A volume at /tmp/compiled keeps compiled models.
# Where NVIDIA's container toolkit is not used, as on GKE, the driver is mounted at /usr/local/nvidia, which nvidia/cuda
# images name too.
ENV PATH=/opt/shiwu/bin:$PATH:/usr/local/nvidia/bin \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RES_OPTIONS="timeout:2 attempts:2" \
    HF_HOME=/models/hub \
    HF_HUB_OFFLINE=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/compiled/inductor \
    TRITON_CACHE_DIR=/tmp/compiled/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SHIWU_HTTP_PORT=9808 \
    SHIWU_LABELS_DIR=/etc/shiwu/labels
USER 10001:10001
WORKDIR /tmp
EXPOSE 9808
# http.client and not urllib: a proxy of the environment is nothing to ask about ourselves.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 CMD ["python", "-c", \
    "import http.client as h, os; c = h.HTTPConnection('127.0.0.1', int(os.environ['SHIWU_HTTP_PORT']), timeout=4); \
    c.request('GET', '/readyz'); r = c.getresponse(); print(r.read(1000).decode()); raise SystemExit(r.status != 200)"]
ENTRYPOINT ["/usr/bin/tini", "--", "shiwu-worker"]
ARG VERSION=0.1.0
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="shiwu-worker" \
      org.opencontainers.image.description="Tags images named by Celery messages on Redis" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
