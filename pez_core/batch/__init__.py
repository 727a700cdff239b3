"""Whole datasets: one job for every image or prompt, in this process or on Ray."""

from .engine import Cluster
from .job import Job
from .run import Plan, Summary, plan, run
from .sources import Columns, find_items

__all__ = ["Cluster", "Columns", "Job", "Plan", "Summary", "find_items", "plan", "run"]
