# ruff: noqa: E402 (the imports below need the paths that the first part sets)
"""The tests that diffusers has for its own pipelines, run on `PezPipeline`.

They are in its repository alone, so a checkout of it is needed, best of the version installed:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    .venv/bin/python tests/diffusers_own.py diffusers

Further arguments go to pytest. Each override below has its reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1], "tests/pipelines/testing_utils").is_dir():
        sys.exit("usage: diffusers_own.py CHECKOUT [PYTEST ARGUMENTS]; CHECKOUT of diffusers")
    paths = [sys.argv[1], str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    sys.exit(
        subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "-rs", *sys.argv[2:]],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        ).returncode
    )

from conftest import make_clip
from PIL import Image
from tests.pipelines.pipeline_params import IMAGE_VARIATION_BATCH_PARAMS, IMAGE_VARIATION_PARAMS
from tests.pipelines.testing_utils import (
    BasePipelineTesterConfig,
    MemoryTesterMixin,
    PipelineTesterMixin,
)
from tiny_diffusion import stable_diffusion, stable_diffusion_xl

from pez_core import PezPipeline, SearchOptions
from pez_core.diffusion import PezClipModel


class StableDiffusionConfig(BasePipelineTesterConfig):
    pipeline_class = PezPipeline
    required_input_params_in_call_signature = IMAGE_VARIATION_PARAMS
    batch_input_params = IMAGE_VARIATION_BATCH_PARAMS
    output_shape = (3, 64, 64)
    make = staticmethod(stable_diffusion)

    def get_dummy_components(self) -> dict:
        return {"clip": PezClipModel.from_clip(make_clip()), "pipeline": self.make()}

    def get_dummy_inputs(self) -> dict:
        return {
            "image": Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 100),
            "generator": self.get_generator(0),
            "options": SearchOptions(prompt_len=4, swaps=0, steps=3, restarts=2),
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "num_images_per_prompt": 1,  # as theirs suppose
            "output_type": "pt",
        }


class StableDiffusionXLConfig(StableDiffusionConfig):
    make = staticmethod(stable_diffusion_xl)


class Own(PipelineTesterMixin):
    def test_save_load_optional_components(self, tmp_path):
        """Without its image pipeline this one gives text, which theirs cannot compare."""
        pipe = self.get_pipeline()
        pipe.pipeline = None
        pipe.save_pretrained(tmp_path, safe_serialization=False)
        loaded = self.pipeline_class.from_pretrained(tmp_path)
        assert loaded.pipeline is None
        assert self.run_pipe(loaded) == self.run_pipe(pipe)

    def test_num_images_per_prompt(self):
        """Theirs gives the argument twice where the inputs hold it, as they have to here."""
        pipe = self.get_pipeline()
        for batch_size in (1, 2):
            for each in (1, 2):
                inputs = self.get_dummy_inputs()
                inputs |= {"image": batch_size * [inputs["image"]], "num_images_per_prompt": each}
                assert pipe(**inputs)[0].shape[0] == batch_size * each


class TestStableDiffusion(StableDiffusionConfig, Own):
    pass


class TestStableDiffusionXL(StableDiffusionXLConfig, Own):
    pass


class TestStableDiffusionMemory(StableDiffusionConfig, MemoryTesterMixin):
    pass


class TestStableDiffusionXLMemory(StableDiffusionXLConfig, MemoryTesterMixin):
    pass
