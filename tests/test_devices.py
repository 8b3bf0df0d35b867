"""Devices, precision and compilation, as far as a CPU can tell; and what only a GPU can, where there is one."""

import ctypes
import functools
import pickle
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import command, easy_cache, few_glyphs, records
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import train
from augment import batches
from data import Data
from guidance import Guidance
from model import VisionTransformer, deit_mini
from plumbing import devices, usual
from plumbing.devices import Processes, join_processes, make_precision, pick_compile, pick_device
from plumbing.files import InputError
from teacher import ResNet

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------ what is chosen


def test_the_device_and_its_precision_are_chosen_with_their_reasons():
    device, precision, words = pick_device("cpu", None)
    assert device == CPU and words == "cpu (as asked); float32 (the default on this device)"
    with precision.autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    _, precision, words = pick_device("cpu", True)
    assert words == "cpu (as asked); bfloat16 (as asked)"
    with precision.autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not precision.scaler.is_enabled()  # bfloat16 has float32's range


@pytest.mark.parametrize(
    "name, reason", [("meta", "it is not cpu, cuda or mps"), ("cuda:99", ""), ("toaster", "")]
)
def test_a_device_that_does_not_work_is_refused_with_its_reason(name, reason):
    with pytest.raises(InputError, match=rf"--device {name} does not work here \({reason}.*\); leave it out"):
        pick_device(name, None)


def test_compilation_is_the_default_only_in_long_runs_on_a_gpu_and_can_be_forced(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: name == "triton")
    cuda = torch.device("cuda")
    for asked, device, steps, expected in (
        (None, CPU, 10**6, False),
        (None, cuda, 10**6, True),
        (None, cuda, 100, False),
        (True, CPU, 1, True),
        (False, cuda, 10**6, False),
    ):
        assert pick_compile(asked, device, steps)[0] is expected
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert not pick_compile(None, cuda, 10**6)[0]


def test_memory_is_kept_only_where_the_c_library_can(monkeypatch):
    """Elsewhere nothing is called: Windows has no CDLL(None), other C libraries have no mallopt."""
    called = []
    library = SimpleNamespace(mallopt=lambda *setting: called.append(setting))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "linux")
    devices.keep_freed_memory()
    assert called == [(-4, 0), (-1, 2**31 - 1)]
    del library.mallopt
    devices.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    devices.keep_freed_memory()


# ------------------------------------------------------------------------------------------- whole runs


def test_a_compiled_run_and_one_in_bfloat16_end_near_the_plain_one(monkeypatch):
    """--amp and --compile through a whole run; what inductor makes of it has a test of its own below."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    easy_cache(Path("data/cifar10.npz"))
    small = ("--dataset", "cifar10", "--model", "deit_mini", "--image-size", 32, "--patch-size", 8)
    losses = {}
    for flag in ("--no-amp", "--amp", "--compile"):
        run = f"--schedule none --epochs 2 --batch-size 16 --lr 3e-3 {flag} --out run{flag}".split()
        command(monkeypatch, *small, *run)
        losses[flag] = [line["loss_cls"] for line in records(f"run{flag}")[1]]
    plain = losses["--no-amp"]
    assert plain[-1] < 0.97 * plain[0]  # it learns
    assert losses["--amp"] == pytest.approx(plain, rel=0.03) and losses["--amp"] != plain
    assert losses["--compile"] == pytest.approx(plain, rel=0.01)


def test_a_failed_compilation_ends_with_one_line(small_glyphs, monkeypatch):
    def no_backend(graph, inputs):
        raise RuntimeError("no C++ compiler")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=no_backend))
    with pytest.raises(SystemExit, match="^error: torch.compile failed .*; try again with --no-compile$"):
        command(monkeypatch, "--model", "resnet8", "--epochs", 1, "--compile")


# --------------------------------------------------------------------------------------------- processes


def test_one_process_alone_sums_and_averages_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join_processes(train.parse([]))
    assert alone == Processes(0, 1) and alone.mean([1.0, 2.0], CPU) == [1.0, 2.0]
    assert alone.sum(torch.ones(2)).tolist() == [1, 1]
    networks = [nn.Linear(1, 1) for _ in range(3)]
    assert alone.wrap(*networks, False, make_precision(CPU, torch.float32)) == tuple(networks)


@pytest.mark.parametrize(
    "argv, environment, message",
    [
        (["--model", "resnet8"], {}, "resnet8 trains in one process, .*: use python"),
        (["--batch-size", "5"], {}, "2 processes cannot share batches of 5: choose a multiple of 2"),
        (["--device", "cuda"], dict(LOCAL_RANK="99"), "process 99 has no GPU: there are .*--device cpu"),
        (["--device", "cpu"], {}, "cannot find each other .*start with torchrun"),
    ],
)
def test_processes_that_cannot_run_together_say_why(monkeypatch, argv, environment, message):
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (dict(RANK="0", WORLD_SIZE="2") | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        join_processes(train.parse(argv))


def test_the_usual_pipeline_can_start_its_workers_without_fork():
    """As on Windows and macOS: what they get is pickled, and makes batches there."""
    pytest.importorskip("timm", reason="timm is not installed; .ci/run installs it")
    x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    loader = usual.batches(Data(x, torch.arange(8), x, torch.arange(8), 8), 4, 32, 1)
    pairs, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    images, labels = collate(pairs)
    assert images.shape == (8, 3, 32, 32) and labels.tolist() == [*range(8)]
    assert loader.multiprocessing_context is None  # the platform's own


# -------------------------------------------------------------------------------------------- the fast path


def calibrate(cnn, images):
    """Gives the BatchNorms the statistics of these images, as training would."""
    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    cnn.train()(images)
    return cnn.eval().requires_grad_(False)


def small_training(device, fast, depth=3):
    """The arguments of train_epoch but for the batches, from fixed seeds: plain, or as a run has them. Student and
    teacher have `depth` blocks, all guided."""
    torch.manual_seed(0)
    student = VisionTransformer(10, 32, 8, 48, depth, 3, range(depth), drop_path=0.0).to(device)
    teacher = ResNet(10, (1,) * depth, (16, 32, 64)[:depth], small=True)
    teacher = calibrate(teacher, torch.randn(16, 3, 32, 32))
    teacher = devices.to_device(teacher, device) if fast else teacher.to(device)
    guidance = Guidance(student.feature_channels, teacher.feature_channels).to(device)
    optimizer = train.make_optimizer(student, guidance, 1e-3, fused=fast)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    return SimpleNamespace(
        student=student, teacher=teacher, guidance=guidance, optimizer=optimizer, scheduler=scheduler
    )


def glyph_batches(device):
    """An epoch of 25 augmented batches."""
    x, y, _, _ = (torch.from_numpy(array) for array in few_glyphs())
    x = x.permute(0, 3, 1, 2).repeat(2, 1, 1, 1)[:400].contiguous().to(device)
    return batches(x, y.repeat(2)[:400].to(device), 16, 32, torch.Generator().manual_seed(0))


def fifty_steps(dtype=torch.float32, fast=True, compiled=False, device=CPU, depth=3):
    """(50, 2): cross-entropy and guidance loss at each step, of 25 with guidance and 25 without; and how many
    graphs had been compiled after each half."""
    given = small_training(device, fast, depth)
    precision = make_precision(device, dtype)
    networks = Processes().wrap(given.student, given.teacher, given.guidance, compiled, precision)
    curve, graphs = [], []
    for beta in (2.5, 0.0):
        for batch in glyph_batches(device):
            losses = train.train_epoch(*networks, given.optimizer, given.scheduler, [batch], beta, precision)
            curve.append(losses[:2])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return torch.tensor(curve), graphs


def test_the_fast_path_agrees_with_plain_float32_step_by_step():
    """The fused optimiser and channels_last within 1e-4 of plain float32, bfloat16 within 2%."""
    plain, _ = fifty_steps(fast=False)
    assert plain[20:25, 1].mean() < 0.95 * plain[:5, 1].mean()  # it learns
    assert (plain[:25, 1] > 0).all() and (plain[25:, 1] == 0).all()
    torch.testing.assert_close(fifty_steps()[0], plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fifty_steps(torch.bfloat16)[0], plain, rtol=0.02, atol=1e-3)


class Shifted(nn.Module):
    """Adds a constant, which is no buffer, between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.first(x) + torch.ones(4))


def test_in_low_precision_the_stream_is_low_and_weights_and_gradients_are_float32():
    """The parameters stay where they are, by their names; every gradient is within 15% of float32's."""
    torch.manual_seed(0)
    network, images = deit_mini(10), torch.randn(4, 3, 32, 32)
    nn.init.normal_(network.head.weight, std=0.1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        student, _, _ = Processes().wrap(network, None, None, False, make_precision(CPU, dtype))
        logits, features = student(images)
        assert {tensor.dtype for tensor in (logits, *features)} == {dtype}
        network.zero_grad()
        (logits.float().square().mean() + sum(maps.float().square().mean() for maps in features)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    for name, expected in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert (gradients[1][name] - expected).norm() <= 0.15 * expected.norm(), name


def test_in_low_precision_the_frozen_teacher_is_cast_once_and_other_networks_and_float16_are_left_to_autocast():
    """BatchNorm wants its statistics in float32, and a residual stream in float16 might overflow. Of a user's own
    transformer nothing is known: this one has a constant in float32."""
    student, teacher, cnn = (
        deit_mini(10),
        ResNet(10, (1,), (4,), small=True),
        ResNet(10, (1,), (4,), small=True),
    )
    wrapped = Processes().wrap(student, teacher, None, False, make_precision(CPU, torch.float16))
    assert wrapped == (student, teacher, None) and {p.dtype for p in teacher.parameters()} == {torch.float16}
    bfloat16 = make_precision(CPU, torch.bfloat16)
    assert Processes().wrap(cnn, None, None, False, bfloat16) == (cnn, None, None)
    own, _, _ = Processes().wrap(Shifted(), None, None, False, bfloat16)
    with bfloat16.autocast:
        assert own(torch.zeros(2, 4)).dtype == torch.bfloat16


def test_compiled_networks_are_replayed_as_cuda_graphs_only_where_that_was_tried(monkeypatch):
    """Our networks in bfloat16 on one GPU; not a user's own, in float16 or in several processes."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: modes.append(mode))
    monkeypatch.setattr(devices, "DistributedDataParallel", lambda network: network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be no GPU here
        cuda, half = (make_precision(torch.device("cuda"), d) for d in (torch.bfloat16, torch.float16))
    cnn = ResNet(10, (1,), (4,), small=True)
    Processes().wrap(deit_mini(10), cnn, None, True, cuda)
    Processes().wrap(cnn, None, None, True, cuda)
    assert modes == 3 * ["reduce-overhead"]
    for network, precision, count in (
        (deit_mini(10), make_precision(CPU, torch.bfloat16), 1),
        (deit_mini(10), cuda, 2),
        (deit_mini(10), half, 1),
        (Shifted(), cuda, 1),
    ):
        Processes(0, count).wrap(network, None, None, True, precision)
    assert modes[3:] == 4 * ["default"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_compiled_training_agrees_with_plain_float32_step_by_step_and_is_compiled_once(dtype, within):
    """Networks of one block, as compiling takes long. Nothing is compiled again when beta reaches 0."""
    plain, _ = fifty_steps(fast=False, depth=1)
    assert plain[20:25, 1].mean() < 0.95 * plain[:5, 1].mean()  # it learns
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = fifty_steps(dtype, compiled=True, depth=1)
    assert graphs == [3, 3]  # student, teacher, guidance
    torch.testing.assert_close(compiled, plain, rtol=within, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_an_epoch_waits_for_the_device_once_and_agrees_with_the_cpu():
    """torch's own check finds one synchronisation in an epoch: reading its mean losses at the end. The loss curve
    in float32 is the CPU's within 1%, compiled bfloat16's within 3%."""
    gpu = torch.device("cuda")
    given, precision = small_training(gpu, fast=True), make_precision(gpu, torch.bfloat16)
    networks = Processes().wrap(given.student, given.teacher, given.guidance, False, precision)
    for _ in range(2):  # the first time things are set up
        epoch = glyph_batches(gpu)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                train.train_epoch(*networks, given.optimizer, given.scheduler, epoch, 2.5, precision)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]
    on_cpu, _ = fifty_steps(fast=False)
    torch.testing.assert_close(fifty_steps(device=gpu)[0], on_cpu, rtol=0.01, atol=0.01)
    bfloat16, _ = fifty_steps(torch.bfloat16, compiled=True, device=gpu)
    torch.testing.assert_close(bfloat16, on_cpu, rtol=0.03, atol=0.01)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_every_replay_of_a_graph_drops_other_paths():
    gpu = torch.device("cuda")
    network = deit_mini(10, drop_path=0.5).to(gpu).train()
    torch.nn.init.normal_(network.head.weight)
    student, _, _ = Processes().wrap(network, None, None, True, make_precision(gpu, torch.bfloat16))
    images = torch.randn(64, 3, 32, 32, device=gpu)
    for _ in range(4):  # set up, recorded, replayed
        logits = student(images)[0].clone()
    again = student(images)[0].clone()
    differ = (logits != again).any(dim=1).float().mean().item()
    assert differ > 0.5 and torch.isfinite(again).all()
