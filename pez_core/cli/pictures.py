"""Images of the prompts that a command finds, on a page to look at."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, check_integer
from .arguments import add_judge, load_judge
from .show import rounded

if TYPE_CHECKING:
    from ..clip import AnyClip
    from ..diffusion.page import Entry, Gallery
    from ..targets import Target

FOLDER = "pez-pictures"
IMAGES = 4  # of each prompt, as in the paper
PIPELINE, ITS_CLIP = "emoji-diffusion", "emoji-clip"
_SEEDS = 2**63  # that a generator of PyTorch takes


def add_pictures(command: argparse.ArgumentParser) -> None:
    """Add the options for images of the prompts."""
    group = command.add_argument_group("pictures")
    group.add_argument(
        "--images",
        dest="num_images_per_prompt",
        type=int,
        metavar="N",
        help="make N images of each prompt that is found, and write a page with them (default with "
        f"--pipeline: {IMAGES})",
    )
    group.add_argument(
        "--pipeline",
        metavar="NAME_OR_FOLDER",
        help="text-to-image pipeline of diffusers: a folder, or a repository of the Hugging Face "
        f"Hub (default: {PIPELINE}, bundled)",
    )
    group.add_argument(
        "--page",
        metavar="FOLDER",
        help=f"folder for index.html and sheet.png (default: {FOLDER}, or {FOLDER}-2 and so on "
        "where that exists)",
    )
    add_judge(group)
    group.add_argument(
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="denoising steps (default: 25, 12 for emoji-diffusion, or by the pipeline)",
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="strength of the prompt (default: 9, 4 for emoji-diffusion, or by the pipeline)",
    )


class Pictures:
    """Makes images of prompts, if the options ask for them.

    Args:
        arguments: of the command. All that can be wrong in them is found here, before a search,
            and the pipeline is loaded.

    Attributes:
        status: exit status, 1 where images failed or could not be written.
        page: that was written, or None.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self.status = arguments, 0
        self.page: Path | None = None
        self.makes_images = _makes_images(arguments)
        if not self.makes_images:
            return
        _check(arguments)
        diffusion = _diffusion()
        if arguments.page is not None:
            arguments.page = Path(arguments.page).expanduser()
            diffusion.page.check_free(arguments.page)
        _check_writable(arguments.page or _new_folder())
        self._judge = load_judge(arguments)
        self._pipeline = diffusion.load_pipeline(
            arguments.pipeline or PIPELINE,
            arguments.device,
            arguments.download,
            arguments.low_memory,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        names = ("num_inference_steps", "guidance_scale")
        settings = {name: getattr(arguments, name) for name in names}
        diffusion.image_models.check_settings(self._pipeline, settings)

    @property
    def page_name(self) -> str | None:
        """The path of the page, for `--json`."""
        return None if self.page is None else str(self.page)

    def use(self, clip: AnyClip) -> None:
        """Measure similarities by this CLIP, that of the search; warn where it is a wrong one.

        Raises:
            ArgumentError: the judge is the same.
        """
        self._clip = clip
        if not self.makes_images:
            return
        diffusion = _diffusion()
        if self._judge is not None:
            diffusion.evaluation.check_held_out(self._judge, clip)
        if problem := diffusion.belonging.foreign(clip, self._pipeline):
            print(f"pez: warning: {problem} Name that with --clip.", file=sys.stderr)

    def make(
        self,
        prompts: Sequence[str],
        targets: Sequence[Sequence[Target]],
        interrupted: Callable[[], bool],
        weights: Sequence[float] | None = None,
        titles: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """Make the images, and write and print what they are like.

        Args:
            prompts, targets, weights, titles: as in `make_gallery`.
            interrupted: whether Ctrl-C was pressed. The page then has the images so far.

        Returns:
            What `--json` prints about each prompt; nothing where no images are made.
        """
        if not self.makes_images or not prompts:
            return []
        diffusion, arguments = _diffusion(), self._arguments
        for prompt in prompts:
            if remark := diffusion.image_models.cut_remark(self._pipeline, prompt):
                print(f"pez: warning: {remark}", file=sys.stderr)
        with _images_bar() as show:
            try:
                gallery = diffusion.make_gallery(
                    self._pipeline,
                    prompts,
                    targets,
                    self._clip,
                    self._judge,
                    weights=weights,
                    titles=titles,
                    num_images_per_prompt=arguments.num_images_per_prompt or IMAGES,
                    num_inference_steps=arguments.num_inference_steps,
                    guidance_scale=arguments.guidance_scale,
                    seed=arguments.seed % _SEEDS,
                    fit=arguments.fit,
                    callback=lambda done, count: show(done, count) or interrupted(),
                )
            except diffusion.GalleryError as error:
                gallery = error.partial
                self._fail(str(error))
        self._save(gallery)
        if not arguments.json:
            _print(gallery, self.page)
        return [_fields(entry) for entry in gallery.entries]

    def _save(self, gallery: Gallery) -> None:
        """Write the page. What was found is not lost where that fails."""
        folder = self._arguments.page
        try:
            self.page = gallery.save(_new_folder() if folder is None else folder)
        except (OSError, ArgumentError) as error:
            self._fail(f"the page could not be written ({error})")

    def _fail(self, message: str) -> None:
        print(f"pez: error: {message}", file=sys.stderr)
        self.status = 1


def _makes_images(arguments: argparse.Namespace) -> bool:
    """Whether images are to be made; raise where an option needs them and they are not."""
    if arguments.num_images_per_prompt is not None or arguments.pipeline is not None:
        return True
    for name in ("page", "judge", "num_inference_steps", "guidance_scale"):
        if getattr(arguments, name) is not None:
            raise ArgumentError(name, "requires `num_images_per_prompt`", "add it")
    return False


def _check(arguments: argparse.Namespace) -> None:
    """Raise where the options for images are wrong."""
    for name in ("page", "pipeline"):
        if getattr(arguments, name) == "":
            raise ArgumentError(name, "is empty", "name a folder, or leave it out")
    if arguments.num_images_per_prompt is not None:
        check_integer("num_images_per_prompt", arguments.num_images_per_prompt, 1)
    if getattr(arguments, "negative_prompt", False):
        raise ArgumentError(
            "negative_prompt", "is not a prompt to make images of", "leave one of the two out"
        )
    if arguments.pipeline is None and (arguments.clip or [ITS_CLIP]) != [ITS_CLIP]:
        raise ArgumentError(
            "pipeline",
            f"is missing: {PIPELINE}, the default, reads prompts with {ITS_CLIP}",
            "name the image model that your CLIP belongs to",
        )


def _diffusion() -> Any:
    """The room for diffusers; raise where that is not installed."""
    from .. import diffusion

    return diffusion


def _check_writable(folder: Path) -> None:
    """Raise where nothing can be written to a folder, which may be missing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ArgumentError("page", f"is {str(folder)!r}, but {there} is a file", "name another")
    if not os.access(there, os.W_OK):
        raise ArgumentError("page", f"cannot be written: {there} is read-only", "name another")


def _new_folder() -> Path:
    """The first folder of the default name that does not exist."""
    number, folder = 1, Path(FOLDER)
    while os.path.lexists(folder):
        number += 1
        folder = Path(f"{FOLDER}-{number}")
    return folder


def _fields(entry: Entry) -> dict[str, Any]:
    """What `--json` prints about a prompt and its images."""
    own, *judges = [
        {"similarity": rounded(one.prompt), "images": list(map(rounded, one.images))}
        for one in entry.similarities
    ]
    return {"prompt": entry.prompt} | own | ({"judge": judges[0]} if judges else {})


def _print(gallery: Gallery, page: Path | None) -> None:
    from ..diffusion.page import SHEET, scores_line

    for entry in gallery.entries:
        print(entry.prompt)
        print(f"  {scores_line(entry.similarities)}")
    if page is not None:
        print(f"wrote {page} and {page.with_name(SHEET)}")


@contextmanager
def _images_bar() -> Iterator[Callable[[float, int], None]]:
    """A bar on stderr with the prompts whose images are made; nothing where it is no terminal."""
    from tqdm import tqdm

    bar = tqdm(
        disable=None,
        leave=False,
        dynamic_ncols=True,
        desc="images",
        bar_format="{l_bar}{bar:20}| {n:.1f} of {total_fmt} prompts [{elapsed}<{remaining}]",
    )

    def update(done: float, count: int) -> None:
        bar.total = count
        bar.update(done - bar.n)

    with bar:
        yield update
