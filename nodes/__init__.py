"""The ComfyUI nodes: thin, over `pez_core`. Only this folder knows ComfyUI."""

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from . import live, models
from .kept import cut_wires
from .learning import ConcatPrompts, DistillPrompt, ExtractStyle, ImageToPrompt
from .loading import LoadCLIP
from .scoring import ScorePrompt
from .words import MakeVocabulary

LEARNING = (ImageToPrompt, ExtractStyle, DistillPrompt, ConcatPrompts)


class PezExtension(ComfyExtension):
    """All nodes of the pack."""

    async def on_load(self) -> None:
        models.register_folder()
        live.register_routes()
        needed = {node.define_schema().node_id: node.NEEDED_TO_LEARN for node in LEARNING}
        PromptServer.instance.add_on_prompt_handler(lambda request: cut_wires(request, needed))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadCLIP, *LEARNING, MakeVocabulary, ScorePrompt]
