"""Native code in a bundle: marked, never loaded unasked, and then with the graph's scores or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
from test_bundle import HEAVY, reseal
from test_parity_matrix import logs

from recsys.deploy import aot, compile, predictor
from recsys.deploy.bundle import COMPILED, MANIFEST, open_bundle, seal
from recsys.deploy.encode import Encoded
from recsys.deploy.export import Export
from recsys.deploy.spec import EncoderSpec
from recsys.errors import BundleError, RecipeError, RequestError

DATA = {**made.DATA, "label": {"click": "click", "buy": "buy"}, **made.LISTS}
NONE = shutil.which(os.environ.get("CXX", "g++")) is None
compiler = pytest.mark.skipif(NONE, reason="no C++ compiler, which native code is written with")
ABOUT = {"torch": "2", "platform": sys.platform, "machine": "here", "processor": []}


def mark(folder: Path, executable: Any) -> None:
    body = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(seal({**body, "executable": executable}))


@pytest.fixture
def marked(copy: Path) -> Path:
    """A bundle with a file in the place of native code, which nothing may load."""
    (copy / "aot").mkdir()
    (copy / COMPILED).write_bytes(b"PK\x03\x04 no code at all")
    reseal(copy)
    mark(copy, {COMPILED: ABOUT})
    return copy


def test_a_marked_file_is_compared_and_never_loaded(marked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("it was loaded"))
    assert predictor.load(marked).check_golden() <= 1e-6
    assert open_bundle(marked).manifest["executable"] == {COMPILED: ABOUT}
    with pytest.raises(BundleError, match=r"aot/model.pt2 is a program that would run with all of your rights"):
        aot.load(marked)
    content = (marked / COMPILED).read_bytes()
    (marked / COMPILED).write_bytes(content[:-1] + b"!")
    for opened in (predictor.load, lambda path: aot.load(path, allow_executable=True)):
        with pytest.raises(BundleError, match=r"aot/model.pt2: altered after the bundle was written"):
            opened(marked)
    (marked / COMPILED).unlink()
    with pytest.raises(BundleError, match=r"aot/model.pt2: missing"):
        predictor.load(marked)


def test_verify_says_what_it_did_not_run_and_needs_no_torch(marked: Path) -> None:
    code = f"""
import sys
for name in {tuple(name for name in HEAVY if name != "pydantic")!r}:
    sys.modules[name] = None
from recsys.cli import main
sys.argv = ["recsys", "verify", {str(marked)!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "aot/model.pt2 is a program; nothing loads it unless told to" in done.stdout
    assert "golden rows agree within" in done.stdout


def test_nothing_but_the_one_file_can_be_marked(marked: Path) -> None:
    (marked / "extra.so").write_bytes(b"\x7fELF")
    reseal(marked)
    with pytest.raises(BundleError, match=r"extra.so: a file `.so` holds code"):
        predictor.load(marked)
    for executable in ({"extra.so": {}}, {COMPILED: ABOUT, "extra.so": {}}, [COMPILED], True):
        mark(marked, executable)
        with pytest.raises(BundleError, match=r"holds code \(`executable`\) other than aot/model.pt2"):
            predictor.load(marked)
    (marked / "extra.so").unlink()
    reseal(marked)
    mark(marked, False)
    with pytest.raises(BundleError, match=r"model.pt2: a file `.pt2` holds code"):
        predictor.load(marked)
    (marked / COMPILED).unlink()
    reseal(marked)
    mark(marked, {COMPILED: ABOUT})
    with pytest.raises(BundleError, match=r"marks aot/model.pt2 as executable, but does not list it"):
        predictor.load(marked)


def test_code_for_another_machine_is_refused_before_it_is_loaded(marked: Path, whole: Path) -> None:
    import platform

    import torch

    with pytest.raises(BundleError, match=r"has no aot/model.pt2; the stage `export` writes it with `aot: true`"):
        aot.load(whole, allow_executable=True)
    here = {"torch": torch.__version__, "platform": sys.platform, "machine": platform.machine(), "processor": []}
    able = torch.cpu.get_capabilities()
    absent = next(name for name, there in able.items() if there is False)
    wrong = {"torch": "1.0.0", "platform": "plan9", "machine": "vax", "processor": [absent]}
    for name, value in wrong.items():
        mark(marked, {COMPILED: {**here, name: value}})
        with pytest.raises(BundleError, match=rf"was compiled for .*{absent if name == 'processor' else value}"):
            aot.load(marked, allow_executable=True)
    mark(marked, {COMPILED: here})
    with pytest.raises(BundleError, match=r"aot/model.pt2: torch cannot load it"):
        aot.load(marked, allow_executable=True)


def test_inputs_are_checked_before_the_code_sees_them() -> None:
    spec = EncoderSpec.of_json(_spec_of(made.encoder_of(DATA)), "made")
    names = ("ids", "values", "list_0", "length_0", "list_1", "length_1")
    inputs = aot.inputs_of(spec, names)
    seen: list[Any] = []
    run = aot.Compiled(lambda *tensors: seen.append(tensors) or pytest.fail("unchecked"), inputs, 2)
    fields = len(spec.ids) + len(spec.numbers)

    def given(rows: int, **changed: Any) -> dict[str, Any]:
        good: dict[str, Any] = {
            "ids": np.zeros((rows, fields), np.int64),
            "values": np.ones((rows, fields), np.float32),
            "list_0": np.zeros((rows, 3, 1), np.int64),
            "length_0": np.zeros(rows, np.int64),
            "list_1": np.zeros((rows, 5, 2), np.int64),
            "length_1": np.zeros(rows, np.int64),
        }
        return {**good, **changed}

    wrong = {
        rf"'ids' is int32 \[4, {fields}\]; it must be int64 \[B, {fields}\]": {"ids": np.zeros((4, fields), np.int32)},
        r"'ids' is float32 .* must be int64": {"ids": np.zeros((4, fields), np.float32)},
        r"'values' is float64": {"values": np.ones((4, fields))},
        rf"'ids' is int64 \[4, {fields - 1}\]": {"ids": np.zeros((4, fields - 1), np.int64)},
        r"'ids' is int64 \[4\]": {"ids": np.zeros(4, np.int64)},
        r"'length_0' has 3 rows, but 'ids' has 4": {"length_0": np.zeros(3, np.int64)},
        r"'list_0' is int64 \[4, 5, 1\]; it must be int64 \[B, 1 to 4, 1\]": {"list_0": np.zeros((4, 5, 1), np.int64)},
        r"'list_1' is int64 \[4, 0, 2\]": {"list_1": np.zeros((4, 0, 2), np.int64)},
        r"'list_1' is list; it must be an array int64": {"list_1": [[1]]},
        r"'length_1' is NoneType": {"length_1": None},
        r"'ids' is >i8": {"ids": np.zeros((4, fields), ">i8")},
    }
    for told, change in wrong.items():
        with pytest.raises(RequestError, match=told):
            run(given(4, **change))
    assert not seen
    logit, clipped = run(given(0))
    assert (logit.shape, logit.dtype, clipped.shape) == ((0, 2), np.float32, (0,))


def _spec_of(encoder: Any) -> str:
    from recsys.deploy.write import spec_of

    return spec_of(encoder).to_json()


def test_no_compiler_and_no_bundle_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    encoder = made.encoder_of(made.DATA)
    model = made.model_of(encoder, made.DATA, made.MODEL)
    with pytest.raises(RecipeError, match=r"aot: there is no C\+\+ compiler \(g\+\+, or the one that CXX names\)"):
        compile.compile_graph(tmp_path / "aot" / "model.pt2", model)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match=r"aot: native code is a part of the bundle"):
        Export(aot=True, bundle=False)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with native code, of two tasks, numbers and lists."""
    folder = tmp_path_factory.mktemp("native") / "bundle"
    made.write(folder, DATA, {**made.MODEL, "sequence": "din"}, compiled=True)
    return folder


@compiler
@pytest.mark.slow
def test_native_code_gives_the_graphs_scores(native: Path) -> None:
    about = open_bundle(native).manifest["executable"][COMPILED]
    assert about["platform"] == sys.platform
    assert about["processor"]
    plain, fast = predictor.load(native), aot.load(native, allow_executable=True)
    rows = logs(512, seed=9).select(plain.columns).to_dicts()
    for some in (rows[:1], rows[:3], rows, []):
        one, two = plain.predict(some), fast.predict(some)
        assert len(two) == len(some)
        for task in plain.tasks:
            assert np.abs(one.probability[task] - two.probability[task]).max(initial=0.0) <= 1e-6
    assert np.ptp(plain.predict(rows).logit["click"]) > 0.1
    encoded = plain.encoder.rows(rows)
    far = encoded.ids.copy()
    far[:, 0], far[::2, 1] = 2**62, -1
    (events, length), *rest = encoded.lists
    outside = Encoded(far, encoded.values, ((events + 10**6, length + 99), *rest))
    one, two = plain.score(outside), fast.score(outside)
    np.testing.assert_array_equal(one.clipped, two.clipped)
    assert (one.clipped >= 2).all()
    for task in plain.tasks:
        assert np.abs(one.probability[task] - two.probability[task]).max() <= 1e-6
    np.testing.assert_allclose(
        plain.explain(rows[:4]).contribution["buy"], fast.explain(rows[:4]).contribution["buy"], atol=1e-5
    )
    with pytest.raises(RequestError, match=r"'ids' is int32 .* must be int64"):
        fast.score(Encoded(encoded.ids.astype(np.int32), encoded.values, encoded.lists))  # type: ignore[arg-type]


@compiler
@pytest.mark.slow
def test_one_row_passes_the_codes_own_check(native: Path) -> None:
    """Left to itself, that check wants two rows and more."""
    code = f"""
from recsys.deploy import aot
predictor = aot.load({str(native)!r}, allow_executable=True)
print(len(predictor.predict(predictor.bundle.lines("golden/requests.jsonl")[0])))
"""
    environ = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout.strip() == "1", done.stderr


@compiler
@pytest.mark.slow
def test_other_code_is_refused_and_a_process_without_torch_takes_the_graph(native: Path, tmp_path: Path) -> None:
    code = f"""
import sys
for name in {tuple(HEAVY)!r}:
    sys.modules[name] = None
from recsys.deploy import aot
from recsys.deploy.predictor import load
from recsys.errors import BundleError
load({str(native)!r})
try:
    aot.load({str(native)!r}, allow_executable=True)
except BundleError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "which is not installed; the graph does not" in done.stdout, done.stderr
    made.write(tmp_path / "other", DATA, {**made.MODEL, "sequence": "din", "interaction": "fm"}, compiled=True)
    mixed = Path(shutil.copytree(native, tmp_path / "mixed"))
    shutil.copy(tmp_path / "other" / COMPILED, mixed / COMPILED)
    reseal(mixed)
    predictor.load(mixed)
    with pytest.raises(BundleError, match=r"golden row \d+ gets the"):
        aot.load(mixed, allow_executable=True)
