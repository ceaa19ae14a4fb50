"""The environment of a worker: what its libraries need, and no secret; pure.

A worker reads models and data that strangers wrote. A token that may upload, which the node needs, is none of
its business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from shared.settings import Settings
from shared.settings_sources import PREFIX

NEEDED: Final = frozenset(
    ["PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"]
).union(("CC", "CXX", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
COMPILED: Final = "compiled"
PROXIES: Final = frozenset({"http_proxy", "https_proxy", "all_proxy", "no_proxy"})  # in either case
LIBRARIES: Final = (
    *("PYTHON", "LC_", "XDG_", "MALLOC_", "THP_", "COVERAGE_"),
    *("OMP_", "MKL_", "OPENBLAS_", "GOMP_", "KMP_", "ATEN_", "DNNL_", "ONEDNN_"),
    *("CUDA", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "TRITON_", "UCX_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SAFETENSORS_", "TOKENIZERS_"),
)
ALLOCATORS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch takes either
UPLOAD_TOKEN: Final = "HF_TOKEN"  # by which the hub's library finds a token, if no file is set
# HF_HUB_DISABLE_IMPLICIT_TOKEN is no secret: it keeps a stored token from being sent.
SECRET: Final = re.compile(
    r"(?<!IMPLICIT_)TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|CREDENTIAL|_KEY\b|_SEED", re.IGNORECASE
)


def worker_environment(
    environment: Mapping[str, str],
    threads: int,
    gpus: str | None,
    also: Iterable[str] = (),
    *,
    temporary: Path | None = None,
) -> dict[str, str]:
    """Return a worker's environment; `also` names further variables that the operator lets it have.

    `temporary` is its folder for temporary files. Compiled kernels stay next to it: they serve later jobs.
    What it needs of the settings is in its job.json, so no variable of theirs passes.
    """
    wanted = frozenset(also)
    passed = {
        name: value
        for name, value in environment.items()
        if name in wanted or (_is_needed(name) and not SECRET.search(name))
    }
    passed = {name: value for name, value in passed.items() if not name.startswith(PREFIX)}
    passed["OMP_NUM_THREADS"] = str(threads)
    passed["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts them, by which the slot was detected
    if temporary is not None:
        passed["TMPDIR"] = str(temporary)
        passed.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary.with_name(COMPILED)))
    # Segments that grow: packs' numbers of label tokens differ, and fixed blocks would not fit each other.
    if not any(name in passed for name in ALLOCATORS):
        passed[ALLOCATORS[0]] = "expandable_segments:True"
    if gpus is not None:
        passed["CUDA_VISIBLE_DEVICES"] = gpus
    return passed


def remarks(environment: Mapping[str, str], settings: Settings) -> list[str]:
    """Return what is wrong with the variables that the operator lets workers have, in one sentence each."""
    found = []
    for name in settings.worker_environment:
        if name.startswith(PREFIX):
            found.append(f"worker_environment names {name}: a worker never gets settings of Podium")
        elif name not in environment:
            found.append(f"worker_environment names {name}, but this node has no such variable")
    uploads = settings.artifacts_kind == "hub" and settings.hub_token_file is None
    if uploads and UPLOAD_TOKEN in settings.worker_environment:
        found.append(
            f"workers get the {UPLOAD_TOKEN} that uploads: put that token into hub_token_file, "
            "and give workers one that can only read"
        )
    return found


def _is_needed(name: str) -> bool:
    return name in NEEDED or name.lower() in PROXIES or name.startswith(LIBRARIES)
