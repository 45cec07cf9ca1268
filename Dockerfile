# The environment of requirements.txt and requirements-gpu.txt with CUDA's own driver interface, for one node:
#   docker build -t golf .
#   docker run --gpus all --ipc host -v "$PWD/data:/golf/data" -v "$PWD/runs:/golf/runs" golf ./run.sh
# Without --gpus it runs the CPU demo. The torch wheel carries CUDA's libraries; torch.compile and Triton want a
# compiler. --ipc host (or --shm-size 8g): the ranks of a node exchange data through /dev/shm.
FROM python:3.12.11-slim-bookworm

RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ git \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /golf
COPY requirements.txt requirements-gpu.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-gpu.txt

COPY . .
# run.sh takes this interpreter as it is and installs nothing; the host's libraries of the driver come in at the start.
ENV PYTHON=/usr/local/bin/python \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["./run.sh"]
