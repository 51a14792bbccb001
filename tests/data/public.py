"""Where the public sets lie that some tests read, beside the checkout; such a test is skipped where they do not."""

from pathlib import Path

import pytest

PUBLIC = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_public = pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public sets do not lie at ../shared/data")
