"""The operations of a network, counted."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


def flops(network, image_size, backward=True):
    """Operations for one image that the mathematics needs (a kernel may compute things twice), by torch's count; a
    multiplication and an addition are two."""
    network = network.to(META)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits, _ = network(torch.zeros(2, 3, image_size, image_size, device=META))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / 2
