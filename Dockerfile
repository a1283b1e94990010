# fastrdm with CUDA, as pinned in constraints.txt: docker build -t fastrdm . && docker run --gpus all -v $PWD/runs:/runs fastrdm train
# The wheels of torch bring CUDA's libraries; the host needs a driver and the NVIDIA container toolkit only.
FROM python:3.11-slim-bookworm
# g++ compiles the views of the CPU engine, gcc what Triton and torch.compile make.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /fastrdm
COPY constraints.txt setup.py pyproject.toml CITATION.cff README.md LICENSE ./
COPY kernels kernels
COPY loaders loaders
COPY fastrdm fastrdm
RUN pip install --no-cache-dir -c constraints.txt -e '.[timm,tensorboard]'
RUN useradd --create-home trainer && mkdir /runs && chown trainer /runs
USER trainer
WORKDIR /
ENTRYPOINT ["fastrdm"]
CMD ["doctor"]
