# A headless ComfyUI with this pack, for a machine with several NVIDIA GPUs. Not yet built or run.
#
#   docker build -t comfyui-sp .
#   docker run --gpus all --shm-size 1g -p 127.0.0.1:8188:8188 -v /path/to/models:/comfyui/models comfyui-sp
#
# torch comes with the base image; any of its CUDA images from 2.9 on will do (--build-arg TORCH=…). NCCL wants more shared
# memory than Docker's 64 MB: hence --shm-size. To reach ComfyUI from other machines, put a proxy with a login before it.
ARG TORCH=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
FROM ${TORCH}
ARG COMFYUI=https://github.com/comfyanonymous/ComfyUI.git
ARG COMFYUI_REF=master

# g++ is for Torch Compile (SP).
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git libgl1 libglib2.0-0 \
 && rm -rf /var/lib/apt/lists/*
RUN git clone --depth 1 --branch "${COMFYUI_REF}" "${COMFYUI}" /comfyui
WORKDIR /comfyui

# The image's torch stays: pip is told the versions that are there.
RUN pip list --format freeze | grep -iE '^(torch|torchvision|torchaudio|triton|nvidia-[a-z0-9-]+)==' > /constraints.txt \
 && pip install --no-cache-dir -c /constraints.txt -r requirements.txt
COPY requirements.txt custom_nodes/ComfyUI-SequenceParallel/
RUN pip install --no-cache-dir -c /constraints.txt -r custom_nodes/ComfyUI-SequenceParallel/requirements.txt
COPY . custom_nodes/ComfyUI-SequenceParallel

EXPOSE 8188
CMD ["python", "main.py", "--listen", "0.0.0.0", "--port", "8188"]
