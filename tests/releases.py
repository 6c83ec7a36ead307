"""What the oldest releases that are allowed can't do."""

import pytest
import sklearn
from packaging.version import Version

needs_balanced_folds = pytest.mark.skipif(
    Version(sklearn.__version__) < Version("1.8"),
    reason="scikit-learn before 1.8, the last for Python 3.10, stratifies shuffled groups badly",
)
