"""A bundle proves that it is whole; what was altered, added, swapped, or could run code, is refused unread."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
import onnx
import pytest

from recsys.deploy.bundle import MANIFEST, open_bundle, seal
from recsys.deploy.predictor import load
from recsys.errors import BundleError


def reseal(folder: Path) -> None:
    """Do what a knowing attacker does: make the manifest fit the files."""
    body = json.loads((folder / MANIFEST).read_bytes())
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    body["files"] = {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }
    (folder / MANIFEST).write_bytes(seal(body))


def test_a_whole_bundle_opens_and_answers(whole: Path) -> None:
    bundle = open_bundle(whole)
    assert bundle.manifest["executable"] is False
    assert len(bundle.lines("golden/requests.jsonl")) >= 256
    assert load(whole).check_golden() <= 1e-6


def test_equal_models_give_equal_bytes_without_a_path_or_a_pickle(whole: Path, tmp_path: Path) -> None:
    made.write(tmp_path / "again")
    names = sorted(p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file())
    assert len(names) > 15
    for name in names:
        content = (whole / name).read_bytes()
        assert content == (tmp_path / "again" / name).read_bytes(), name
        assert not any(text in content for text in (b"/root", b"/tmp", b"/home", b".py", b"site-packages")), name
    assert open_bundle(whole).id == open_bundle(tmp_path / "again").id


def test_a3_one_byte_changed_in_any_file(copy: Path) -> None:
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    for path in files:
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(BundleError) as refused:
                load(copy)
            assert str(path) in str(refused.value), path
        path.write_bytes(content)
    changed = copy / "model.onnx"
    was = hashlib.sha256(changed.read_bytes()).hexdigest()
    changed.write_bytes(changed.read_bytes()[:-1] + b"!")
    now = hashlib.sha256(changed.read_bytes()).hexdigest()
    with pytest.raises(BundleError, match=rf"model.onnx: altered .* sha256 {now}, written were .* with {was}"):
        load(copy)


def test_a3_extra_missing_and_swapped_files(copy: Path, tmp_path: Path) -> None:
    (copy / "notes.md").write_text("hello")
    with pytest.raises(BundleError, match=r"notes.md: not listed in manifest.json"):
        load(copy)
    (copy / "notes.md").unlink()
    made.write(tmp_path / "other", model={**made.MODEL, "interaction": "fm"})
    for name in ("model.onnx", "golden/responses.jsonl", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        with pytest.raises(BundleError, match=rf"{name}: missing"):
            load(copy)
        shutil.copy(tmp_path / "other" / name, copy / name)
        with pytest.raises(BundleError, match=rf"{name}: altered after the bundle was written"):
            load(copy)
        (copy / name).write_bytes(content)
    load(copy)
    with pytest.raises(BundleError, match=r"no such folder\. Did you mean 'bundle'\?"):
        load(tmp_path / "bundel")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for wrong, missing, near in (("run/first/bundle", "run", "runs"), ("runs/frist/bundle", "frist", "first")):
        with pytest.raises(BundleError, match=rf"no folder '{missing}' in .*\. Did you mean '{near}'\?"):
            load(tmp_path / wrong)
    (copy / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"manifest.json: missing; this is no bundle"):
        load(copy)
    with pytest.raises(BundleError, match="no such folder"):
        load(tmp_path / "nowhere" / "at" / "all")


def test_a_manifest_that_was_edited_is_refused(copy: Path) -> None:
    path = copy / MANIFEST
    good = json.loads(path.read_bytes())

    def give(**change: object) -> None:
        path.write_bytes(json.dumps({**good, **change}, indent=1, sort_keys=True).encode() + b"\n")

    give(metrics={"test": {"auc": 0.99}})
    with pytest.raises(BundleError, match="altered after it was written"):
        load(copy)
    give(schema=2)
    with pytest.raises(BundleError, match="schema version 2; this version of recsys reads 1"):
        load(copy)
    give(executable=True)
    with pytest.raises(BundleError, match="holds code"):
        load(copy)
    for content in (b"", b"[1]", b'{"files": []}', b"{" * 100_000):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"manifest.json"):
            load(copy)


class Attack:
    def __reduce__(self) -> object:
        return (Path.touch, (Path("/tmp/recsys-was-here"),))


CODE: dict[str, Callable[[], bytes]] = {
    "extra.pkl": lambda: pickle.dumps(Attack()),
    "extra.pt2": lambda: b"PK\x03\x04",
    "extra.so": lambda: b"\x7fELF",
    "extra.py": lambda: b"print(1)",
    "extra.npz": lambda: b"PK\x03\x04",
    "extra.json": lambda: pickle.dumps(Attack()),
    "extra.jsonl": lambda: b"\x7fELF\x02",
    "extra.onnx": lambda: b"PK\x03\x04data.pkl",
    "extra.safetensors": lambda: pickle.dumps(Attack()),
    "extra.md": lambda: b"#!/bin/sh",
    "extra": lambda: b"anything",
}


@pytest.mark.parametrize("name", CODE)
def test_a4_code_is_refused_though_the_manifest_lists_it(copy: Path, name: str) -> None:
    (copy / name).write_bytes(CODE[name]())
    reseal(copy)
    with pytest.raises(BundleError, match=rf"{name}: "):
        load(copy)
    assert not Path("/tmp/recsys-was-here").exists()
    trusted = name in ("extra.pkl", "extra.pt2", "extra.so", "extra.py", "extra.npz")
    if trusted:
        open_bundle(copy, trust_code=True)
    else:
        with pytest.raises(BundleError, match=rf"{name}: "):
            open_bundle(copy, trust_code=True)


def with_external(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return model


def with_external_constant(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    tensor = onnx.numpy_helper.from_array(np.zeros(2, np.float32), "hidden")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))
    return model


def with_external_in_a_branch(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    inner = with_external_constant(onnx.ModelProto(), location).graph
    node = onnx.helper.make_node("If", ["logit"], ["branch"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)
    return model


def with_sparse(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4]))
    return model


def with_foreign_operator(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    model.graph.node.append(onnx.helper.make_node("Run", [], ["x"], domain="evil"))
    return model


GRAPHS = [with_external, with_external_constant, with_external_in_a_branch, with_sparse, with_foreign_operator]


@pytest.mark.parametrize("change", GRAPHS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "x/../../outside.bin", "model.safetensors"])
def test_a5_a_graph_reaches_nothing_outside_of_itself(
    copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., onnx.ModelProto], location: str
) -> None:
    import onnxruntime

    model = onnx.load(copy / "model.onnx")
    (copy / "model.onnx").write_bytes(change(model, location).SerializeToString())
    reseal(copy)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime saw it"))
    with pytest.raises(BundleError, match=r"model.onnx: (holds a|has an operator of)"):
        load(copy)


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def link_inside(path: Path) -> None:
    path.symlink_to("encoder.json")


def hard_link(path: Path) -> None:
    other = path.parent.parent / "outside.json"
    other.write_text("{}")
    os.link(other, path)


@pytest.mark.parametrize("make", [link, link_inside, hard_link, os.mkfifo], ids=lambda f: f.__name__)
def test_a5_links_and_pipes_are_refused(copy: Path, make: Callable[[Path], None]) -> None:
    make(copy / "extra.json")
    with pytest.raises(BundleError, match=r"extra.json: (a symbolic link|has 2 names|no regular file)"):
        load(copy)


def test_a5_a_linked_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "vocabulary", tmp_path / "elsewhere")
    (copy / "vocabulary").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="vocabulary: a symbolic link"):
        load(copy)


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\x08\x0a:\xff\xff\xff\xff\x0fabc", b"\x08" + b"\xff" * 40, b"\x08\x0a" * 9]
)
def test_a_graph_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    (copy / "model.onnx").write_bytes(content)
    reseal(copy)
    with pytest.raises(BundleError, match=r"model.onnx"):
        load(copy)


def test_other_weights_do_not_give_the_golden_answers(copy: Path) -> None:
    """All hashes fit, and the model is still not the one that was exported."""
    model = onnx.load(copy / "model.onnx")
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    table = max(floats, key=lambda t: len(t.raw_data))
    table.raw_data = (np.frombuffer(table.raw_data, np.float32) * np.float32(1.001)).tobytes()
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    reseal(copy)
    with pytest.raises(BundleError, match=r"golden row \d+ gets the probability 0\.\d+ for 'click', its answer is"):
        load(copy)


def test_a_vocabulary_in_another_order_does_not_give_the_golden_answers(copy: Path) -> None:
    path = copy / "vocabulary" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    reseal(copy)
    with pytest.raises(BundleError, match=r"golden row"):
        load(copy)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


HEAVY = ("torch", "lightning", "pluggy", "pydantic", "polars", "safetensors", "onnx", "torchmetrics")


def test_a_predictor_needs_neither_torch_nor_polars(whole: Path) -> None:
    code = f"""
import sys, json
from recsys.deploy.predictor import load
predictor = load({str(whole)!r})
rows = predictor.bundle.lines("golden/requests.jsonl")
print(len(predictor.predict(rows)), sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = run(code)
    assert done.stderr == ""
    assert done.stdout.split(" ", 1)[1].strip() == "[]"
    assert int(done.stdout.split()[0]) >= 256


def test_verify_needs_no_torch_and_tells_by_its_exit_status(whole: Path, copy: Path) -> None:
    absent = [name for name in HEAVY if name != "pydantic"]  # which the command line itself stands on
    code = f"""
import sys
for name in {absent!r}:
    sys.modules[name] = None
from recsys.cli import main
sys.argv = ["recsys", "verify", PATH]
main()
"""
    done = run(code.replace("PATH", repr(str(whole))))
    assert done.returncode == 0, done.stderr
    assert open_bundle(whole).id in done.stdout
    assert "golden rows agree within" in done.stdout
    (copy / "calibration.json").write_text("{}")
    done = run(code.replace("PATH", repr(str(copy))))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {copy / 'calibration.json'}: altered after the bundle was written")
    assert done.stderr.count("\n") == 1
