"""How well a diffusion model denoises an image with a prompt, as a loss to search prompts by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..clip import AnyClip
from ..clip.images import ImageInput, load_images
from ..errors import check_integer
from ..targets import check_number

# prompts that are encoded at once where no gradients are needed
_AT_ONCE = 8

# what a UNet takes of prompts: (rows, length, width) states, and for XL (rows, width) pooled ones
Condition = list[torch.Tensor]


class DenoisingLoss:
    """The denoising loss of an image pipeline at noisy timesteps, to give to `invert` as `extra`.

    Each image is encoded by the VAE and mixed with noise, the UNet predicts the noise (or the
    velocity) from the mixture and a prompt, and the mean squared error of that, divided by the
    error with an empty prompt, is the loss: below 1 the prompt helps. As in `prompt_inversion_sd`
    of the authors of "Hard Prompts Made Easy", its gradient goes through UNet and text encoders to
    the embeddings of the projected prompt. Late timesteps, where there is mostly noise, are those
    at which a prompt says what is depicted (PH2P, Mahajan et al., CVPR 2024, takes 500 to 900 of
    1000).

    Every prompt meets the same timesteps and noise, so that losses compare from step to step.
    Nothing of the pipeline changes, and its scheduler gives its noise schedule only.

    A step takes `samples` forward and backward passes of the UNet for each prompt and image, and
    memory for the activations of `batch_size` of them beside the models. At the size of Stable
    Diffusion 1.5 in fp32, on two cores, a sample takes 9 seconds, so that a step of four takes 370
    times as long as one of the CLIP, and 2 GiB for each that goes through at once; see
    benchmarks/results/denoising.md.

    Args:
        pipeline: one that is built as Stable Diffusion 1.x, 2.x or XL is: a UNet, an AutoencoderKL,
            one or two text encoders that are CLIPs, a scheduler that predicts noise or velocity. It
            may be half precision, and offloaded by `enable_model_cpu_offload`.
        images: as in `invert`, and the same; scaled and cropped here to what the pipeline makes.
        clip: what is searched on. It has to have the tokens of the pipeline; with weight 1 they and
            its vocabulary are all that is used of it.
        weight: share in what is minimised, above 0, at most 1; the similarity has the rest. At 1
            the search looks at the pipeline alone.
        samples: timesteps, each with noise of its own, that an image is looked at with; 1 or more.
        timesteps: from where to where they are, as fractions of the steps that the model was
            trained with, from 0 to 1. They are spread evenly.
        batch_size: samples that go through the UNet at once, and images through the VAE; 1 or more.
            More take more memory, and less time on a device that one does not fill.
        shared: one prompt for all images, by the mean of their losses.
        generator: draws timesteps and noise; on the CPU. None: a new one of seed 0.

    Attributes:
        weight: the share.
        prompts: how many prompts it is for: one for each image, or 1 if `shared`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a number is out of range, `pipeline` is of another kind, an image cannot be
            read, or the tokenizers of `pipeline` and `clip` differ.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        images: ImageInput | Sequence[ImageInput] | torch.Tensor,
        clip: AnyClip,
        weight: float = 1.0,
        samples: int = 4,
        timesteps: tuple[float, float] = (0.5, 0.9),
        batch_size: int = 1,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.weight = check_number("weight", weight, low=0, above=True)
        if self.weight > 1:
            raise ValueError(f"`weight` has to be above 0 and at most 1 but is {weight}.")
        _check_pipeline(pipeline)
        self._tokenizers, self._encoders = zip(*_text_models(pipeline), strict=True)
        self._example_token = clip.text.example_token
        _check_same_tokens(pipeline, self._tokenizers, clip)
        self._model = _Denoiser(pipeline, images, samples, timesteps, batch_size, generator)
        each = range(self._model.images)
        self._images = [list(each)] if shared else [[k] for k in each]
        self.prompts = len(self._images)

    @property
    def parts(self) -> list[tuple[int, float]]:
        """(columns, weight) of each text encoder."""
        widths = [encoder.get_input_embeddings().embedding_dim for encoder in self._encoders]
        return [(width, 1 / len(widths)) for width in widths]

    @property
    def token_embedding(self) -> torch.Tensor:
        """(vocab_size or more, columns) tables of the text encoders side by side, in fp32."""
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in self._encoders]
        # each encoder may have words of its own behind the common ones, such as textual inversions
        size = min(map(len, tables))
        return torch.cat([t[:size].float().to(self._model.device) for t in tables], dim=1)

    def objective(
        self, before: Sequence[int], after: Sequence[int], goals: Sequence[int]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `ExtraLoss`. The function finds its gradient itself, when it is called."""
        looks = self._looks(goals)

        def loss(embeddings: torch.Tensor) -> torch.Tensor:
            here = embeddings.detach().to(self._model.device)
            layout = self._ids(before, here.shape[1], after), len(before) + 1
            with _frozen([self._model.pipeline.unet, *self._encoders]):
                with torch.no_grad():
                    condition = self._condition(here, *layout)
                wanted = torch.is_grad_enabled() and embeddings.requires_grad
                losses, gradients = self._model(condition, looks, wanted)
                losses = losses.to(embeddings.device)
                if not wanted:
                    return losses
                gradient = self._back(here, gradients, *layout).to(embeddings.device)
            # the difference is 0, and its gradient the one that is known
            known = (embeddings - embeddings.detach()) * gradient
            return losses + known.sum((1, 2))

        return loss

    def losses(self, texts: Sequence[str], goals: Sequence[int]) -> torch.Tensor:
        """See `ExtraLoss`; by the pipeline's own `encode_prompt`."""
        losses = self._model.of_texts(texts, self._looks(goals))
        self._model.pipeline.maybe_free_model_hooks()
        return losses

    def _looks(self, goals: Sequence[int]) -> list[tuple[int, int]]:
        """Rows and the images that they are for."""
        return [(row, image) for row, goal in enumerate(goals) for image in self._images[goal]]

    def _ids(
        self, before: Sequence[int], prompt_len: int, after: Sequence[int]
    ) -> list[torch.Tensor]:
        """(1, length) ids for each encoder, with a known word in place of those learned."""
        rows = []
        words = [*before, *[self._example_token] * prompt_len, *after]
        for tokenizer in self._tokenizers:
            length = tokenizer.model_max_length
            row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
            if len(row) > length:
                raise ValueError(
                    f"`prompt_len` is {prompt_len}, but the text encoder of the pipeline holds "
                    f"{length - 2} tokens, the template's {len(words) - prompt_len} included."
                )
            row += [tokenizer.pad_token_id] * (length - len(row))
            rows.append(torch.tensor([row], device=self._model.device))
        return rows

    def _condition(
        self, embeddings: torch.Tensor, ids: list[torch.Tensor], start: int
    ) -> Condition:
        parts = embeddings.split([columns for columns, _ in self.parts], dim=-1)
        outputs = [
            _encode(encoder, row, part, start, len(parts) > 1)
            for encoder, row, part in zip(self._encoders, ids, parts, strict=True)
        ]
        return [torch.cat([some[0] for some in outputs], dim=-1), *outputs[-1][1:]]

    def _back(
        self,
        embeddings: torch.Tensor,
        gradients: Condition,
        ids: list[torch.Tensor],
        start: int,
    ) -> torch.Tensor:
        """Gradients at the condition -> (rows, prompt_len, columns) those at the embeddings.

        Each encoder runs once more, right before its gradients are taken: with offloading the
        UNet's turn has sent it away.
        """
        # half precision would lose gradients that are small
        size = torch.stack([g.abs().flatten(1).amax(1) for g in gradients]).amax(0)
        size = size.clamp_min(torch.finfo(torch.float32).tiny)
        states, *pooled = (g / size.view(-1, *[1] * (g.ndim - 1)) for g in gradients)
        states = states.split([encoder.config.hidden_size for encoder in self._encoders], dim=-1)
        parts = embeddings.split([columns for columns, _ in self.parts], dim=-1)
        found = []
        for k, (encoder, row, part) in enumerate(zip(self._encoders, ids, parts, strict=True)):
            wanted = [states[k], *(pooled if encoder is self._encoders[-1] else [])]
            pieces = []
            for few in torch.arange(len(part)).split(self._model.batch_size):
                leaf = part[few].requires_grad_()
                outputs = _encode(encoder, row, leaf, start, len(parts) > 1)
                at = [g[few].to(o.dtype) for g, o in zip(wanted, outputs, strict=True)]
                pieces += torch.autograd.grad(outputs, leaf, at)
            found.append(torch.cat(pieces))
        return torch.cat(found, dim=-1) * size[:, None, None]


def denoising_loss(
    pipeline: DiffusionPipeline,
    prompts: str | Sequence[str],
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
    samples: int = 4,
    timesteps: tuple[float, float] = (0.5, 0.9),
    batch_size: int = 1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """How well a pipeline denoises images with prompts, against an empty prompt: below 1 is better.

    Args:
        pipeline, images, samples, timesteps, batch_size, generator: as in `DenoisingLoss`.
        prompts: one text or several.

    Returns:
        (prompts, images) losses.

    Raises:
        TypeError, ValueError: as `DenoisingLoss`; no prompt.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("`prompts` is empty; give at least one prompt.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`prompts` has to hold strings but holds {text!r}.")
    _check_pipeline(pipeline)
    model = _Denoiser(pipeline, images, samples, timesteps, batch_size, generator)
    each = [text for text in texts for _ in range(model.images)]
    looks = [(row, row % model.images) for row in range(len(each))]
    losses = model.of_texts(each, looks).view(len(texts), model.images)
    pipeline.maybe_free_model_hooks()
    return losses


class _Denoiser:
    """Noisy images, and what a pipeline's UNet makes of them under a condition.

    Attributes:
        images: how many there are.
        batch_size: as in `DenoisingLoss`.
        device: where the pipeline computes.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        images: ImageInput | Sequence[ImageInput] | torch.Tensor,
        samples: int,
        timesteps: tuple[float, float],
        batch_size: int,
        generator: torch.Generator | None,
    ) -> None:
        check_integer("samples", samples, 1)
        check_integer("batch_size", batch_size, 1)
        low, high = _check_span(timesteps)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        if generator.device.type != "cpu":
            raise ValueError(f"`generator` has to be on the CPU but is on {generator.device}.")
        pictures, _ = load_images(images)
        self.pipeline, self.batch_size, self.images = pipeline, batch_size, len(pictures)
        self.device = pipeline._execution_device
        # the pipeline's own may scale what it adds noise to in another way
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        count = schedule.config.num_train_timesteps
        places = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
        steps = ((low + (high - low) * places) * count).long().clamp(max=count - 1)
        with torch.inference_mode(False), torch.no_grad():
            latents = _latents(pipeline, pictures, batch_size)
            noise = torch.randn(samples, *latents.shape[1:], generator=generator)
            spread = latents[:, None].expand(-1, samples, -1, -1, -1)
            noisy = [schedule.add_noise(same, noise, steps) for same in spread]
            target = [noise] * len(spread)
            if schedule.config.prediction_type == "v_prediction":
                target = [schedule.get_velocity(same, noise, steps) for same in spread]
            # all (images, samples, channels, height, width)
            self._noisy = torch.stack(noisy).to(self.device)
            self._target = torch.stack(target).to(self.device)
            self._steps = steps.to(self.device)
            self._size = [size * pipeline.vae_scale_factor for size in latents.shape[2:]]
            self._empty = torch.ones(len(latents), device=self.device)
            self._empty = self.of_texts([""] * len(latents), [(k, k) for k in range(len(latents))])
            pipeline.maybe_free_model_hooks()

    def of_texts(self, texts: Sequence[str], looks: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(len(texts),) losses, by the pipeline's own way from text to condition."""
        with torch.inference_mode(False), torch.no_grad():
            states = []
            unique = list(dict.fromkeys(texts))
            for k in range(0, len(unique), _AT_ONCE):
                states.append(
                    self.pipeline.encode_prompt(
                        prompt=unique[k : k + _AT_ONCE],
                        device=self.device,
                        num_images_per_prompt=1,
                        do_classifier_free_guidance=False,
                    )
                )
            # of four for XL, the second and last are of the negative prompt
            condition = [torch.cat(part) for part in list(zip(*states, strict=True))[::2]]
            rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
            return self([part[rows] for part in condition], looks)[0]

    def __call__(
        self, condition: Condition, looks: Sequence[tuple[int, int]], gradients: bool = False
    ) -> tuple[torch.Tensor, Condition]:
        """Losses, and gradients at the condition, piece by piece.

        Args:
            condition: of n rows.
            looks: rows and images; a row's loss is the mean over its images.
            gradients: whether they are needed.

        Returns:
            (n,) losses and fp32 gradients of the shapes of `condition`, zero where not needed.
        """
        rows = len(condition[0])
        samples, pixels = self._noisy.shape[1], self._noisy[0, 0].numel()
        counts = torch.bincount(torch.tensor([row for row, _ in looks]), minlength=rows)
        losses = torch.zeros(rows, device=self.device)
        found = [torch.zeros_like(part, dtype=torch.float32) for part in condition]
        pieces = torch.tensor([(*look, k) for look in looks for k in range(samples)])
        for piece in pieces.split(self.batch_size):
            row, image, sample = piece.T.to(self.device)
            share = 1 / (self._empty[image] * counts[piece[:, 0]].to(row.device) * samples * pixels)
            leaves = [part[row].detach().requires_grad_(gradients) for part in condition]
            errors = self._errors(leaves, image, sample)
            losses.index_add_(0, row, errors.detach() * share)
            if gradients:
                # of the plain sum, whose gradients half precision can hold
                each = torch.autograd.grad(errors.sum(), leaves)
                for total, one in zip(found, each, strict=True):
                    shares = share.view(-1, *[1] * (one.ndim - 1))
                    total.index_add_(0, row, one.float() * shares)
        return losses, found

    def _errors(
        self, condition: Condition, image: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """(n,) sums of squared errors, for n images and samples."""
        unet = self.pipeline.unet
        states, *pooled = (part.to(unet.dtype) for part in condition)
        added = {}
        if pooled:
            # the size of the image, where its crop begins, and the size of that
            ids = states.new_tensor([*self._size, 0, 0, *self._size]).expand(len(states), -1)
            added = {"text_embeds": pooled[0], "time_ids": ids}
        predicted = unet(
            self._noisy[image, sample].to(unet.dtype),
            self._steps[sample],
            encoder_hidden_states=states,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return (predicted.float() - self._target[image, sample]).square().flatten(1).sum(1)


def _check_pipeline(pipeline: DiffusionPipeline) -> None:
    """Raise unless it is built as Stable Diffusion 1.x, 2.x or XL is."""
    kind = type(pipeline).__name__
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"`pipeline` has to be a DiffusionPipeline but is {kind}.")
    needed = ["unet", "vae", "scheduler", "tokenizer", "text_encoder"]
    kinds, added = [CLIPTextModel], None
    if hasattr(pipeline, "text_encoder_2"):
        needed += ["tokenizer_2", "text_encoder_2"]
        kinds, added = [CLIPTextModel, CLIPTextModelWithProjection], "text_time"
    if missing := [name for name in needed if getattr(pipeline, name, None) is None]:
        raise ValueError(
            f"`pipeline` has to have {', '.join(needed)}, as Stable Diffusion 1.x, 2.x and XL do, "
            f"but {kind} has no {', '.join(missing)}."
        )
    for (_, encoder), wanted in zip(_text_models(pipeline), kinds, strict=True):
        if not isinstance(encoder, wanted):
            raise ValueError(
                f"`pipeline` has to have a {wanted.__name__} where {kind} has a "
                f"{type(encoder).__name__}; only text encoders that are CLIPs can be searched."
            )
    unet, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if unet.in_channels != channels or unet.addition_embed_type != added:
        raise ValueError(
            f"`pipeline` has to have a UNet with `in_channels` {channels} and "
            f"`addition_embed_type` {added}, but {kind} has {unet.in_channels} and "
            f"{unet.addition_embed_type}; give a text-to-image pipeline."
        )
    schedule = pipeline.scheduler.config
    predicts = schedule.get("prediction_type", "epsilon")
    if "beta_schedule" not in schedule or predicts not in ("epsilon", "v_prediction"):
        raise ValueError(
            "`pipeline` has to have a scheduler with `beta_schedule`, and `prediction_type` "
            f"epsilon or v_prediction, but {type(pipeline.scheduler).__name__} has "
            f"{schedule.get('beta_schedule')} and {predicts}."
        )
    if any(weight.is_meta for weight in pipeline.unet.parameters()):
        raise ValueError(
            "`pipeline` is offloaded by `enable_sequential_cpu_offload`, through which gradients "
            "cannot go; take `enable_model_cpu_offload`."
        )


def _text_models(pipeline: DiffusionPipeline) -> list[tuple]:
    """(tokenizer, text encoder), of which there are one or two."""
    first = [(pipeline.tokenizer, pipeline.text_encoder)]
    if not hasattr(pipeline, "text_encoder_2"):
        return first
    return [*first, (pipeline.tokenizer_2, pipeline.text_encoder_2)]


def _check_same_tokens(pipeline: DiffusionPipeline, tokenizers: Sequence, clip: AnyClip) -> None:
    words, ids = clip.text.words, clip.vocabulary.tolist()
    texts = [words.decode([token]) for token in ids]
    for tokenizer in tokenizers:
        read = tokenizer(texts, add_special_tokens=False).input_ids
        differ = [text for text, row, i in zip(texts, read, ids, strict=True) if row != [i]]
        if differ:
            raise ValueError(
                f"`clip`: the tokenizers of {clip.name} and {type(pipeline).__name__} differ in "
                f"{len(differ)} of {len(ids)} words, such as {differ[0]!r}, so that one prompt "
                "cannot be the same tokens for both; take the CLIP whose text encoder the "
                "pipeline has."
            )


def _check_span(timesteps: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(timesteps, (tuple, list)) or len(timesteps) != 2:
        raise TypeError(f"`timesteps` has to hold two numbers but is {timesteps!r}.")
    low, high = (check_number("timesteps", value, low=0) for value in timesteps)
    if not low < high <= 1:
        raise ValueError(f"`timesteps` has to rise and end at most at 1 but is {timesteps}.")
    return low, high


def _latents(
    pipeline: DiffusionPipeline, pictures: Sequence[Image.Image], batch_size: int
) -> torch.Tensor:
    """(n, channels, height, width) fp32 on the CPU, as the UNet knows them."""
    vae, size = pipeline.vae, pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor, dtype = pipeline.vae_scale_factor, vae.dtype
    latents = []
    # in float16 the VAE of XL makes NaN of ordinary images; `to` of diffusers would warn each time
    upcast = dtype == torch.float16 and vae.config.force_upcast
    try:
        if upcast:
            nn.Module.to(vae, torch.float32)
        for k in range(0, len(pictures), batch_size):
            pixels = pipeline.image_processor.preprocess(
                list(pictures[k : k + batch_size]), height * factor, width * factor, "crop"
            )
            posterior = vae.encode(pixels.to(pipeline._execution_device, vae.dtype)).latent_dist
            latents.append(posterior.mode().float().cpu())
    finally:
        if upcast:
            nn.Module.to(vae, dtype)
    return torch.cat(latents) * vae.config.scaling_factor


def _encode(
    encoder: nn.Module, ids: torch.Tensor, embeddings: torch.Tensor, start: int, xl: bool
) -> list[torch.Tensor]:
    """Ids, with embeddings in place of those from `start` on -> states, and pooled ones if any.

    The public forward does it all but for the swap, so that it stays right whatever is inside.
    """
    end = start + embeddings.shape[1]

    def swap(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :start], embeddings.to(output), output[:, end:]], dim=1)

    hook = encoder.get_input_embeddings().register_forward_hook(swap)
    try:
        output = encoder(ids.expand(len(embeddings), -1), output_hidden_states=xl)
    finally:
        hook.remove()
    if not xl:
        return [output[0]]
    return [output.hidden_states[-2], *([output[0]] if output[0].ndim == 2 else [])]


@contextmanager
def _frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No weight needs a gradient meanwhile, so that no activations are kept for it."""
    weights = [w for module in modules for w in module.parameters() if w.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
