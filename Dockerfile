# sstoken on a CPU: docker build -t sstoken . && docker run --rm -v "$PWD:/work" sstoken demo
# Files that it writes into /work belong to root unless you add: --user "$(id -u):$(id -g)"
FROM python:3.11-slim

# torch without CUDA: a tenth of the size
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu

COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in /src/
COPY sstoken /src/sstoken
COPY stages /src/stages
COPY pipeline /src/pipeline
RUN pip install --no-cache-dir '/src[lora]'

# caches of models and datasets, writable by any user; mount a volume here to keep them
ENV HF_HOME=/cache HOME=/tmp
RUN mkdir -m 777 /cache
WORKDIR /work
ENTRYPOINT ["sstoken-curate"]
CMD ["--help"]
