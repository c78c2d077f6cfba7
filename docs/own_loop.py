"""PaCo in a training loop of your own: no DeepSpeed, no shards. `python docs/own_loop.py` (needs scikit-learn)."""

import copy

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.losses import Anchors, ParametricContrastiveLoss, class_prior


def train(steps: int = 300) -> float:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    tail = torch.cat([(labels == c).nonzero()[: int(100 * 0.6**c) + 1, 0] for c in range(10)])  # 101 images to 2
    images, counts = images.float() / 16, labels[tail].bincount()
    encoder = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU())
    heads = torch.nn.ModuleDict({"centers": torch.nn.Linear(128, 10), "project": torch.nn.Linear(128, 32)})
    key_encoder = copy.deepcopy(torch.nn.Sequential(encoder, heads["project"])).requires_grad_(False)
    queue = KeyQueue(length=256, dim=32)
    paco = ParametricContrastiveLoss(alpha=0.02, temperature=0.2, log_prior_C=class_prior(counts))
    optimizer = torch.optim.SGD([*encoder.parameters(), *heads.parameters()], lr=0.1, momentum=0.9)
    for _ in range(steps):
        batch = tail[torch.randint(len(tail), (64,))]
        query_view, key_view = (images[batch] + 0.1 * torch.randn(64, 64) for _ in range(2))
        followed = [*encoder.parameters(), *heads["project"].parameters()]
        for own, other in zip(key_encoder.parameters(), followed, strict=True):
            own.lerp_(other.detach(), 0.01)  # key momentum .99
        key, feature = F.normalize(key_encoder(key_view), dim=1), encoder(query_view)
        query, logits = F.normalize(heads["project"](feature), dim=1), heads["centers"](feature)
        paco(Anchors(labels[batch], logits, query, key, queue.snapshot(num_classes=10))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        queue.push(key, labels[batch])  # after the step: a batch does not meet its own keys twice
    unseen = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, tail, False)
    predicted = heads["centers"](encoder(images[unseen])).argmax(1)  # plain logits: the prior belongs to training
    return float((predicted == labels[unseen]).double().mean())


if __name__ == "__main__":
    print(f"trained on 101 images of 0, 2 of 9; accuracy on the 1,543 others: {train():.1%}")
