"""The manifest for KServe names what there is: the runtime, or the options and paths of `recsys serve`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from recsys.deploy.kserve import inference_service
from recsys.errors import ExportError

URI = "s3://models/ctr"


def test_a_service_of_triton() -> None:
    body = yaml.safe_load(inference_service("ctr", URI))
    assert (body["apiVersion"], body["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert body["metadata"] == {"name": "ctr"}
    model = body["spec"]["predictor"]["model"]
    assert (model["modelFormat"], model["protocolVersion"], model["storageUri"]) == ({"name": "triton"}, "v2", URI)


def test_a_service_of_the_bundle() -> None:
    body = yaml.safe_load(inference_service("ctr", URI, image="registry/recsys:1"))
    (container,) = body["spec"]["predictor"]["containers"]
    assert (container["name"], container["image"]) == ("kserve-container", "registry/recsys:1")
    assert container["env"] == [{"name": "STORAGE_URI", "value": URI}]
    assert container["command"] == ["recsys", "serve", "/mnt/models"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": 8080}
    assert container["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": 8080}
    assert container["ports"][0]["containerPort"] == 8080


@pytest.mark.skipif(importlib.util.find_spec("recsys.cli.serve") is None, reason="there is no `recsys serve` yet")
def test_the_command_of_the_container_is_one_that_there_is() -> None:
    from recsys.cli import app

    body = yaml.safe_load(inference_service("ctr", URI, image="registry/recsys:1"))
    (container,) = body["spec"]["predictor"]["containers"]
    name, *arguments = [*container["command"][1:], *container["args"]]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    parsed = command.make_context(name, arguments).params
    assert str(parsed["bundle"]) == "/mnt/models"
    assert (parsed["name"], parsed["host"], parsed["port"]) == ("ctr", "0.0.0.0", 8080)


@pytest.mark.parametrize("name", ["", "CTR", "a_b", "1a", "a-", "a" * 64, "a/b"])
def test_a_name_that_kubernetes_does_not_take(name: str) -> None:
    with pytest.raises(ExportError, match="a service's name has lower-case letters"):
        inference_service(name, URI)


def test_the_command_writes_the_manifest(whole: Path, tmp_path: Path) -> None:
    options = ["--kserve", str(tmp_path / "new" / "ctr.yaml"), "--name", "ctr"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "recsys.cli", "export", str(whole), *options, *more]
        return subprocess.run(call, capture_output=True, text=True)

    refused = run()
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: --storage : expected an address, such as s3://bucket/folder")
    assert run("--storage", URI).returncode == 0
    assert (tmp_path / "new" / "ctr.yaml").read_text() == inference_service("ctr", URI)
