"""Views of a set of features: a map, neighbors, closest pairs, outliers, clusters, confused classes."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NEIGHBORS = 12  # kept of each image; the first of them are shown
VOTERS = 10  # neighbors that vote in the table of confused classes
ROWS = 2048  # images compared with all others at a time
SHARED = 200  # pairs, outliers and confused pairs of classes that a page lists at most
EXAMPLES = 12  # images shown of each confused pair of classes
CLUSTERS = 12


class Neighbors(NamedTuple):
    """The nearest other images of each image, by cosine of centered features."""

    images: NDArray[np.int64]  # (N, K), nearest first
    cosine: NDArray[np.float32]  # (N, K)


@torch.no_grad()
def nearest(features: Tensor, count: int = NEIGHBORS) -> Neighbors:
    """The `count` nearest images of each of N, or N - 1, by cosine of features (N, D) less their mean."""
    unit = F.normalize(features.float() - features.float().mean(0), dim=1)
    count = min(count, len(unit) - 1)
    index, cosine = [], []
    for start in range(0, len(unit), ROWS):
        similar = unit[start : start + ROWS] @ unit.T
        own = torch.arange(len(similar), device=unit.device)
        similar[own, own + start] = -torch.inf
        found = similar.topk(count, dim=1)
        index.append(found.indices.cpu())
        cosine.append(found.values.cpu())
    return Neighbors(torch.cat(index).numpy(), torch.cat(cosine).numpy())


@torch.no_grad()
def pca_map(features: Tensor) -> NDArray[np.float32]:
    """The two leading principal components (N, 2) of features (N, D); zeros where there is no second direction."""
    centered = features.double() - features.double().mean(0)
    vectors = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -2:].flip(1)
    # The sign of an eigenvector is arbitrary: its largest entry is made positive, so that a map can be drawn again.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    places: NDArray[np.float32] = (centered @ (vectors * signs)).float().cpu().numpy()
    return places if places.shape[1] == 2 else np.pad(places, ((0, 0), (0, 1)))


def umap_map(features: Tensor) -> NDArray[np.float32]:
    """UMAP (McInnes et al. 2018) of features (N, D) to (N, 2) by umap-learn, cosine distance, always the same seed."""
    import umap

    centered = (features.float() - features.float().mean(0)).cpu().numpy()
    reducer = umap.UMAP(metric="cosine", n_neighbors=min(15, len(centered) - 1), random_state=0, n_jobs=1)
    return np.asarray(reducer.fit_transform(centered), np.float32)


def clusters(features: Tensor, classes: int) -> NDArray[np.int64]:
    """Cluster (N,) of each image by k-means on unit-length features: as many clusters as classes, else CLUSTERS."""
    from sklearn.cluster import MiniBatchKMeans

    unit = F.normalize(features.float() - features.float().mean(0), dim=1).cpu().numpy()
    count = min(classes if classes > 1 else CLUSTERS, len(unit))
    found = MiniBatchKMeans(count, random_state=0, n_init=3, batch_size=1024).fit_predict(unit)
    return found.astype(np.int64)  # type: ignore[no-any-return]


def closest_pairs(pixels: Neighbors, trained: Neighbors) -> list[tuple[int, int, float, float]]:
    """Pairs (first, second, cosine of pixels, cosine of features) that are alike in both, the closest first.

    A pair is listed where each space has the one among the nearest of the other; they are in the order of the lesser
    of the two cosines.
    """
    known = {
        (min(i, j), max(i, j)): c
        for i, row in enumerate(pixels.images.tolist())
        for j, c in zip(row, pixels.cosine[i], strict=True)
    }
    pairs = {}
    for i, row in enumerate(trained.images.tolist()):
        for j, cosine in zip(row, trained.cosine[i], strict=True):
            key = (min(i, j), max(i, j))
            if key in known:
                pairs[key] = (*key, float(known[key]), float(cosine))
    return sorted(pairs.values(), key=lambda pair: -min(pair[2:]))[:SHARED]


def outlier_scores(found: Neighbors) -> NDArray[np.float32]:
    """1 less the mean cosine (N,) to the nearest images: large for an image that is like no other."""
    scores: NDArray[np.float32] = 1 - found.cosine.mean(1)
    return scores


def voted(found: Neighbors, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class (N,) that most of the VOTERS nearest labeled images have, the nearest one's on a tie; -1 without any."""
    near = labels[found.images[:, :VOTERS]]
    out = np.full(len(labels), -1)
    for i, row in enumerate(near):
        row = row[row >= 0]
        if len(row):
            counts = np.bincount(row)
            out[i] = next(label for label in row if counts[label] == counts.max())
    return out


def confused(labels: NDArray[np.int64], votes: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Pairs of classes that k-NN confuses, the most frequent first: counts, share of the class, and example images."""
    wrong = (labels >= 0) & (votes >= 0) & (labels != votes)
    pairs, counts = np.unique(np.stack([labels[wrong], votes[wrong]], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:SHARED]
    out = []
    for (label, vote), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True):
        images = np.flatnonzero((labels == label) & (votes == vote))[:EXAMPLES].tolist()
        share = count / int((labels == label).sum())
        out.append({"label": label, "vote": vote, "count": count, "share": share, "images": images})
    return out
