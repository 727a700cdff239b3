"""Tests of the node pack in a real ComfyUI.

A package, because a second top-level `conftest` would hide the one that the other tests import.
"""
