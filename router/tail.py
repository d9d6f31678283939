"""How many hits to ask a part of the shards for, and whether they were enough (docs/fan-out.md, `exact-merge`). Pure.

Hash sharding puts each of the best k into a part that is `share` of the shards with probability `share`, independently.
"""

from __future__ import annotations

import math
from functools import lru_cache

# Chance that a part holds more of the best k than it is asked for, and must be asked again.
MISS = 1e-4
# Below this nothing is saved that a second message would not cost.
K_MIN = 4


@lru_cache(maxsize=4_096)
def enough(k: int, numerator: int, denominator: int) -> int:
    """The least k' with P(Binomial(k, numerator/denominator) > k') ≤ MISS; at most k, at least min(k, K_MIN)."""
    assert k >= 1
    assert 0 < numerator <= denominator
    if numerator == denominator or k <= K_MIN:
        return k
    p = numerator / denominator
    odds = math.log(p) - math.log1p(-p)
    # The chance of exactly n, in logarithms: k may be 10,000.
    chance_log = k * math.log1p(-p)
    left = 1.0 - math.exp(chance_log)
    n = 0
    while left > MISS and n < k:
        chance_log += math.log(k - n) - math.log(n + 1) + odds
        n += 1
        left -= math.exp(chance_log)
    return min(k, max(n, K_MIN))


def more(asked: int, k: int, last: int) -> int:
    """For how many to ask a part again whose last hit of `asked` stands at place `last` of the merged k; 0: it has no more.

    Whatever follows its last hit follows that place, so that at most k - 1 - last of it can be among the best k.
    """
    return 0 if last >= k - 1 else asked + k - 1 - last
