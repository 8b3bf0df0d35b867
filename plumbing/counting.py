"""What a step costs on a GPU, counted without one: kernel launches, bytes read and written, operations.

Networks and images lie on torch's meta device, which knows shapes but no values and stands for the GPU; a `Counter`
sees every operation that PyTorch dispatches to it, eagerly. What the meta device lacks is put in its place:
CUDA's autocast as explicit casts, and attention as the single (flash) kernel that it is on a GPU. A few operations,
such as a norm's backward or a fused optimiser's update of many tensors, count as one launch and are several.
"""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import augment

META = torch.device("meta")
NARROW = (F.linear, F.conv2d, F.scaled_dot_product_attention)  # cast to the low precision by CUDA's autocast
WIDE = (F.layer_norm, F.cross_entropy, F.mse_loss)  # and to float32, of all that these networks call
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.index_copy_)


class Counter(TorchDispatchMode):
    """Counts what happens on the meta device while it is entered."""

    launches = bytes = flops = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        if any(t.is_meta for t in given) and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape)  # the host reads a result
        result = operation(*args, **kwargs)
        if any(t.is_meta for t in [*given, *tensors(result)]) and starts_a_kernel(operation, given, result):
            self.launches += 1
            self.bytes += traffic(operation, args, kwargs, result)
            if operation.overloadpacket in flop_registry:
                self.flops += flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result)
        return result

    def read(self):
        """The counts so far, by name."""
        return dict(launches=self.launches, bytes=self.bytes, flops=self.flops)


def tensors(tree):
    """The tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def starts_a_kernel(operation, given, result):
    """False for views, which only look at memory in another way, and for memory that is reserved and not filled."""
    memory = {t.untyped_storage()._cdata for t in given}
    fresh = [t for t in tensors(result) if t.untyped_storage()._cdata not in memory]
    return operation._schema.is_mutable or bool(fresh) and "empty" not in operation._schema.name


def traffic(operation, args, kwargs, result):
    """Bytes that an operation reads and writes: its arguments and its results, once each."""
    if operation.overloadpacket in INDEXING:  # of a whole tensor, only what the indices choose
        moved = args[3] if operation.overloadpacket is torch.ops.aten.index_copy_ else result
        return 2 * size(moved) + sum(map(size, tensors(args[1:3])))
    read = tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
    in_place = [
        a for a, of in zip(args, operation._schema.arguments) if of.alias_info and of.alias_info.is_write
    ]
    return sum(map(size, read + (tensors(in_place) or tensors(result))))


def size(tensor):
    """Bytes in memory; what is only expanded lies there once."""
    sides = [side for side, stride in zip(tensor.shape, tensor.stride()) if stride]
    return torch.Size(sides).numel() * tensor.element_size()


class Autocast:
    """Stands for torch.autocast: notes the precision that is asked for, for `OnGPU` to cast to."""

    now = None

    def __init__(self, device_type, dtype=None, enabled=True):
        self.fast_dtype, self.asked, self.before = dtype, dtype if enabled else None, []

    def __enter__(self):
        self.before.append(Autocast.now)
        Autocast.now = self.asked

    def __exit__(self, *_):
        Autocast.now = self.before.pop()


class OnGPU(TorchFunctionMode):
    """Functions on the meta device become what they are on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if Autocast.now and function in NARROW + WIDE:
            dtype = Autocast.now if function in NARROW else torch.float32
            cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            args, kwargs = tree_map(cast, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def as_on_gpu():
    """Within it, the meta device does as a GPU does."""
    with (
        mock.patch("torch.autocast", Autocast),
        mock.patch("torch.optim.adam._device_dtype_check_for_fused"),  # which knows devices by name
        mock.patch.dict(augment.AT_ONCE, meta=augment.AT_ONCE["cuda"]),
        OnGPU(),
    ):
        yield


def count_step(train, batch):
    """The counts of one step. train: trains on an iterator of batches, of which the second is counted, when the
    optimiser has its state."""
    counter, counts = Counter(), []

    def batches():
        yield batch
        counts.append(counter.read())
        yield batch
        counts.append(counter.read())

    with counter:
        train(batches())
    before, after = counts
    return {name: after[name] - before[name] for name in after}


def flops(network, image_size, backward=True):
    """Operations for one image that the mathematics needs (a kernel may compute things twice), by torch's count; a
    multiplication and an addition are two."""
    network = network.to(META)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = network(torch.zeros(2, 3, image_size, image_size, device=META))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / 2
