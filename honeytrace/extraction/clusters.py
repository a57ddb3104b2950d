"""k-means, for attackers who have inputs and no labels."""

import torch
from torch import Tensor


def clusters(points: Tensor, count: int, *, seed: int) -> Tensor:
    """The cluster of each point: int64 [N] in 0..count-1, on the device of `points`.

    Args:
        points: floating point [N, D].
        count: of clusters, 1 to N.
        seed: fixes the first centres.

    Raises:
        ValueError: count is out of range.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(points):
        raise ValueError(f"the number of clusters must be between 1 and N={len(points)}, got {count}")
    # Here and not above: it takes seconds, and most attacks do without it.
    from sklearn.cluster import MiniBatchKMeans

    means = MiniBatchKMeans(count, random_state=seed % 2**32, n_init=1, batch_size=2048)
    return torch.from_numpy(means.fit_predict(points.float().cpu().numpy())).long().to(points.device)
