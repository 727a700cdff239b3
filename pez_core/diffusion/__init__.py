"""PEZ for diffusers. The only part of `pez_core` that needs diffusers and transformers."""

from .clip_model import PezClipModel
from .denoising import DenoisingLoss
from .evaluation import Evaluation, EvaluationError, evaluate
from .modular import PezPromptStep
from .pipeline import PezPipeline
from .pipeline_output import PezPipelineOutput, PezPriorOutput

__all__ = [
    "DenoisingLoss",
    "Evaluation",
    "EvaluationError",
    "PezClipModel",
    "PezPipeline",
    "PezPipelineOutput",
    "PezPriorOutput",
    "PezPromptStep",
    "evaluate",
]
