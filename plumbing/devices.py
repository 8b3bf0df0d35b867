"""The device and its precision, compilation, and several processes that share a run."""

import ctypes
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from model import VisionTransformer
from plumbing.files import InputError
from teacher import CNNS, ResNet

SELECTOR = "pytorch.org/get-started/locally"


class Precision(NamedTuple):
    """PyTorch's idiom of mixed precision; in float32 neither autocast nor scaler does anything."""

    dtype: torch.dtype
    autocast: torch.autocast
    scaler: torch.amp.GradScaler


def make_precision(device, dtype):
    """dtype: torch.bfloat16, torch.float16 or torch.float32; only float16 needs its gradients scaled."""
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return Precision(dtype, autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))


def pick_device(name, amp):
    """Chooses where and how to compute. On a CPU, the process keeps freed memory from then on.

    Args:
        name: auto, cpu, cuda, cuda:1 or mps.
        amp: True, False or None, to be decided here.

    Returns:
        The device, the `Precision`, and both with their reasons in words.
    """
    device, why = open_device(name)
    dtype, why_dtype = pick_dtype(device, amp)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # sizes are fixed, so cuDNN tries its convolutions once
    if device.type == "cuda" and dtype == torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32: the matrix units round, sums stay in float32
    words = f"{device} ({why}); {str(dtype).removeprefix('torch.')} ({why_dtype})"
    return device, make_precision(device, dtype), words


def open_device(name):
    """The device of that name, tried out, and why it was taken; for "auto" the first one that works."""
    if name != "auto":
        try:
            return try_out(name), "as asked"
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"--device {name} does not work here ({first_line(error)}); leave it out, or choose a "
                f"PyTorch for your GPU by the selector at {SELECTOR}"
            ) from error
    for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if there:
            try:
                return try_out(kind), "a GPU was found"
            except RuntimeError as error:  # too old for this PyTorch, in use by another program, or broken
                return torch.device("cpu"), (
                    f"the GPU does not work: {first_line(error)}; the selector at {SELECTOR} "
                    "may have a PyTorch for it"
                )
    if sys.platform == "win32" and not torch.version.cuda:  # what pip installs there by default
        return torch.device("cpu"), f"this PyTorch is for CPUs only; for an NVIDIA GPU see {SELECTOR}"
    return torch.device("cpu"), "no GPU was found"


def try_out(name):
    """The device, after a sum on it: one that is too old for this PyTorch is seen, but computes nothing."""
    device = torch.ones(2, device=name).device
    if device.type not in ("cpu", "cuda", "mps"):
        raise RuntimeError("it is not cpu, cuda or mps")
    torch.ones(2, device=device).sum().item()
    return device


def pick_dtype(device, amp):
    """The precision of matrix products, and why. Without bfloat16 units (compute capability 8.0) a GPU emulates
    bfloat16, slowly; what it has is float16, whose gradients need scaling."""
    why = "the default on this device" if amp is None else "as asked"
    if not (device.type == "cuda" if amp is None else amp):
        return torch.float32, why
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16, f"{why}; this GPU has no bfloat16"
    return torch.bfloat16, why


def first_line(error):
    """What an error says, without the advice and the stack below it."""
    return (str(error) or type(error).__name__).splitlines()[0]


def keep_freed_memory():
    """Makes Linux' C library keep freed memory. By default it hands the memory of large tensors back to the
    system, which zeroes it page by page for the next one: a quarter of the time of augmentation at 224 px."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # some have another C library
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def to_device(network, device):
    """Moves a network. Convolutions are faster where the channels of a pixel lie side by side; on Apple's GPUs they
    were slower, and BatchNorm's gradients wrong, up to torch 2.13 (pytorch issues 193349, 175189, 181411)."""
    if isinstance(network, ResNet) and device.type != "mps":
        return network.to(device, memory_format=torch.channels_last)
    return network.to(device)


def synchronize(device):
    """Waits until a GPU has done what it was given, so that a clock shows what that took."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pick_compile(asked, device, steps):
    """Whether to compile (asked: True, False or None), and the reason in words. On an H200 it took up to 46 s and saved
    9 ms a step, so it pays in long runs only."""
    if asked is not None:
        return asked, f"{'torch.compile' if asked else 'eager'} (as asked)"
    if device.type != "cuda" or steps < 10_000 or not find_spec("triton"):
        return False, "eager (the default on a CPU, in a short run and without triton)"
    return True, "torch.compile (the default in a long run on a CUDA GPU)"


class InLowPrecision(nn.Module):
    """A network that computes in a low precision throughout, its residual stream and norms included; its own
    parameters stay in float32. They are cast all at once, as are their gradients: autocast casts them one by one, and
    the stream back and forth at every norm: 36% of a step's kernel launches and 23% of its bytes, as counted."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images):
        names, parameters = zip(*self.network.named_parameters())
        flat = torch.cat([p.flatten() for p in parameters]).to(self.dtype)
        parts = flat.split([p.numel() for p in parameters])
        low = {name: part.view_as(p) for name, part, p in zip(names, parts, parameters)}
        with torch.autocast(images.device.type, enabled=False):
            return functional_call(self.network, low, (images.to(self.dtype),))


class Processes(NamedTuple):
    """The processes that share one run, each working on its part of every batch; this is number `rank`."""

    rank: int = 0
    count: int = 1

    @contextmanager
    def first_one_first(self):
        """The first process does what follows before the others do: it fetches data and trains the teacher,
        alone, as a CNN's BatchNorm wants whole batches; then they find both."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.count > 1:
            dist.barrier()

    def sum(self, tensor):
        """The sum of the processes' tensors."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, numbers, device):
        """The means of the processes' numbers."""
        if self.count == 1:
            return numbers
        return (self.sum(torch.tensor(numbers, device=device)) / self.count).tolist()

    def wrap(self, student, teacher, guidance, compiled, precision):
        """The networks as they are trained: in the precision chosen, compiled if so chosen, and with gradients that
        are averaged over the processes, so that every step is that of the whole batch."""
        # A stream in float16 might overflow, and other networks may rely on autocast: for BatchNorm's statistics,
        # a softmax of their own, constants in float32
        if precision.dtype == torch.bfloat16 and isinstance(student, VisionTransformer):
            student = InLowPrecision(student, precision.dtype)
        teacher = teacher and teacher.to(precision.dtype)  # it is frozen: cast once, not at every step
        if compiled:
            # As CUDA graphs where that was tried, as a host launches kernels more slowly than a large GPU runs them.
            # A user's own network may keep a tensor from one step to the next, which graphs do not allow
            ours = isinstance(student, (InLowPrecision, ResNet)) and precision.dtype == torch.bfloat16
            graphs = ours and precision.autocast.device == "cuda" and self.count == 1
            mode, networks = "reduce-overhead" if graphs else "default", (student, teacher, guidance)
            student, teacher, guidance = (net and torch.compile(net, mode=mode) for net in networks)
        if self.count > 1:
            student, guidance = (net and DistributedDataParallel(net) for net in (student, guidance))
        return student, teacher, guidance

    def leave(self):
        """Leaves the group that they form."""
        if self.count > 1:
            dist.destroy_process_group()


def join_processes(args):
    """Joins the processes that torchrun has started for one run, before any of them does anything.

    Only the first one prints.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Processes()
    if args.model in CNNS:
        raise InputError(f"{args.model} trains in one process, as BatchNorm wants whole batches: use python")
    if args.batch_size % count:
        raise InputError(
            f"{count} processes cannot share batches of {args.batch_size}: choose a multiple of {count}"
        )
    cuda = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    args.device, local = "cuda" if cuda else "cpu", int(os.environ.get("LOCAL_RANK", rank))
    if cuda:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} has no GPU: there are {torch.cuda.device_count()}; choose a "
                "lower --nproc_per_node, or --device cpu"
            )
        torch.cuda.set_device(local)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=30))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes cannot find each other ({error}); start with torchrun") from error
    return Processes(rank, count)
