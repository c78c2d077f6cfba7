"""The loop of the paper's code as it ships, for the GPU bench: float32, NCHW, eager, DistributedDataParallel.

Written after PaCo/LT of dvlab-research/Parametric-Contrastive-Learning, operation by operation: `moco/builder.py` (the
encoders, the loop of the moving average over single parameters, ShuffleBN by gathering all images, the queue cloned for
every step), `losses.py` and the body of `train` in `paco_lt.py`, which reads loss and accuracies of every step at once.
Images come from page-locked memory as its loader has them: normalised float32. The loss is `published_loss` of loss.py
but for what its text leaves out: masks made on the device, the constants within the logarithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

ALPHA, BETA, GAMMA, SUPT, T = 0.05, 1.0, 1.0, 1.0, 0.2  # sh/ImageNetLT_train_R50.sh
MOMENTUM, LR, SGD_MOMENTUM, WEIGHT_DECAY = 0.999, 0.02, 0.9, 5e-4
DIM = 128


class MoCo(nn.Module):
    """The model of `moco/builder.py` with its MLP head.

    Args:
        encoder: makes a backbone of torchvision with `num_classes` outputs.
    """

    queue: Tensor
    queue_l: Tensor
    queue_ptr: Tensor

    def __init__(self, encoder: Callable[..., Any], classes: int, keys: int) -> None:
        super().__init__()
        self.K = keys
        self.encoder_q, self.encoder_k = encoder(num_classes=DIM), encoder(num_classes=DIM)
        width = self.encoder_q.fc.weight.shape[1]
        for network in (self.encoder_q, self.encoder_k):
            network.fc = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), network.fc)
        self.linear, self.linear_k = nn.Linear(width, classes), nn.Linear(width, classes)
        for query, key in ((self.encoder_q, self.encoder_k), (self.linear, self.linear_k)):
            key.load_state_dict(query.state_dict())
            key.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(keys, DIM), dim=0))
        self.register_buffer("queue_l", torch.randint(0, classes, (keys,)))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        [*self.encoder_q.children()][-2].register_forward_hook(self._keep_feature)

    def _keep_feature(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.feature_q = output.reshape(output.shape[0], -1)

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        for query, key in ((self.encoder_q, self.encoder_k), (self.linear, self.linear_k)):
            for param_q, param_k in zip(query.parameters(), key.parameters(), strict=True):
                param_k.data = param_k.data * MOMENTUM + param_q.data * (1.0 - MOMENTUM)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor, labels: Tensor) -> None:
        keys, labels = _concat_all_gather(keys), _concat_all_gather(labels)
        ptr = int(self.queue_ptr)
        self.queue[ptr : ptr + len(keys), :] = keys
        self.queue_l[ptr : ptr + len(keys)] = labels
        self.queue_ptr[0] = (ptr + len(keys)) % self.K

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        every, labels = _concat_all_gather(x), _concat_all_gather(y)
        shuffle = torch.randperm(len(every)).to(x.device)
        dist.broadcast(shuffle, src=0)
        mine = shuffle.view(len(every) // len(x), -1)[dist.get_rank()]
        return every[mine], labels[mine], torch.argsort(shuffle)

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, y: Tensor, unshuffle: Tensor) -> tuple[Tensor, Tensor]:
        every, labels = _concat_all_gather(x), _concat_all_gather(y)
        mine = unshuffle.view(len(every) // len(x), -1)[dist.get_rank()]
        return every[mine], labels[mine]

    def forward(self, im_q: Tensor, im_k: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(features of queries, keys and queue, their labels, center logits)."""
        q = F.normalize(self.encoder_q(im_q), dim=1)
        logits = self.linear(self.feature_q)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            shuffled, shuffled_labels, unshuffle = self._batch_shuffle_ddp(im_k, labels)
            k = F.normalize(self.encoder_k(shuffled), dim=1)
            k, k_labels = self._batch_unshuffle_ddp(k, shuffled_labels, unshuffle)
        features = torch.cat((q, k, self.queue.clone().detach()), dim=0)
        target = torch.cat((labels, k_labels, self.queue_l.clone().detach()), dim=0)
        self._dequeue_and_enqueue(k, labels)
        return features, target, logits


class PublishedLoop:
    """The body of `train`, callable with a step's images: (query, key, labels) in page-locked memory, float32.

    Args:
        backbone: by torchvision's name.
    """

    def __init__(self, backbone: str, classes: int, keys: int, device: torch.device) -> None:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True  # torch's default, which the published code leaves
        self.device, self.classes, self.keys = device, classes, keys
        model = MoCo(torchvision.models.__dict__[backbone], classes, keys).to(device)
        self.model = DistributedDataParallel(model, find_unused_parameters=True)
        self.weight = torch.full((1, classes), 1 / classes, device=device)
        self.optimizer = torch.optim.SGD(model.parameters(), LR, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY)

    def __call__(self, query: Tensor, key: Tensor, labels: Tensor) -> float:
        query, key, labels = (t.to(self.device, non_blocking=True) for t in (query, key, labels))
        features, target, logits = self.model(query, key, labels)
        loss = self._criterion(features, target, logits)
        _accuracy(logits, labels)
        read = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return read

    def _criterion(self, features: Tensor, labels: Tensor, sup_logits: Tensor) -> Tensor:
        device, size = features.device, (features.shape[0] - self.keys) // 2
        labels = labels.contiguous().view(-1, 1)
        mask = torch.eq(labels[:size], labels.T).float().to(device)
        contrast = torch.div(torch.matmul(features[:size], features.T), T)
        contrast = torch.cat(((sup_logits + torch.log(self.weight + 1e-9)) / SUPT, contrast), dim=1)
        largest, _ = torch.max(contrast, dim=1, keepdim=True)
        logits = contrast - largest.detach()
        not_itself = torch.scatter(torch.ones_like(mask), 1, torch.arange(size).view(-1, 1).to(device), 0)
        mask = mask * not_itself
        one_hot = F.one_hot(labels[:size].view(-1), num_classes=self.classes).to(torch.float32)
        mask = torch.cat((one_hot * BETA, mask * ALPHA), dim=1)
        terms = torch.cat((torch.ones(size, self.classes).to(device), GAMMA * not_itself), dim=1)
        log_prob = logits - torch.log((torch.exp(logits) * terms).sum(1, keepdim=True) + 1e-12)
        return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


@torch.no_grad()
def _concat_all_gather(tensor: Tensor) -> Tensor:
    gathered = [torch.ones_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor, async_op=False)
    return torch.cat(gathered, dim=0)


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5."""
    correct = logits.topk(5, 1, True, True)[1].t().eq(labels.view(1, -1))
    return correct[:1].reshape(-1).float().sum(0), correct[:5].reshape(-1).float().sum(0)
