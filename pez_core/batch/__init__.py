"""Whole datasets: one job for every image or prompt, in this process or on Ray."""

try:
    import pyarrow as _pyarrow  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`pez batch` needs the package pyarrow; install the extra `batch`: "
        "pip install -e '.[batch]' in the clone."
    ) from error

from .engine import Cluster
from .job import Job
from .run import Plan, Summary, plan, run
from .sources import Columns, find_items

__all__ = ["Cluster", "Columns", "Job", "Plan", "Summary", "find_items", "plan", "run"]
