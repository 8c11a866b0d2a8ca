"""A dispatch mode in which the CPU refuses the batch-norm calls that CUDA refuses."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RefuseBatchNormThatCudaRefuses(TorchDispatchMode):
    """Raise as CUDA does, which allocates the gradients in weight and bias like the weight, if the weight is None."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.calls += 1
            weight, (_, needs_weight, needs_bias) = args[2], args[9]
            if weight is None and (needs_weight or needs_bias):
                raise RuntimeError("tensor does not have a device")
        return func(*args, **(kwargs or {}))
