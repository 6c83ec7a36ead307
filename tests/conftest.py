"""What all tests share: caches of their own, and the folder of real data where there is one."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# The Hugging Face libraries read these on import, so they are set before any test module is. A cache or a
# token that the user has set up is neither written nor sent.
HF_HOME = tempfile.mkdtemp(prefix="cxr-backbone-tests-")
for name in list(os.environ):
    if name.startswith(("HF_", "HUGGINGFACE_")) and name.endswith(("CACHE", "TOKEN")):
        del os.environ[name]
os.environ["HF_HOME"] = HF_HOME
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real radiographs and weights: `$CXR_SHARED`, by default `../shared` of the repository."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("CXR_SHARED", root / "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs real data: {folder} is missing (set CXR_SHARED)")
    return folder
