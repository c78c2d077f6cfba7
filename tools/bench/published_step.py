"""The rival of the step bench: the published design, as a DistributedDataParallel loop in plain torch.

It follows the paper's code: keys are shuffled by gathering every image of the global batch, normalised, on every rank;
the loss is written in plain operations for autograd; every rank holds the whole queue, a buffer that DDP broadcasts
with the running statistics before each forward, as it does by default; the moving average is a loop over parameters;
torch's SGD. Where the published code draws at random, the draws are ours, so that losses and weights can be compared.
"""

import copy

import numpy as np
import torch
import torch.distributed as dist
from loss import published_loss
from ranks import Parts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from paco_ds.config.recipe import Recipe
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.models.recogniser import Recogniser
from paco_ds.randomness import DrawPurpose, permutation


class PublishedPaCo(nn.Module):
    """Query and key encoder, classifier and queue in one module, whose forward makes keys and queries.

    Args:
        model: whose initial weights it takes over.
        queue_KD, labels_K: what the queue holds at first; the published one starts with random keys as well.
        parts: told what the forward spends its time on.
    """

    queue: Tensor
    queue_labels: Tensor

    def __init__(self, model: Recogniser, recipe: Recipe, queue_KD: Tensor, labels_K: Tensor, parts: Parts) -> None:
        super().__init__()
        self.encoder_q, self.linear = model.query_encoder, model.centers
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        assert recipe.key_encoder is not None
        self.momentum, self.seed, self.parts = recipe.key_encoder.momentum, recipe.seed, parts
        self.register_buffer("queue", queue_KD.clone())
        self.register_buffer("queue_labels", labels_K.clone())
        self.pointer = self.steps = 0

    def forward(self, query_images: Tensor, key_images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """(queries, keys, contrasts of the queue, their labels, center logits) of a micro-batch."""
        part = self.parts.part
        with part("query forward"):
            feature, query = self.encoder_q(query_images)
            logits = self.linear(feature)
        with torch.no_grad():
            with part("EMA"):
                for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                    param_k.data = param_k.data * self.momentum + param_q.data * (1.0 - self.momentum)
            shuffled, unshuffle = self._shuffle(key_images)
            with part("key forward"):
                key = self.encoder_k(shuffled)[1]
            key = self._unshuffle(key, unshuffle)
            with part("loss"):
                queue, queue_labels = self.queue.clone(), self.queue_labels.clone()
            self._enqueue(key, labels)
        return query, key, queue, queue_labels, logits

    def _shuffle(self, images: Tensor) -> tuple[Tensor, Tensor]:
        every = _gather(images)
        order = torch.from_numpy(
            permutation(len(every), DrawPurpose.KEY_GROUPS, self.seed, self.steps).astype(np.int64)
        )
        self.steps += 1
        dist.broadcast(order, src=0)
        mine = order.view(dist.get_world_size(), -1)[dist.get_rank()]
        return every[mine], order.argsort()

    def _unshuffle(self, keys: Tensor, unshuffle: Tensor) -> Tensor:
        mine = unshuffle.view(dist.get_world_size(), -1)[dist.get_rank()]
        return _gather(keys)[mine]

    def _enqueue(self, keys: Tensor, labels: Tensor) -> None:
        keys, labels = _gather(keys), _gather(labels)
        end = self.pointer + len(keys)
        self.queue[self.pointer : end] = keys
        self.queue_labels[self.pointer : end] = labels
        self.pointer = end % len(self.queue)


class PublishedStep:
    """One optimizer step of the published loop, for micro-batches one a rank."""

    def __init__(
        self,
        model: Recogniser,
        recipe: Recipe,
        log_prior_C: Tensor,
        queue_KD: Tensor,
        labels_K: Tensor,
        parts: Parts,
    ) -> None:
        self.parts, self.log_prior_C = parts, log_prior_C
        self.normalize = model.normalize
        settings = recipe.optimizer
        paco = PublishedPaCo(model, recipe, queue_KD, labels_K, parts)
        self.model = DistributedDataParallel(paco)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained,
            recipe.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )

    def __call__(self, micro_batch: MicroBatch) -> float:
        """Train on this rank's micro-batch; its loss."""
        part = self.parts.part
        assert micro_batch.key is not None
        with part("data"):  # the published loader normalises on the host
            query_images, key_images = self.normalize(micro_batch.query), self.normalize(micro_batch.key)
        query, key, queue, queue_labels, logits = self.model(query_images, key_images, micro_batch.labels)
        with part("loss"):
            loss = published_loss(query, key, logits, micro_batch.labels, queue, queue_labels, self.log_prior_C)
        with part("optimizer"):
            self.optimizer.zero_grad()
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            self.optimizer.step()
        return float(loss)


@torch.no_grad()
def _gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in one tensor, as the published `concat_all_gather`."""
    gathered = [torch.ones_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def full_queue(recipe: Recipe, classes: int) -> tuple[Tensor, Tensor]:
    """Random unit keys [K, D] and labels [K], the same on every rank: a queue as it is in all but the first steps."""
    generator = torch.Generator().manual_seed(recipe.seed)
    keys_KD = F.normalize(torch.randn(recipe.queue.length, recipe.model.projection_dim, generator=generator), dim=1)
    return keys_KD, torch.randint(classes, (recipe.queue.length,), generator=generator)
