"""Whole datasets: one job for every image or prompt, in this process or on Ray."""

try:
    from .engine import Cluster
    from .job import Job
    from .run import BatchPlan, Summary, plan, run
    from .sources import Columns, find_items
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("pyarrow", "filelock"):
        raise
    raise ImportError(
        f"pez_core.batch needs the package {error.name}; install the extra `batch`: "
        "pip install -e '.[batch]' in the clone."
    ) from error

__all__ = ["BatchPlan", "Cluster", "Columns", "Job", "Summary", "find_items", "plan", "run"]
