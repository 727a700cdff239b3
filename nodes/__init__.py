"""The ComfyUI nodes: thin, over `pez_core`. Only this folder knows ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import live, models
from .learning import ConcatPrompts, DistillPrompt, ExtractStyle, ImageToPrompt
from .loading import LoadCLIP
from .scoring import ScorePrompt
from .words import MakeVocabulary


class PezExtension(ComfyExtension):
    """All nodes of the pack."""

    async def on_load(self) -> None:
        models.register_folder()
        live.register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadCLIP,
            ImageToPrompt,
            ExtractStyle,
            DistillPrompt,
            ConcatPrompts,
            MakeVocabulary,
            ScorePrompt,
        ]
