"""Fine-tuning: encoder and classifier trained together on a share of the labels."""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrdm.evaluation.knn import top_hits
from fastrdm.evaluation.settings import FinetuneConfig
from fastrdm.loaders.spec import Loader
from fastrdm.models.encoders import Encoder
from fastrdm.optim.optimizers import Role, build_optimizer, parameter_groups, set_learning_rates


def finetune(
    config: FinetuneConfig, encoder: Encoder, classes: int, loader: Loader, batch_size: int, tell: Callable[[str], None]
) -> nn.Sequential:
    """Train a copy of `encoder` with a classifier behind it on `loader`, and return it in evaluation mode.

    ValueError if the loss is no finite number at the end of an epoch.
    """
    device = next(encoder.parameters()).device
    head = nn.Linear(encoder.features, classes)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(config.seed)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.zero_()
    model = nn.Sequential(copy.deepcopy(encoder), head).to(device).train()
    roles = [
        Role(name, list(part.named_parameters()), lr=rate)
        for name, part, rate in (("encoder", model[0], config.lr), ("head", model[1], config.head_lr))
    ]
    groups = parameter_groups(roles, config.optim(), scale=batch_size / 256)
    optimizer = build_optimizer(groups, config.optim(), device)
    step = 0
    for epoch in range(config.epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            factor = config.factor(step, len(loader))
            set_learning_rates(optimizer, [group["base_lr"] * factor for group in groups])
            loss = F.cross_entropy(model(batch.views[0]), batch.label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        if not loss.isfinite():
            raise ValueError(f"fine-tuning diverged in epoch {epoch + 1}: lower finetune.lr={config.lr:g} or head_lr")
        tell(f"fine-tuning, epoch {epoch + 1}/{config.epochs}, loss {loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def classified(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], tops: Sequence[int]
) -> tuple[list[int], int]:
    """Count right answers for each of `tops`, and labeled images, over (images, index, label) batches."""
    counts = []  # of each batch, on the device: nothing waits for it before the last one
    for images, _, labels in batches:
        scores, known = model(images), labels >= 0
        # An image without a label is given a class that has no score, which is no hit.
        hits = top_hits(scores, labels.masked_fill(~known, scores.shape[1]), tops)
        counts.append(torch.cat([hits, known.sum()[None]]))
    if not counts:
        return [0] * len(tops), 0
    *right, of = torch.stack(counts).sum(0).tolist()
    return right, of
