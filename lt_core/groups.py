"""Many-, medium- and few-shot classes, by number of training images (Sec. 4.1).

Two rules are in use. The paper's own rows follow `paper`; the systems that it quotes were published under
`common`. The two are never compared group by group.

    masks = group_of(counts)                     # {"many": [N], "medium": [N], "few": [N]}
"""

from __future__ import annotations

import numpy as np

from lt_core.errors import InputError, check_counts, unknown

GROUPS = ("many", "medium", "few")
DESCRIPTIONS = {
    "paper": "many n >= 100, medium 20 < n < 100, few n <= 20",
    "common": "many n > 100, medium 20 <= n <= 100, few n < 20",
}
RULES = tuple(DESCRIPTIONS)


def check_rule(rule: str) -> str:
    """`rule` if it is known; raises InputError listing the known ones otherwise."""
    if rule not in DESCRIPTIONS:
        raise InputError(unknown("grouping rule", rule, list(RULES)))
    return rule


def group_of(counts: object, rule: str = "paper") -> dict[str, np.ndarray]:
    """Which classes are many-, medium- and few-shot: a boolean mask [N] a group.

    counts [N]: training images of each class. Every class is in exactly one group; a group may be empty.
    """
    check_rule(rule)
    n = check_counts("counts", counts).cpu().numpy()
    many, few = (n >= 100, n <= 20) if rule == "paper" else (n > 100, n < 20)
    return {"many": many, "medium": ~many & ~few, "few": few}
