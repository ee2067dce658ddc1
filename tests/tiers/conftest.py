from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.tiers import TierSpec, ZarrTier


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/tier"


@pytest.fixture
def tier(url: str) -> ZarrTier:
    tier = ZarrTier(TierSpec.parse(url))
    tier.open()
    return tier
