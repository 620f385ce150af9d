"""Token merging one token at a time, in numpy and float64: what the tests compare the functions of tensors with."""

from __future__ import annotations

import numpy as np


def merge_one(keys: np.ndarray, x: np.ndarray, sizes: np.ndarray, r: int, protected: int) -> tuple[np.ndarray, ...]:
    """One sample: (tokens behind [N − r, C], sizes behind [N − r], place of each token before [N]).

    Every source, in turn, looks at every target; the pairs are ranked; what belongs together is averaged.
    """
    tokens = list(range(protected, len(keys)))
    sources, targets = tokens[::2], tokens[1::2]
    r = min(r, len(tokens) // 2)
    edges = []
    for source in sources if targets else ():
        cosines = [keys[source] @ keys[t] / np.linalg.norm(keys[source]) / np.linalg.norm(keys[t]) for t in targets]
        edges.append((max(cosines), source, targets[int(np.argmax(cosines))]))
    goes = {source: target for _, source, target in sorted(edges, reverse=True)[:r]}
    members = {token: [token] for token in range(len(keys)) if token not in goes}
    for source, target in goes.items():
        members[target].append(source)
    place = np.zeros(len(keys), dtype=np.int64)
    merged, total = [], []
    for behind, group in enumerate(members.values()):
        place[group] = behind
        total.append(sizes[group].sum())
        merged.append((sizes[group, None] * x[group]).sum(0) / total[-1])
    return np.array(merged).reshape(-1, x.shape[1]), np.array(total), place


def softmax_over_copies(q: np.ndarray, k: np.ndarray, v: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Attention of one head, [N, D] each, over keys and values of which each is there as often as `sizes` says."""
    k, v = np.repeat(k, sizes, axis=0), np.repeat(v, sizes, axis=0)
    logits = q @ k.T / np.sqrt(q.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ v
