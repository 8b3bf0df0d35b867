"""GPUs that are old, broken or Apple's, and several at once: what can be held to without one, by patched properties."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import command, records, same_runs
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import train
from plumbing import devices, options, runs
from plumbing.devices import Processes, make_precision
from plumbing.files import InputError
from teacher import resnet8

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------ which device


@pytest.fixture
def computer(monkeypatch):
    """A computer with the GPUs that a test gives it; trying one out raises what the test says."""
    has = SimpleNamespace(cuda=False, mps=False, fails={})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has.cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has.mps)

    def try_out(name):
        if name in has.fails:
            raise RuntimeError(has.fails[name])
        return torch.device(name)

    monkeypatch.setattr(devices, "try_out", try_out)
    return has


def test_auto_takes_cuda_then_apples_gpu_then_the_cpu(computer):
    assert devices.open_device("auto") == (CPU, "no GPU was found")
    computer.mps = True
    assert devices.open_device("auto") == (torch.device("mps"), "a GPU was found")
    computer.cuda = True
    assert devices.open_device("auto") == (torch.device("cuda"), "a GPU was found")


@pytest.mark.parametrize(
    "reason", ["CUDA error: no kernel image is available", "CUDA error: all CUDA-capable devices are busy"]
)
def test_a_gpu_that_does_not_compute_is_left_alone_by_auto_and_refused_by_name(computer, reason):
    """V100, P100 and GTX 10 with PyPI's build are seen and cannot be used."""
    computer.cuda, computer.fails = True, {"cuda": f"{reason}\nCompile with TORCH_USE_CUDA_DSA ..."}
    device, why = devices.open_device("auto")
    assert device == CPU and reason in why and "pytorch.org/get-started" in why and "\n" not in why
    with pytest.raises(InputError, match=f"{reason}.*pytorch.org/get-started"):
        devices.open_device("cuda")


def test_trying_a_device_out_computes_on_it(monkeypatch):
    """Allocating memory alone does not fail on a GPU that has no kernels."""
    summed = []
    original = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda tensor: summed.append(1) or original(tensor))
    assert devices.try_out("cpu") == CPU and summed


def test_windows_users_are_told_where_pytorch_for_their_gpu_is(computer, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "for CPUs only; for an NVIDIA GPU see pytorch.org/get-started" in devices.open_device("auto")[1]


def test_printed_commands_can_be_pasted_on_windows(monkeypatch):
    assert runs.quoted(["python", "train.py", "--out", "my run"]) == "python train.py --out 'my run'"
    monkeypatch.setattr(runs.os, "name", "nt")
    assert runs.quoted(["python", "train.py", "--out", "my run"]) == 'python train.py --out "my run"'


def test_a_clock_waits_for_gpus_only(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for kind in ("cpu", "cuda", "mps"):
        devices.synchronize(torch.device(kind))
    assert waited == [torch.device("cuda"), torch.device("mps")]


def test_cnns_lie_channels_last_except_on_apples_gpus(monkeypatch):
    """There, BatchNorm's backward was wrong for them up to torch 2.13, and they were slow."""
    asked = []
    monkeypatch.setattr(nn.Module, "to", lambda network, *args, **options: asked.append(options) or network)
    for kind in ("cpu", "cuda", "mps"):
        devices.to_device(resnet8(10), torch.device(kind))
    assert asked == [{"memory_format": torch.channels_last}] * 2 + [{}]


# --------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "capability, amp, dtype",
    [
        ((7, 5), None, torch.float16),  # T4, RTX 20
        ((8, 0), None, torch.bfloat16),  # A100
        ((9, 0), None, torch.bfloat16),  # H100
        ((7, 5), False, torch.float32),
        ((9, 0), False, torch.float32),
    ],
)
def test_precision_follows_what_the_gpu_can_do(monkeypatch, capability, amp, dtype):
    """bfloat16 is emulated below compute capability 8.0; only float16's gradients are scaled."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(devices, "open_device", lambda name: (torch.device("cuda"), "a GPU was found"))
    matmul = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", matmul.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    _, precision, words = devices.pick_device("auto", amp)
    assert torch.backends.cudnn.benchmark
    assert precision.scaler.is_enabled() == (dtype == torch.float16)
    assert precision.autocast._enabled == (dtype != torch.float32)
    assert matmul == (["high"] if dtype == torch.float32 else [])
    if dtype != torch.float32:
        assert precision.autocast.fast_dtype == dtype and str(dtype).removeprefix("torch.") in words
    assert ("this GPU has no bfloat16" in words) == (dtype == torch.float16)


class Shallow(nn.Module):
    """A network of one layer, whose gradients a test can make overflow."""

    def __init__(self, weight):
        super().__init__()
        self.fc = nn.Linear(12, 3)
        nn.init.constant_(self.fc.weight, weight)

    def forward(self, images):
        return self.fc(images.flatten(1)), []


def test_float16_training_skips_a_step_that_overflows_and_goes_on_with_a_lower_scale():
    """On the CPU, with torch's own GradScaler: the weights stay, the scale halves, the next steps train."""
    precision = make_precision(CPU, torch.float16)
    model = Shallow(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler, labels = LambdaLR(optimizer, lambda step: 1.0), torch.tensor([0, 1])
    huge, small = torch.full((2, 3, 2, 2), 6e4), torch.randn(2, 3, 2, 2)
    before, scale = model.fc.weight.clone(), precision.scaler.get_scale()
    train.train_epoch(model, None, None, optimizer, scheduler, [(huge, labels)], 0.0, precision)
    assert torch.equal(model.fc.weight, before) and precision.scaler.get_scale() == scale / 2
    train.train_epoch(model, None, None, optimizer, scheduler, [(small, labels)] * 3, 0.0, precision)
    assert not torch.equal(model.fc.weight, before) and model.fc.weight.isfinite().all()


def test_float16_gradients_are_those_of_float32_within_its_precision():
    """Scaling is undone before the update: 2% of the step that float32 takes."""
    images, labels, ends = torch.randn(8, 3, 2, 2), torch.arange(8) % 3, []
    for dtype in (torch.float32, torch.float16):
        model = Shallow(0.1)
        nn.init.zeros_(model.fc.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
        train.train_epoch(
            model, None, None, optimizer, scheduler, [(images, labels)] * 5, 0.0, make_precision(CPU, dtype)
        )
        ends.append(model.fc.weight.detach())
    assert (ends[0] - ends[1]).norm() < 0.02 * (ends[0] - 0.1).norm()


def test_a_run_in_float16_resumes_bit_for_bit_its_scale_included(small_glyphs, monkeypatch):
    pick = devices.pick_device
    half = lambda name, amp: (CPU, make_precision(CPU, torch.float16), "float16")  # noqa: E731
    monkeypatch.setattr(train, "pick_device", lambda name, amp: (pick(name, amp), half(name, amp))[1])
    small = ("--schedule", "none", "--epochs", 2, "--batch-size", 160, "--image-size", 8)
    command(monkeypatch, *small, "--out", "whole")
    evaluate, calls = train.evaluate, []

    def interrupted(*args, **rest):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **rest)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(SystemExit):
        command(monkeypatch, *small, "--out", "parts")
    monkeypatch.setattr(train, "evaluate", evaluate)
    command(monkeypatch, *small, "--out", "parts", "--resume")
    assert same_runs("whole", "parts") and len(records("parts")[1]) == 2
    assert runs.load_checkpoint("whole/last.pt")["scaler"]["_growth_tracker"] == 4  # two steps an epoch


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)\nlong advice"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
    ],
)
def test_full_memory_ends_with_one_line_on_every_device(error):
    def program():
        raise error

    with pytest.raises(SystemExit, match="^error: out of memory .*smaller --batch-size") as stop:
        options.command_line(program)
    assert "\n" not in str(stop.value)


# ----------------------------------------------------------------------------------------------- several


def test_the_second_process_touches_nothing_until_the_first_has_data_and_teacher(small_glyphs, monkeypatch):
    """Whatever the backend does at its start, and NCCL's does not wait: the order is made by a barrier."""

    class Waits(Exception):
        pass

    def barrier():
        raise Waits

    monkeypatch.setattr(devices.dist, "barrier", barrier)
    for touched in ("load", "trained_teacher"):
        monkeypatch.setattr(train, touched, lambda *args: pytest.fail("did not wait"))
    with pytest.raises(Waits):
        train.run(train.parse([]), Processes(1, 2))
    assert not list(small_glyphs.iterdir())


def test_the_first_process_calls_the_others_once_data_and_teacher_are_there(small_glyphs, monkeypatch):
    class Called(Exception):
        pass

    def barrier():
        raise Called

    monkeypatch.setattr(devices.dist, "barrier", barrier)
    with pytest.raises(Called):
        train.run(train.parse([]), Processes(0, 2))
    assert runs.is_finished(small_glyphs / "runs/glyphs-resnet8-seed0/last.pt")


def test_processes_meet_before_anything_is_fetched_or_trained(small_glyphs, monkeypatch):
    met = []
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(devices.dist, "init_process_group", lambda *args, **rest: met.append(args))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which the second process replaces
    monkeypatch.setattr(train, "run", lambda args, processes: met.append(processes) or sys.exit(0))
    with pytest.raises(SystemExit):
        command(monkeypatch, "--schedule", "none", "--device", "cpu")
    assert met == [("gloo",), Processes(1, 2)]


def test_a_compiled_run_may_go_on_without_compiling(small_glyphs, monkeypatch):
    """Where compilation fails on another machine, the message says --no-compile."""
    monkeypatch.setattr(torch, "compile", lambda network, mode: network)
    run = ("--model", "resnet8", "--epochs", 2, "--out", "run")
    command(monkeypatch, *run, "--compile")
    command(monkeypatch, *run, "--no-compile", "--resume")
    assert records("run")[0]["precision"].endswith("; torch.compile (as asked)")  # as it was begun
