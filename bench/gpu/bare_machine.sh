#!/bin/sh
# The GPU suite on a machine that has Python, torch and a GPU, but no network and not our other packages.
#
#   sh bench/gpu/bare_machine.sh pack     # here: wheels for the other machine's Python into build/gpu-wheels
#   (copy the checkout with build/gpu-wheels to the machine with the GPU)
#   OUT=results sh bench/gpu/bare_machine.sh run [CHECK ...]     # there, in the checkout
#
# torch, numpy and what they need are the machine's own. PYTHON_VERSION=3.12 by default.
set -eu
cd "$(dirname "$0")/../.."
WHEELS=build/gpu-wheels
PACKAGES="msgspec structlog transformers huggingface_hub tokenizers safetensors peft accelerate gguf nats-py rich"

pack() {
    rm -rf "$WHEELS"
    mkdir -p "$WHEELS"
    for package in $PACKAGES; do
        grep -i "^$package==" constraints.txt || echo "$package"
    done > "$WHEELS/wanted.txt"
    # What those need and a machine with torch may lack.
    printf '%s\n' pynacl cffi pycparser markdown-it-py mdurl pygments httpx2 httpcore2 truststore h11 anyio idna hf-xet >> "$WHEELS/wanted.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
        --dest "$WHEELS" --requirement "$WHEELS/wanted.txt"
    grep -i '^nkeys==' constraints.txt > "$WHEELS/source.txt"  # pure Python, but published as source only
    python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$WHEELS" --requirement "$WHEELS/source.txt"
    du -sh "$WHEELS"
}

run() {
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    if [ -d "$WHEELS" ]; then
        python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    fi
    PYTHONPATH="$site:$PWD" HF_HUB_OFFLINE=1 python3 -m bench gpu "$@"
}

case "${1:-}" in
    pack) pack ;;
    run) shift; run "$@" ;;
    *) sed -n '2,9p' "$0"; exit 2 ;;
esac
