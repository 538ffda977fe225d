"""The manifest that lets KServe run a bundle: by `recsys serve`, or by Triton Inference Server."""

from __future__ import annotations

import re
from typing import Any

from recsys.errors import ExportError

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_MODELS = "/mnt/models"
"""Where KServe puts what it fetched from the storage."""
_PORT = 8080


def inference_service(name: str, storage: str, *, image: str | None = None) -> str:
    """Return an `InferenceService` of KServe as YAML.

    Args:
        name: of the service.
        storage: address of the bundle's folder, or of a repository of Triton where there is no image.
        image: of a container in which `recsys serve` can be run; None for KServe's own runtime of Triton.

    Raises:
        ExportError: the name is none that Kubernetes takes, or the storage is no address.
    """
    import yaml

    if not _NAME.fullmatch(name):
        raise ExportError(f"--name {name}: a service's name has lower-case letters, digits and `-`, at most 63")
    if "://" not in storage:
        raise ExportError(f"--storage {storage}: expected an address, such as s3://bucket/folder or pvc://claim/folder")
    predictor = _triton(storage) if image is None else _own(name, storage, image)
    body = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"predictor": predictor},
    }
    text: str = yaml.safe_dump(body, sort_keys=False)
    return text


def _triton(storage: str) -> dict[str, Any]:
    model = {"modelFormat": {"name": "triton"}, "protocolVersion": "v2", "storageUri": storage}
    return {"model": {**model, "resources": _resources()}}


def _own(name: str, storage: str, image: str) -> dict[str, Any]:
    """A container of one's own; KServe fetches what STORAGE_URI names before it starts."""
    return {
        "containers": [
            {
                "name": "kserve-container",
                "image": image,
                "command": ["recsys", "serve", _MODELS],
                "args": ["--name", name, "--host", "0.0.0.0", "--port", str(_PORT)],
                "env": [{"name": "STORAGE_URI", "value": storage}],
                "ports": [{"containerPort": _PORT, "protocol": "TCP"}],
                "readinessProbe": _probe("ready"),
                "livenessProbe": _probe("live"),
                "resources": _resources(),
            }
        ]
    }


def _probe(what: str) -> dict[str, Any]:
    return {"httpGet": {"path": f"/v2/health/{what}", "port": _PORT}, "periodSeconds": 5}


def _resources() -> dict[str, Any]:
    return {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}
