# syntax=docker/dockerfile:1
#
#   docker build --target excise-build    -t excise-build .      edit, export, evaluate: PyTorch and TensorRT
#   docker build --target excise-serve    -t excise-serve .      a real Triton, without PyTorch
#   docker build --target excise-embedded -t excise-embedded .   the embedded server on a CPU, 300 MB of Python packages
#
# Pin both images by digest where releases have to repeat: docker build --build-arg TRITON_IMAGE=…@sha256:…
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:25.10-py3

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY edit edit
COPY export export
COPY serve serve
COPY eval eval
COPY demo demo
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


FROM ${PYTHON_IMAGE} AS excise-build
# OpenCV, which NudeNet needs, links against GLib.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libglib2.0-0=2.74.* \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /constraints.txt
# nudenet asks for the CPU's onnxruntime, which would overwrite onnxruntime-gpu: it is installed without what it asks for.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    sed --in-place --expression '/^onnxruntime==/d' --expression '/^nudenet==/d' /constraints.txt \
    && pip install --no-cache-dir --constraint /constraints.txt "$(echo /wheels/excise-*.whl)[edit,export]" \
    && pip uninstall --yes onnxruntime \
    && pip install --no-cache-dir --constraint /constraints.txt onnxruntime-gpu tensorrt-rtx \
    && pip install --no-cache-dir --constraint /constraints.txt \
        clean-fid httpx jinja2 lpips matplotlib opencv-python-headless scipy torchvision \
    && pip install --no-cache-dir --no-deps nudenet==3.4.2
RUN useradd --create-home --uid 10001 excise
USER 10001
WORKDIR /work
ENTRYPOINT ["excise"]
CMD ["--help"]


FROM ${TRITON_IMAGE} AS excise-serve
# Triton's Python backend has returned empty outputs with NumPy 2: the build fails here instead of there.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/excise-*.whl)" 'numpy<2' \
    && pip uninstall --yes onnxruntime \
    && pip install --no-cache-dir onnxruntime-gpu 'numpy<2' \
    && python3 -c "import importlib.util, numpy, excise.serve.onnx_runtime; assert numpy.__version__ < '2'; assert importlib.util.find_spec('torch') is None"
USER 1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["curl", "--fail", "--silent", "http://localhost:8000/v2/health/ready"]
# Explicit control: excise serve promote --url tells this Triton to load the new version; the other models follow it.
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit", "--load-model=excise", \
     "--strict-readiness=true", "--exit-on-error=true", "--exit-timeout-secs=60"]


FROM ${PYTHON_IMAGE} AS excise-embedded
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/excise-*.whl)[serve]" \
    && useradd --create-home --uid 10001 excise
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/readyz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["excise", "serve", "run"]
CMD ["demo", "--host", "0.0.0.0"]
