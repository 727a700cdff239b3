"""The denoising loss of a diffusion model, given an image and a prompt, as a loss of the search."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..clip import AnyClip
from ..clip.images import ImageInput, load_images
from ..errors import ArgumentError, ArgumentTypeError, check_integer, check_number, check_string

# Prompts per call of the text encoders, where no gradients are needed.
_PROMPTS_AT_ONCE = 8

# The condition of a UNet: (rows, length, width) states, and for XL (rows, width) pooled ones.
Condition = list[torch.Tensor]


class DenoisingLoss:
    """The denoising loss of an image pipeline at noisy timesteps, an `extra_loss` of `invert`.

    The VAE encodes each image, noise is added, and the UNet predicts the noise (or the velocity)
    from the result and a prompt. The loss is the mean squared error of the prediction, divided by
    that with an empty prompt: below 1 the prompt helps. As in `prompt_inversion_sd` of the authors
    of "Hard Prompts Made Easy", the gradient goes through the UNet and the text encoders to the
    embeddings of the projected prompt. The prompt decides the content at late, noisy timesteps
    (PH2P, Mahajan et al., CVPR 2024, takes 500 to 900 of 1000).

    All prompts get the same timesteps and noise, so that losses of different steps compare. The
    pipeline stays unchanged; only the noise schedule of its scheduler is used.

    A step takes `samples` forward and backward passes of the UNet for each prompt and image, and
    memory for the activations of `batch_size` passes beside the models. Measured at the size of
    Stable Diffusion 1.5 in float32 on two CPU cores: 9 seconds per sample, so that a step with four
    takes 370 times as long as one of CLIP alone, and 2 GiB per sample of a batch; see
    benchmarks/results/denoising.md.

    Args:
        pipeline: built like Stable Diffusion 1.x, 2.x or XL: a UNet, an AutoencoderKL, one or two
            CLIP text encoders, a scheduler that predicts noise or velocity. Half precision and
            `enable_model_cpu_offload` are supported.
        images: the images of `invert`, scaled and cropped here to the size of the pipeline.
        clip: the CLIP of the search, with the tokens of the pipeline. With weight 1 only its tokens
            and vocabulary are used.
        weight: of this loss, above 0, at most 1; the similarity has the rest.
        samples: timesteps per image, each with its own noise; 1 or more.
        timesteps: their range, as fractions from 0 to 1 of the training timesteps. They are spread
            evenly.
        batch_size: samples per pass of the UNet, and images per pass of the VAE; 1 or more. More
            take more memory, and less time on a device that is not busy.
        shared: one prompt for all images, by the mean of their losses.
        generator: on the CPU; draws timesteps and noise. None: a new one with seed 0.

    Attributes:
        weight: of this loss.
        prompts: the number of prompts: one for each image, or 1 if `shared`.

    Raises:
        ArgumentError: an argument is out of range or of the wrong type, `pipeline` is of another
            kind, an image cannot be read, or the tokenizers of `pipeline` and `clip` differ.
    """

    refinable = False  # each swap would cost as much as a step of PEZ

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        images: ImageInput | Sequence[ImageInput] | torch.Tensor,
        clip: AnyClip,
        weight: float = 1.0,
        *,
        samples: int = 4,
        timesteps: tuple[float, float] = (0.5, 0.9),
        batch_size: int = 1,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.weight = check_number("weight", weight, 0, 1, above=True)
        _check_pipeline(pipeline)
        self._tokenizers, self._encoders = zip(*_text_models(pipeline), strict=True)
        self._example_token = clip.text.example_token
        _check_same_tokens(pipeline, self._tokenizers, clip)
        self._model = _Denoiser(pipeline, images, samples, timesteps, batch_size, generator)
        each = range(self._model.images)
        self._images = [list(each)] if shared else [[k] for k in each]
        self.prompts = len(self._images)

    @property
    def projection(self) -> float:
        """See `ExtraLoss`: that in the loss."""
        return self.weight

    @property
    def parts(self) -> list[tuple[int, float]]:
        """(columns, weight) of each text encoder."""
        widths = [encoder.get_input_embeddings().embedding_dim for encoder in self._encoders]
        return [(width, 1 / len(widths)) for width in widths]

    @property
    def token_embedding(self) -> torch.Tensor:
        """(vocab_size or more, columns) tables of the text encoders side by side, in fp32."""
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in self._encoders]
        # an encoder may have tokens of its own behind the common ones, such as textual inversions
        size = min(map(len, tables))
        return torch.cat([t[:size].float().to(self._model.device) for t in tables], dim=1)

    def objective(
        self, before: Sequence[int], after: Sequence[int], goals: Sequence[int]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """See `ExtraLoss`. The function computes its gradient together with its value."""
        pairs = self._pairs(goals)

        def loss(embeddings: torch.Tensor) -> torch.Tensor:
            here = embeddings.detach().to(self._model.device)
            layout = self._ids(before, here.shape[1], after), len(before) + 1
            with _frozen([self._model.pipeline.unet, *self._encoders]):
                with torch.no_grad():
                    condition = self._condition(here, *layout)
                wanted = torch.is_grad_enabled() and embeddings.requires_grad
                losses, gradients = self._model(condition, pairs, wanted)
                losses = losses.to(embeddings.device)
                if not wanted:
                    return losses
                gradient = self._back(here, gradients, *layout).to(embeddings.device)
            # adds 0 to the value, and the computed gradient to that of `embeddings`
            return losses + ((embeddings - embeddings.detach()) * gradient).sum((1, 2))

        return loss

    def losses(self, texts: Sequence[str], goals: Sequence[int]) -> torch.Tensor:
        """See `ExtraLoss`; by the pipeline's own `encode_prompt`."""
        losses = self._model.of_texts(texts, self._pairs(goals))
        self._model.pipeline.maybe_free_model_hooks()
        return losses

    def _pairs(self, owners: Sequence[int]) -> list[tuple[int, int]]:
        """(row, image) for each row and each image of its prompt."""
        return [(row, image) for row, owner in enumerate(owners) for image in self._images[owner]]

    def _ids(
        self, before: Sequence[int], prompt_len: int, after: Sequence[int]
    ) -> list[torch.Tensor]:
        """(1, length) ids for each encoder, with an example word in place of each learned token."""
        rows = []
        words = [*before, *[self._example_token] * prompt_len, *after]
        for tokenizer in self._tokenizers:
            length = tokenizer.model_max_length
            row = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
            if len(row) > length:
                raise ArgumentError(
                    "prompt_len",
                    f"is {prompt_len}, but beside the {len(words) - prompt_len} tokens of the "
                    "`caption` the text encoder of the pipeline has room for "
                    f"{max(length - 2 - len(words) + prompt_len, 0)}",
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
        """Gradients at the condition -> (rows, prompt_len, columns) gradients at the embeddings.

        Each encoder runs a second time, since with offloading it left the device for the UNet.
        """
        # half precision would lose small gradients
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
    """The denoising loss of images with prompts, divided by that with an empty prompt.

    A prompt with a loss below 1 helps to denoise the image.

    Args:
        pipeline, images, samples, timesteps, batch_size, generator: as in `DenoisingLoss`.
        prompts: one text or several.

    Returns:
        (prompts, images) losses.

    Raises:
        ArgumentError: as `DenoisingLoss`; there is no prompt.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ArgumentError("prompts", "is empty", "give at least one prompt")
    for text in texts:
        check_string("prompts", text)
    _check_pipeline(pipeline)
    model = _Denoiser(pipeline, images, samples, timesteps, batch_size, generator)
    each = [text for text in texts for _ in range(model.images)]
    pairs = [(row, row % model.images) for row in range(len(each))]
    losses = model.of_texts(each, pairs).view(len(texts), model.images)
    pipeline.maybe_free_model_hooks()
    return losses


class _Denoiser:
    """Noisy images and the errors of a pipeline's UNet in denoising them under a condition.

    Attributes:
        images: their number.
        batch_size: as in `DenoisingLoss`.
        device: of the pipeline's computations.
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
            raise ArgumentError("generator", f"has to be on the CPU but is on {generator.device}")
        pictures, _ = load_images(images)
        self.pipeline, self.batch_size, self.images = pipeline, batch_size, len(pictures)
        self.device = pipeline._execution_device
        # the pipeline's own scheduler may scale noisy images in another way
        schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
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

    def of_texts(self, texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(len(texts),) losses, with the condition of the pipeline's own `encode_prompt`."""
        with torch.inference_mode(False), torch.no_grad():
            states = []
            unique = list(dict.fromkeys(texts))
            for k in range(0, len(unique), _PROMPTS_AT_ONCE):
                states.append(
                    self.pipeline.encode_prompt(
                        prompt=unique[k : k + _PROMPTS_AT_ONCE],
                        device=self.device,
                        num_images_per_prompt=1,
                        do_classifier_free_guidance=False,
                    )
                )
            # encode_prompt returns pairs: the second of each belongs to the negative prompt
            condition = [torch.cat(part) for part in list(zip(*states, strict=True))[::2]]
            rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
            return self([part[rows] for part in condition], pairs)[0]

    def __call__(
        self, condition: Condition, pairs: Sequence[tuple[int, int]], gradients: bool = False
    ) -> tuple[torch.Tensor, Condition]:
        """Losses and their gradients at the condition, in batches.

        Args:
            condition: of n rows.
            pairs: (row, image); the loss of a row is the mean over its images.
            gradients: whether to compute them.

        Returns:
            (n,) losses and fp32 gradients of the shapes of `condition`, zero where not needed.
        """
        rows = len(condition[0])
        samples, pixels = self._noisy.shape[1], self._noisy[0, 0].numel()
        counts = torch.bincount(torch.tensor([row for row, _ in pairs]), minlength=rows)
        losses = torch.zeros(rows, device=self.device)
        found = [torch.zeros_like(part, dtype=torch.float32) for part in condition]
        pieces = torch.tensor([(*pair, k) for pair in pairs for k in range(samples)])
        for piece in pieces.split(self.batch_size):
            row, image, sample = piece.T.to(self.device)
            share = 1 / (self._empty[image] * counts[piece[:, 0]].to(row.device) * samples * pixels)
            leaves = [part[row].detach().requires_grad_(gradients) for part in condition]
            errors = self._errors(leaves, image, sample)
            losses.index_add_(0, row, errors.detach() * share)
            if gradients:
                # of the plain sum: half precision would lose the small gradients of the mean
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
            # the size of the image, the corner of its crop, and the size of the crop
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
    """Raise unless the pipeline is built like Stable Diffusion 1.x, 2.x or XL."""
    kind = type(pipeline).__name__
    if not isinstance(pipeline, DiffusionPipeline):
        raise ArgumentTypeError("pipeline", f"has to be a DiffusionPipeline but is {kind}")
    needed = ["unet", "vae", "scheduler", "tokenizer", "text_encoder"]
    kinds, added = [CLIPTextModel], None
    if hasattr(pipeline, "text_encoder_2"):
        needed += ["tokenizer_2", "text_encoder_2"]
        kinds, added = [CLIPTextModel, CLIPTextModelWithProjection], "text_time"
    if missing := [name for name in needed if getattr(pipeline, name, None) is None]:
        raise ArgumentError(
            "pipeline",
            f"has to have {', '.join(needed)}, as Stable Diffusion 1.x, 2.x and XL do, but {kind} "
            f"has no {', '.join(missing)}",
        )
    for (_, encoder), wanted in zip(_text_models(pipeline), kinds, strict=True):
        if not isinstance(encoder, wanted):
            raise ArgumentError(
                "pipeline",
                f"has to have a {wanted.__name__}, since only CLIP text encoders can be searched, "
                f"but {kind} has a {type(encoder).__name__}",
            )
    unet, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if unet.in_channels != channels or unet.addition_embed_type != added:
        raise ArgumentError(
            "pipeline",
            f"has to have a UNet with in_channels {channels} and addition_embed_type {added}, but "
            f"{kind} has {unet.in_channels} and {unet.addition_embed_type}",
            "give a text-to-image pipeline",
        )
    schedule = pipeline.scheduler.config
    predicts = schedule.get("prediction_type", "epsilon")
    if "beta_schedule" not in schedule or predicts not in ("epsilon", "v_prediction"):
        raise ArgumentError(
            "pipeline",
            "has to have a scheduler with a beta_schedule and the prediction_type epsilon or "
            f"v_prediction, but {type(pipeline.scheduler).__name__} has "
            f"{schedule.get('beta_schedule')} and {predicts}",
        )
    if any(weight.is_meta for weight in pipeline.unet.parameters()):
        raise ArgumentError(
            "pipeline",
            "is offloaded by enable_sequential_cpu_offload, which allows no gradients",
            "use enable_model_cpu_offload",
        )


def _text_models(pipeline: DiffusionPipeline) -> list[tuple]:
    """The one or two pairs of a tokenizer and a text encoder."""
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
            raise ArgumentError(
                "clip",
                f"has other tokens than the pipeline: the tokenizers of {clip.name} and "
                f"{type(pipeline).__name__} differ in {len(differ)} of {len(ids)} words, such as "
                f"{differ[0]!r}",
                "take the CLIP whose text encoder the pipeline has",
            )


def _check_span(timesteps: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(timesteps, (tuple, list)) or len(timesteps) != 2:
        raise ArgumentTypeError("timesteps", f"has to hold two numbers but is {timesteps!r}")
    low, high = (check_number("timesteps", value, 0, 1) for value in timesteps)
    if low >= high:
        raise ArgumentError("timesteps", f"has to rise but is {timesteps}")
    return low, high


def _latents(
    pipeline: DiffusionPipeline, pictures: Sequence[Image.Image], batch_size: int
) -> torch.Tensor:
    """(n, channels, height, width) fp32 latents on the CPU, at the scale of the UNet."""
    vae, size = pipeline.vae, pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor, dtype = pipeline.vae_scale_factor, vae.dtype
    latents = []
    # the VAE of XL overflows in float16; of Module, since `to` of diffusers would warn each time
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
    encoder: Any, ids: torch.Tensor, embeddings: torch.Tensor, start: int, xl: bool
) -> list[torch.Tensor]:
    """States, and pooled ones if any, of ids whose embeddings from `start` on are replaced.

    A hook replaces them inside the encoder's public forward, which does everything else.
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
    """Turn the gradients of weights off for a while, so that no activations are kept for them."""
    weights = [w for module in modules for w in module.parameters() if w.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
