"""PEZ for diffusers. The only part of `pez_core` that needs diffusers and transformers."""

try:
    from .clip_model import PezClipModel
    from .denoising import DenoisingLoss
    from .evaluation import Evaluation, EvaluationError, evaluate
    from .gallery import GalleryError, make_gallery
    from .image_models import load_pipeline
    from .modular import PezPromptStep
    from .page import Gallery
    from .pipeline import PezPipeline
    from .pipeline_output import PezPipelineOutput, PezPriorOutput
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"pez_core.diffusion needs the package {error.name}; install the extra `diffusers`: "
        "pip install -e '.[diffusers]' in the clone.",
        name=error.name,
    ) from error

__all__ = [
    "DenoisingLoss",
    "Evaluation",
    "EvaluationError",
    "Gallery",
    "GalleryError",
    "PezClipModel",
    "PezPipeline",
    "PezPipelineOutput",
    "PezPriorOutput",
    "PezPromptStep",
    "evaluate",
    "load_pipeline",
    "make_gallery",
]
