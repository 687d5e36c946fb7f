"""Random weights at which every part of a network matters."""

import torch
from torch import Tensor, nn

BATCH = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
BUILT_IN = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and running statistic distinct values at which all parts of the network matter."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, like: Tensor) -> Tensor:
        count = max(1, like.numel())
        steps = (torch.randperm(count, generator=generator).double() + 0.5) / count
        return (low + (high - low) * steps).reshape(like.shape).to(like.dtype)

    for module in model.modules():
        norm = is_norm(module)
        for name, tensor in module.named_parameters(recurse=False):
            if not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                fan_in = max(1, tensor[0].numel())
                noise = torch.randn(tensor.shape, generator=generator) * min(1.0, (1.5 / fan_in) ** 0.5)
                tensor.copy_(noise.where(noise != 0, torch.full_like(noise, 0.01)))
            elif "bias" in name or "beta" in name:
                tensor.copy_(between(-0.2, 0.2, tensor))
            else:
                tensor.copy_(between(0.6, 1.4, tensor) if norm else between(0.3, 1.0, tensor))
        if isinstance(module, BATCH):
            for name, tensor in module.named_buffers(recurse=False):
                if tensor.is_floating_point():
                    tensor.copy_(between(0.6, 1.4, tensor) if "var" in name else between(-0.2, 0.2, tensor))
    return model


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by class or by the name of its class."""
    return isinstance(module, BUILT_IN) or "norm" in type(module).__name__.lower()
