"""PEZ Test This Machine."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..pez_core.doctor import PARTS, examine
from .inputs import CATEGORY


class Doctor(io.ComfyNode):
    """What a bug report needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_Doctor",
            display_name="PEZ Test This Machine",
            category=CATEGORY,
            description="Tests in about ten seconds whether PEZ computes correctly on this "
            "machine, and gives what a bug report needs.",
            search_aliases=["doctor", "self-test", "diagnose", "system info", "bug report"],
            not_idempotent=True,
            inputs=[],
            outputs=[
                io.String.Output(
                    "report",
                    tooltip="Versions, rates and results. Connect it to Preview Any, and paste it "
                    "into a bug report.",
                )
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        bar = ProgressBar(len(PARTS))
        with torch.inference_mode(False), torch.enable_grad():
            found = examine(mm.get_torch_device(), lambda part: bar.update(1))
        return io.NodeOutput(str(found))
