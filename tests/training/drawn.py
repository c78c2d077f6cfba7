"""Networks of other projects with drawn weights, for tests of imports."""

import torch
from torch import nn


def drawn(module):
    """The module with all tensors drawn, as if it were trained."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn_like(tensor))
    return module.eval()


class SmallBlock(nn.Module):
    """Of the authors' `resnet_cifar.py`, shortcut A."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.padding = None if stride == 1 else (0, 0, 0, 0, (out - channels) // 2, (out - channels) // 2)

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.padding is None else nn.functional.pad(x[:, :, ::2, ::2], self.padding))).relu()
