"""What comes with the package beside its code: `configs/`, `hpc/`, `containers/`, and what builds it. No torch.

In a checkout `credit/share` holds links to the one copy at the top; in a wheel, the files.
"""

from __future__ import annotations

from pathlib import Path

SHARE = Path(__file__).parent / "share"
CONFIGS, HPC, CONTAINERS = (SHARE / name for name in ("configs", "hpc", "containers"))
