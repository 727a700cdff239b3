"""PEZ Emoji Model (demo)."""

from __future__ import annotations

from comfy_api.latest import io

from .inputs import CATEGORY


class EmojiModel(io.ComfyNode):
    """The bundled image model as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_EmojiModel",
            display_name="PEZ Emoji Model (demo)",
            category=CATEGORY,
            description="A small image model that comes with this pack, to try a learned prompt "
            "without a download. It makes emoji of 64 pixels.",
            search_aliases=["demo model", "small image model", "pez checkpoint", "emoji diffusion"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The image model, for KSampler."),
                io.Clip.Output(tooltip="The text encoder of the bundled emoji CLIP, for CLIP Text "
                "Encode."),
                io.Vae.Output(tooltip="The autoencoder, for VAE Decode."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls) -> io.NodeOutput:
        # what it uses of ComfyUI's own classes is needed by no other node
        from . import emoji_diffusion

        return io.NodeOutput(*emoji_diffusion.load())
