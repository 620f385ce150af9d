"""Exported models: what is in the graph, what is in the files, and that they compute what the model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from export_support import KINDS, onnx_metadata, operators, run_onnx, small, smaller
from places import REPOSITORY
from runstate_support import in_a_child
from small_models import images, small_vit
from timm.models.vision_transformer import Block
from torch import nn

from lambda_kernels import (
    AttentionFreeBlock,
    BackendUnavailableError,
    FusedMlp,
    NonFiniteActivationError,
    UnsupportedModelError,
    convert_vit,
)
from lambda_kernels.features import feature_model
from lambda_vit import dilute, set_lambda
from lambda_vit.export import check
from lambda_vit.export import write as export
from lambda_vit.export import write as export_check_write
from lambda_vit.export.check import ExportMismatchError
from lambda_vit.export.tracing import Traced, trace_model
from lambda_vit.export.write import export_aoti, export_onnx, export_program
from lambda_vit.measure.latency import Latency
from lambda_vit.runtime.optional_packages import MissingPackageError


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_model(small())


@pytest.fixture(scope="module")
def one_block() -> Traced:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return trace_model(smaller())


@pytest.fixture(scope="module")
def onnx_file(traced, tmp_path_factory) -> export.Exported:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return export_onnx(traced, tmp_path_factory.mktemp("onnx") / "small.onnx")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_only_pytorchs_own_operators(kind):
    model = small(kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = trace_model(model)
    names = operators(found.program)
    assert "aten.gelu.default" in names
    assert all(name.startswith("aten.") or name.startswith("<built-in") for name in names)
    assert "lambda_kernels" not in str(found.program.graph)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for count in (1, 2, 5):
        assert torch.allclose(found.program.module()(images(count)), model.eval()(images(count)), atol=1e-5)


def test_the_kernels_of_a_gpu_stay_out():
    """On a GPU, where the fused kernels serve every block; nothing is computed, so that none need be there."""
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        blocks = Block(48, 3), Block(48, 3, init_values=0.1)
        model = nn.Sequential(AttentionFreeBlock.from_block(blocks[0]), FusedMlp.from_block(blocks[1])).eval()
        x = torch.empty(2, 5, 48)
    assert [block.path(x.device, x.dtype).backend for block in model] == ["triton"] * 2
    program = torch.export.export(model, (x,))
    assert [str(node.target) for node in program.graph.nodes].count("aten.gelu.default") == 2
    assert not any("lambda_kernels" in name for name in operators(program))


def test_forked_children_train_after_a_trace(traced):
    """Not so where the first backward of a process comes after its first trace: see torch_setup.py."""
    if torch.cuda.is_available():
        pytest.skip("autograd has a thread for the GPU, and cannot be forked")
    model = small_vit(depth=1)

    def train() -> None:
        model(images(1)).sum().backward()

    train()
    assert in_a_child(train) == 0


@torch.no_grad()
def test_onnx(traced, onnx_file):
    assert onnx_file.data is None
    assert onnx_file.size_bytes == onnx_file.path.stat().st_size
    assert onnx_file.checked.why_not is None
    assert list(onnx_file.checked.differences) == [1, 3]
    assert 0 < onnx_file.checked.worst < 1e-4
    for count in (1, 2, 5):
        found = run_onnx(onnx_file.path, images(count))
        assert len(found) == 1
        assert torch.allclose(found[0], traced.model(images(count)), atol=1e-4)
    assert os.listdir(onnx_file.path.parent) == ["small.onnx"]


def test_an_onnx_file_speaks_for_itself(onnx_file):
    import onnx

    import lambda_kernels

    found = onnx_metadata(onnx_file.path)
    assert found["removed_attention"] == [0, 2]
    assert found["residual_scale"] == 2.0
    assert found["lambda_kernels"] == lambda_kernels.__version__
    assert found["architecture"] == "vit_tiny_patch16_224"
    assert found["input"] == "images [batch, 3, 32, 32] float32"
    assert found["input_size"] == [3, 32, 32]
    assert found["mean"] == found["std"] == [0.5, 0.5, 0.5]
    assert (found["crop_pct"], found["crop_mode"], found["interpolation"]) == (0.9, "center", "bicubic")
    assert found["num_classes"] == 10
    assert "class_names" not in found  # nobody said
    model = onnx.load(onnx_file.path)
    onnx.checker.check_model(model, full_check=True)
    for value, name, sides in ((model.graph.input[0], "images", 4), (model.graph.output[0], "logits", 2)):
        assert value.name == name
        dimensions = value.type.tensor_type.shape.dim
        assert len(dimensions) == sides
        assert dimensions[0].dim_param == "batch"
        assert not any(side.dim_param for side in dimensions[1:])
    assert os.fsencode(str(REPOSITORY)) not in onnx_file.path.read_bytes()
    assert b"stack_trace" not in onnx_file.path.read_bytes()


def test_class_names():
    names = {"cat": 3, "hund": 0, "Ünïcode ☃": 9}
    listed = json.loads(trace_model(smaller(), class_names=names).metadata["class_names"])
    assert listed == ["hund", None, None, "cat", None, None, None, None, None, "Ünïcode ☃"]
    model = smaller()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": [f"class {i}" for i in range(10)]}
    assert trace_model(model).metadata["class_names"].startswith('["class 0", ')
    model.pretrained_cfg["label_names"] = ["of other classes"]
    assert "class_names" not in trace_model(model).metadata
    for wrong, message in (({"a": 10}, r"outside 0…9: \{'a': 10\}"), ({"a": 1, "b": 1}, "two names to one output")):
        with pytest.raises(ValueError, match=message):
            trace_model(model, class_names=wrong)


@torch.no_grad()
def test_external_data(one_block, tmp_path, monkeypatch):
    path = tmp_path / "large.onnx"
    monkeypatch.setattr(export, "EXTERNAL_ABOVE", 50_000)
    made = export_onnx(one_block, path)
    assert made.data is not None
    assert made.data.stat().st_size > 50_000
    assert path.stat().st_size < made.size_bytes / 2
    assert made.size_bytes == path.stat().st_size + made.data.stat().st_size
    assert torch.allclose(run_onnx(path, images())[0], one_block.model(images()), atol=1e-4)
    beside = tmp_path / "large.onnx.other.data"
    beside.write_text("somebody else's")
    # A failure leaves the old file and its data, a success takes away the data that nothing refers to any more.
    with monkeypatch.context() as patch:
        patch.setattr(export, "check_file", lambda *_: (_ for _ in ()).throw(ExportMismatchError("off")))
        with pytest.raises(ExportMismatchError):
            export_onnx(one_block, path, overwrite=True)
    assert set(tmp_path.iterdir()) == {path, made.data, beside}
    assert torch.allclose(run_onnx(path, images())[0], one_block.model(images()), atol=1e-4)
    again = export_onnx(one_block, path, overwrite=True)
    assert again.data != made.data
    assert set(tmp_path.iterdir()) == {path, again.data, beside}
    # Of killed processes nothing stays; what another one is writing does, and it is never the old file's data.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for process in (gone.pid, os.getppid()):
        (tmp_path / f"large.onnx.{process}-0123abcd.data").touch()
        (tmp_path / f".large.onnx.{process}-0123abcd.tmp").touch()
    others = {
        tmp_path / f"{name}{os.getppid()}-0123abcd.{end}"
        for name, end in ((".large.onnx.", "tmp"), ("large.onnx.", "data"))
    }
    of_a_notebook = again.data.with_name(f"large.onnx.{os.getppid()}-4567abcd.data")  # which goes on after its export
    again.data.rename(of_a_notebook)
    path.write_bytes(of_a_notebook.name.encode())
    export_onnx(one_block, path, overwrite=True, external_data=False)
    assert set(tmp_path.iterdir()) == {path, beside, *others}


@torch.no_grad()
def test_sizes_batches_and_dtypes(tmp_path):
    model = smaller()
    half = trace_model(model, image_size=48, dtype="float16", batch_size=3)
    assert half.shape == (3, 48, 48)
    assert half.metadata["input"] == "images [3, 3, 48, 48] float16"
    assert model.patch_embed.img_size == (32, 32)
    assert next(model.parameters()).dtype == torch.float32
    made = export_onnx(half, tmp_path / "half.onnx")
    assert list(made.checked.differences) == [3]
    x = images(3, 48).half()
    found = run_onnx(made.path, x)[0]
    assert found.dtype == torch.float16
    assert torch.allclose(found, half.model(x), atol=2e-2)
    with pytest.raises(Exception, match="invalid dimensions"):
        run_onnx(made.path, x[:2])
    brain = export_onnx(model, tmp_path / "brain.onnx", dtype="bfloat16", opset=23)
    assert (brain.opset, brain.checked.differences) == (23, {})
    assert brain.checked.why_not == "onnxruntime has no bfloat16 on CPUs"
    program = export_program(model, tmp_path / "brain.pt2", dtype="bfloat16")
    assert program.checked.worst < 0.1 * 5


@torch.no_grad()
def test_feature_maps(tmp_path):
    features = feature_model(convert_vit(small_vit(depth=2, patch_size=16), (0,), residual_scale=2.0), 2, rescale=True)
    made = export_onnx(features, tmp_path / "features.onnx")
    for found, expected in zip(run_onnx(made.path, images(5)), features(images(5)), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    import onnx

    assert [value.name for value in onnx.load(made.path).graph.output] == ["features_0", "features_1"]
    found = onnx_metadata(made.path)
    assert (found["feature_blocks"], found["feature_scales"]) == ([0, 1], [2.0, 2.0])
    assert (found["feature_rescaled"], found["feature_norm"]) == (True, False)
    assert "num_classes" not in found


def test_files_run_where_this_library_is_not(traced, onnx_file, tmp_path):
    program = export_program(traced, tmp_path / "small.pt2")
    assert program.checked.worst < 1e-5
    code = """
import sys, json, torch, onnxruntime
sys.modules["lambda_kernels"] = sys.modules["timm"] = None
onnx_file, program, given, results = sys.argv[1:]
x = torch.load(given)
extra = {"lambda_kernels.json": ""}
module = torch.export.load(program, extra_files=extra).module()
assert json.loads(extra["lambda_kernels.json"])["removed_attention"] == "[0, 2]"
run = onnxruntime.InferenceSession(onnx_file).run
torch.save([module(x).detach(), torch.from_numpy(run(None, {"images": x.numpy()})[0])], results)
"""
    x, given, results = images(4), tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save(x, given)
    subprocess.run([sys.executable, "-c", code, onnx_file.path, program.path, given, results], check=True)
    for found in torch.load(results):
        assert torch.allclose(found, traced.model(x).detach(), atol=1e-4)


def test_a_program_names_no_place_on_this_machine(traced, tmp_path):
    """Not the folders of this library, nor of PyTorch and timm, whose code torch.export notes with each operator."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".small.pt2.{gone.pid}-0123abcd.tmp").touch()  # of a process that was killed
    made = export_program(traced, tmp_path / "small.pt2")
    assert set(tmp_path.iterdir()) == {made.path}
    with zipfile.ZipFile(made.path) as package:
        content = b"".join(map(package.read, package.namelist()))
    assert b"aten.gelu" in content  # nothing in it is compressed twice
    assert b"stack_trace" not in content
    assert b".py" not in content


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(wrong, one_block, tmp_path, monkeypatch):
    path = tmp_path / "small.pt2"
    path.write_text("what was there")
    whole = check.open_file

    def off(*arguments: object) -> object:
        run = whole(*arguments)
        return lambda x: tuple(y + (wrong if len(y) == 3 else 0) for y in run(x))  # one batch size of the two alone

    monkeypatch.setattr(check, "open_file", off)
    with pytest.raises(
        ExportMismatchError, match=r"of 3 image\(s\) torch.export.load is off by .* Nothing was written"
    ):
        export_program(one_block, path, overwrite=True)
    assert path.read_text() == "what was there"
    with pytest.raises(ExportMismatchError, match=r"onnxruntime \S+ is off by"):
        export_onnx(one_block, tmp_path / "small.onnx")
    monkeypatch.setattr(check, "open_file", lambda *_: lambda x: (one_block.model(x), one_block.model(x)))
    with pytest.raises(
        ExportMismatchError, match=r"gives outputs of \[\[1, 10\], \[1, 10\]\], the model \[\[1, 10\]\]"
    ):
        export_program(one_block, path, overwrite=True)
    assert os.listdir(tmp_path) == ["small.pt2"]


def test_missing_packages(one_block, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingPackageError, match=rf"{package}, or pip install 'lambda-kernels\[export\]'"):
                export_onnx(one_block, tmp_path / "small.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    checked = export_onnx(one_block, tmp_path / "small.onnx").checked
    assert checked.differences == {}
    assert checked.worst is None
    assert "onnxruntime is not installed (pip install 'lambda-kernels[export]')" in checked.why_not
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and there is no g\+\+ or clang"):
        export_aoti(one_block, tmp_path / "small.pt2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="there is no no-such-compiler here"):
        export_aoti(one_block, tmp_path / "small.pt2")


def test_names_of_outputs():
    model = smaller()
    assert trace_model(model).outputs == ("logits",)
    model.reset_classifier(0)
    assert trace_model(model).outputs == ("embedding",)
    assert trace_model(feature_model(model, 1)).outputs == ("features_0",)
    with pytest.raises(ValueError, match="class_names are for classifiers"):
        trace_model(feature_model(model, 1), class_names={"cat": 0})


def test_attention_that_still_fades_is_refused(tmp_path):
    model = dilute(small_vit(), (1,))
    for lam in (1.0, 0.25, 0.0):
        set_lambda(model, lam)
        for write, name in ((export_onnx, "a.onnx"), (export_program, "a.pt2"), (export_aoti, "a.pt2")):
            with pytest.raises(UnsupportedModelError, match=r"still being diluted; call lambda_vit\.finish_dilution"):
                write(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_kernels_by_name_are_refused():
    with pytest.raises(BackendUnavailableError, match=r"blocks \[0, 1, 2, 3\] were converted with backend='triton'"):
        trace_model(small(backend="triton"))
    again = convert_vit(small(backend="triton"), (0, 2), residual_scale=2.0, backend="auto")
    assert trace_model(again).outputs == ("logits",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be .* got 0"),
        ({"batch_size": True}, "batch_size must be .* got True"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16; got 'int8'"),
        ({"image_size": 20}, "image_size=20 is no multiple of the model's patches of 8×8 pixels"),
        ({"image_size": 0}, "image_size must be an integer of at least 1; got 0"),
        ({"image_size": 64.0}, r"image_size must be an integer of at least 1; got 64\.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        trace_model(small(), **options)


def test_wrong_models(traced, tmp_path):
    with pytest.raises(ValueError, match="pass dtype='float32'"):
        trace_model(small().double())
    mixed = small()
    mixed.norm.half()
    with pytest.raises(ValueError, match="mixes dtypes"):
        trace_model(mixed)
    assert trace_model(mixed, dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="on the meta device"):
        trace_model(small().to("meta"))
    with pytest.raises(UnsupportedModelError, match=r"DataParallel wraps the model"):
        trace_model(nn.DataParallel(small()))
    with pytest.raises(ValueError, match="dtype: a model that is traced already"):
        export_program(traced, tmp_path / "a.pt2", dtype="float16")
    for opset in (17, 24, True, "20"):
        with pytest.raises(ValueError, match=f"opset must lie between 18 and 23, what PyTorch writes; got {opset!r}"):
            export_onnx(traced, tmp_path / "a.onnx", opset=opset)


def test_overflow_is_told_before_anything_is_written():
    model = smaller()
    with torch.no_grad():
        model.head.bias.fill_(1e6)  # float16 ends at 65504
    with pytest.raises(NonFiniteActivationError, match=r"NaN or infinity in float16.*Export it in bfloat16 or float32"):
        trace_model(model, dtype="float16")
    assert trace_model(model, dtype="bfloat16").dtype == torch.bfloat16


@torch.no_grad()
def test_surroundings_leave_no_trace(one_block, tmp_path):
    """Of autocast and gradients around the call nothing is in the program, nor in what is compared."""
    model, expected = one_block.model, operators(one_block.program)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        found = trace_model(model)
        assert export_onnx(found, tmp_path / "m.onnx").checked.worst < 1e-4
    assert operators(found.program) == expected
    assert torch.allclose(found.program.module()(images()), model(images()), atol=1e-5)


@torch.library.custom_op("export_tests::shifted", mutates_args=())
def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@shifted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_operators_of_other_libraries_are_refused():
    model = small()
    model.head = nn.Sequential(model.head)
    model.head.register_forward_hook(lambda module, args, out: shifted(out))
    with pytest.raises(ValueError, match=r"the model calls export_tests\.shifted\.default"):
        trace_model(model)


def test_wrong_files(traced, tmp_path):
    for write, name, message in (
        (export_onnx, "a.pt2", r"of the form onnx ends in \.onnx; got .*a\.pt2"),
        (export_program, "a.pt", r"of the form torch-export ends in \.pt2"),
        (export_aoti, "a", r"of the form aoti ends in \.pt2"),
    ):
        with pytest.raises(ValueError, match=message):
            write(traced, tmp_path / name)
    (tmp_path / "there.onnx").write_text("kept")
    with pytest.raises(FileExistsError, match="is there already"):
        export_onnx(traced, tmp_path / "there.onnx")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_program(traced, tmp_path / "folder.pt2", overwrite=True)
    with pytest.raises(OSError, match="cannot write to"):
        export_program(traced, Path("/proc/none/a.pt2"))
    assert (tmp_path / "there.onnx").read_text() == "kept"
    assert export_program(traced, tmp_path / "new" / "folder" / "a.pt2").path.is_file()


def test_latency(traced, onnx_file):
    times = export_check_write.measure_latency(traced, {"onnx": onnx_file}, seconds=0.1)
    assert list(times) == ["eager", "onnx"]
    assert all(list(batches) == [1, 8] for batches in times.values())
    assert all(isinstance(taken, Latency) and taken.median_ms > 0 for by in times.values() for taken in by.values())


@torch.no_grad()
def test_the_real_model(deit_tiny, tmp_path):
    with pytest.warns(UserWarning, match="last 1 block"):
        model = convert_vit(deit_tiny, (1, 4, 5, 11))
    made = export_onnx(model, tmp_path / "deit.onnx")
    assert made.checked.worst < 1e-4
    x = images(2, 224)
    assert (run_onnx(made.path, x)[0] - model(x)).abs().max() < 1e-4
    assert onnx_metadata(made.path)["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.slow
@torch.no_grad()
def test_aoti(traced, tmp_path):
    try:
        export.require_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    from torch._inductor import aoti_load_package

    made = export_aoti(traced, tmp_path / "small.pt2")
    assert made.checked.worst < 1e-4
    assert os.listdir(tmp_path) == ["small.pt2"]
    package = aoti_load_package(str(made.path))
    for count in (1, 5):
        assert torch.allclose(package(images(count)), traced.model(images(count)), atol=1e-4)
    assert package.get_metadata()["removed_attention"] == "[0, 2]"
    times = export_check_write.measure_latency(traced, {"aoti": made}, seconds=0.1)
    assert list(times) == ["eager", "aoti"]
