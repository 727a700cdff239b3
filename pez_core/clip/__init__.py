"""The only place that uses open_clip: loading, image preparation, text features from embeddings.

open_clip takes seconds to import, and is imported when one of its users here is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .models import PRESETS, Preset

if TYPE_CHECKING:
    from typing import TypeAlias

    from .encoders import clip_from_encoders
    from .joint import JointClip
    from .load import load_clip
    from .model import Clip

    AnyClip: TypeAlias = Clip | JointClip
    """One CLIP, or several as one."""

__all__ = ["PRESETS", "AnyClip", "Clip", "JointClip", "Preset", "clip_from_encoders", "load_clip"]


def __getattr__(name: str) -> Any:
    if name in ("AnyClip", "Clip", "JointClip"):
        from .joint import JointClip
        from .model import Clip

        return {"AnyClip": Clip | JointClip, "Clip": Clip, "JointClip": JointClip}[name]
    if name == "load_clip":
        from .load import load_clip

        return load_clip
    if name == "clip_from_encoders":
        from .encoders import clip_from_encoders

        return clip_from_encoders
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
