"""Small models that are built in no time, and images for them."""

from __future__ import annotations

import torch
import torch_setup  # noqa: F401 (a process that a test starts computes as the tests do)


def small_vit(name: str = "vit_tiny_patch16_224", **options: object) -> torch.nn.Module:
    """A timm model of width 48 and depth 4 on 32×32 images with 10 classes, seeded, in eval mode.

    Biases, norms and LayerScale gammas get values that are not tiny, so that leaving one out is seen.
    """
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
    model = timm.create_model(name, pretrained=False, **{**sizes, **options})
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() < 2 else 0.05
        with torch.no_grad():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            if name.endswith("gamma"):
                parameter.add_(0.5)
    return model.eval()


def images(count: int = 4, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Random images `[count, channels, size, size]`."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
