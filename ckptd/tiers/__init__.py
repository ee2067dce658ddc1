"""Tiers: where checkpoints outlive the job. The seam (``tier``), the Zarr v3 tier on a local path, and retention.

Layer: beside ``peers`` and ``restore``, above ``format``. Invariants: a checkpoint exists when its manifest does, and
the manifest is put last; a name is never written twice; nothing is trusted that was not checked.
"""

from ckptd.tiers.retention import Deletion, expendable
from ckptd.tiers.spec import TierSpec
from ckptd.tiers.tier import StoredSnapshot, Tier
from ckptd.tiers.zarr_tier import ZarrTier

__all__ = ["Deletion", "StoredSnapshot", "Tier", "TierSpec", "ZarrTier", "expendable"]
