# docker build -t irpe . && docker run --gpus all --shm-size 8g -v ./ImageNet:/data -v ./outputs:/outputs irpe \
#     classify train --config configs/deit/small_k.yaml --data-path /data --output_dir /outputs/small_k
# The toolkit has the CUDA version that constraints.txt's PyTorch was built with, so the CUDA kernels are built too.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update && apt-get install -y --no-install-recommends git python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /irpe
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt -r requirements.txt setuptools
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[demo,export,fast-eval]' && FORCE_CUDA=1 pip install --no-cache-dir ./rpe_ops_cuda

ENTRYPOINT ["irpe"]
