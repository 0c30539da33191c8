"""What each torch function does when it meets a slab. Importing this package fills `slab.RULES`."""

from credit.domain_parallel.rules import (  # noqa: F401
    along,
    attributes,
    contract,
    flips,
    indexing,
    losses,
    norms,
    pointwise,
    pooling,
    random,
    recurrent,
    reductions,
    rows,
    scatter,
    views,
    windows,
)
