"""The ComfyUI nodes, thin wrappers of `pez_core`. Only this folder imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from . import models
from .choose import ChooseByImage
from .distill import DistillPrompt
from .doctor import Doctor
from .emoji_model import EmojiModel
from .from_model import ClipFromModel
from .fuse import FusePrompts
from .image_to_prompt import ImageToPrompt
from .loading import LoadCLIP
from .prompts import prepare
from .routes import register_routes
from .scoring import ScorePrompt
from .style import ExtractStyle
from .vocabulary import MakeVocabulary

LEARNING = (ImageToPrompt, ExtractStyle, DistillPrompt, FusePrompts)


class PezExtension(ComfyExtension):
    """All nodes of the pack."""

    async def on_load(self) -> None:
        models.register_folder()
        register_routes()
        needed = {node.define_schema().node_id: node.NEEDED_TO_LEARN for node in LEARNING}
        PromptServer.instance.add_on_prompt_handler(lambda request: prepare(request, needed))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadCLIP,
            ClipFromModel,
            *LEARNING,
            MakeVocabulary,
            ScorePrompt,
            ChooseByImage,
            EmojiModel,
            Doctor,
        ]
