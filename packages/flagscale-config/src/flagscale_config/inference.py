"""FlagScale's `inference:` section: one batch of prompts given to a model, the answers written to files.

Three shapes occur: a language model offline (`llm`, in vLLM's vocabulary), Emu3 and Emu3.5 (`llm` with keys
of their own), and pipelines of images, video or robot actions (`engine`). `generate` says what is asked.
The same `engine` and `generate` stand in the `serve:` section of a robot policy server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flagscale_config.base import (
    Bool,
    Float,
    Fraction,
    FrozenDict,
    FrozenMap,
    Int,
    Model,
    Natural,
    NonNegative,
    Port,
    Positive,
    Text,
)

__all__ = [
    "OWN_LLM_KEYS",
    "Generate",
    "Inference",
    "LanguageModel",
    "Pipeline",
    "Transformations",
    "one_or_more",
]

Level = Literal["debug", "info", "warning", "error", "critical"]
_Dtype = Literal["auto", "float16", "bfloat16", "float32", "torch.float16", "torch.bfloat16", "torch.float32"]


def _listed(value: Any) -> Any:
    """Let one text stand for a list of one."""
    return [value] if isinstance(value, str) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str | float])]
"""Several texts: a list, or one text."""


class LanguageModel(Model):
    """A language model run offline."""

    options: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """vLLM's options by name with underscores, typed as vLLM's parser types them."""
    save: Text | None = None
    """Folder for generated images (Emu3.5)."""
    vq_model: Text | None = None
    """Path of the vision tokenizer (Emu3, Emu3.5)."""


OWN_LLM_KEYS = frozenset(LanguageModel.model_fields) - {"options"}
"""Keys of `inference.llm` that are FlagScale's own; all others are vLLM's options."""


class FromPretrained(Model):
    """A class of a library and the arguments of its `from_pretrained`."""

    class_name: Text = Field(alias="class")
    """Dotted name, such as `diffusers.WanPipeline`."""
    from_pretrained: FrozenMap[str, Any] = Field(default_factory=FrozenDict)
    """Arguments of that class's own `from_pretrained`, as they are."""


class LogIO(Model):
    """Log what goes into and out of every module."""

    log_level: Level = "info"
    """Level at which it is logged."""


class StateScope(Model):
    """Keep the state of conditional and unconditional passes apart."""


class TimestepTracker(Model):
    """Count denoising steps."""


class Targets(Model):
    """Which modules are meant."""

    by_name: Texts
    """Patterns of module names, `*` for anything."""


class TaylorSeer(Model):
    """Predict the features of skipped denoising steps by a Taylor series."""

    order: Natural = 1
    """Order of the series."""
    warmup_steps: Natural | None = None
    """Denoising steps computed before the first skip."""
    skip_interval_steps: Positive | None = None
    """Steps predicted between two computed ones."""
    use_timestep_delta: Bool = False
    """Whether differences are divided by the distance in time."""
    targets: Targets | None = None
    """Modules whose features are predicted."""


class AdaSpaBasic(Model):
    """What is generated while the sparsity is searched."""

    model_id: Text | None = None
    """Model to load."""
    prompt: Text | None = None
    """Prompt of the search."""
    height: Positive | None = None
    """Pixels."""
    width: Positive | None = None
    """Pixels."""
    frames: Positive | None = None
    """Frames."""
    num_steps: Positive | None = None
    """Denoising steps."""
    seed: Int | None = None
    """Seed of the noise."""
    fps: Positive | None = None
    """Frames per second."""


class AdaSpaSearch(Model):
    """How sparse attention may become."""

    enable_log: Bool = False
    """Whether the search is logged."""
    num_layers: Positive | None = None
    """Attention layers of the model."""
    sparsity: Fraction | None = None
    """Part of the attention blocks left out."""
    search_steps: tuple[Natural, ...] | Natural | None = None
    """Denoising steps at which the pattern is searched again."""
    min_recall: Fraction | None = None
    """Smallest part of the attention mass that must remain."""
    block_size: Positive | None = None
    """Tokens per block."""
    sparsity_modes: tuple[Any, ...] | Text | None = None
    """Patterns tried."""


class AdaSpa(Model):
    """Leave out blocks of attention that matter little."""

    strict: Bool = False
    """Whether a module that cannot be changed is an error."""
    basic: AdaSpaBasic = AdaSpaBasic()
    """What is generated during the search."""
    adaspa: AdaSpaSearch = AdaSpaSearch()
    """How sparse attention may become."""


class Transformations(Model):
    """Changes applied to a pipeline, in the order given here."""

    LogIOTransformation: LogIO | None = None
    """Log inputs and outputs."""
    StateScopeTransformation: StateScope | None = None
    """Separate states."""
    TaylorSeerTransformation: TaylorSeer | None = None
    """Skip denoising steps."""
    TimestepTrackerTransformation: TimestepTracker | None = None
    """Count denoising steps."""
    AdaSpaTransformation: AdaSpa | None = None
    """Sparse attention."""


class Pipeline(Model):
    """A pipeline of images, video or robot actions."""

    model: Text
    """Name or path of the model."""
    loader: Literal["diffusers", "transformers", "pi0", "custom", "auto"] = "auto"
    """Library that loads it."""
    model_variant: Text | None = None
    """`pi0` or `pi0.5`."""
    tokenizer: Text | None = None
    """Path of the tokenizer."""
    stat_path: Text | None = None
    """Path of the data set's statistics."""
    torch_dtype: _Dtype | None = None
    """Number format."""
    device: Text | None = None
    """Device, such as `cuda`."""
    pipeline: FromPretrained | None = None
    """The pipeline's class, where the model does not name it."""
    components: FrozenMap[str, FromPretrained] = Field(default_factory=FrozenDict)
    """Parts of the pipeline loaded on their own, by name."""
    transformations: Transformations | None = None
    """Changes applied to it."""
    state_scopes: tuple[Text, ...] = ()
    """Names of the scopes that StateScopeTransformation keeps apart."""
    results_path: Text | None = None
    """Folder of the results."""
    output_format: Literal["image", "video", "action", "text"] | None = None
    """What comes out."""
    use_quantiles: Bool | None = None
    """Whether actions are normalised by quantiles."""
    host: Text | None = None
    """Address to listen at, when served."""
    port: Port | None = None
    """Port to listen at, when served."""
    uvicorn_log_level: Level | None = None
    """Log level of the server."""


class Generator(Model):
    """The random number generator of a pipeline."""

    seed: Int
    """Seed."""
    device: Text = "cpu"
    """Device it lives on."""


class Sampling(Model):
    """How the next token is chosen: vLLM's sampling parameters, and those of Emu3.5."""

    n: Positive | None = None
    """Answers per prompt."""
    max_tokens: Positive | None = None
    """Tokens generated at most."""
    min_tokens: Natural | None = None
    """Tokens generated at least."""
    temperature: NonNegative | None = None
    """Randomness; 0 always takes the most probable token."""
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Probability mass considered."""
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    """Tokens considered; 0 or -1 for all."""
    min_p: Fraction | None = None
    """Smallest probability relative to the most probable token."""
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    """Penalty for tokens that occurred."""
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    """Penalty by number of occurrences."""
    repetition_penalty: Annotated[Float, Field(gt=0)] | None = None
    """Factor against repetition; 1 for none."""
    seed: Int | None = None
    """Seed."""
    stop: Texts | None = None
    """Texts that end an answer."""
    stop_token_ids: tuple[Int, ...] | None = None
    """Tokens that end an answer."""
    bad_words: tuple[Text, ...] | None = None
    """Words that must not occur."""
    include_stop_str_in_output: Bool | None = None
    """Whether the stop text is part of the answer."""
    ignore_eos: Bool | None = None
    """Whether generation goes on after the end token."""
    logprobs: Annotated[Int, Field(ge=-1)] | None = None
    """Number of log-probabilities per token."""
    prompt_logprobs: Annotated[Int, Field(ge=-1)] | None = None
    """Number of log-probabilities per prompt token."""
    detokenize: Bool | None = None
    """Whether answers become text."""
    skip_special_tokens: Bool | None = None
    """Whether special tokens are left out of the text."""
    spaces_between_special_tokens: Bool | None = None
    """Whether special tokens are set apart by blanks."""
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None
    """Prompt tokens kept."""
    guidance_scale: NonNegative | None = None
    """Strength of classifier-free guidance (Emu3, Emu3.5)."""
    text_top_k: Positive | None = None
    """Text tokens considered (Emu3.5)."""
    text_top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Probability mass of text tokens considered (Emu3.5)."""
    text_temperature: NonNegative | None = None
    """Randomness of text tokens (Emu3.5)."""
    image_top_k: Positive | None = None
    """Image tokens considered (Emu3.5)."""
    image_top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Probability mass of image tokens considered (Emu3.5)."""
    image_temperature: NonNegative | None = None
    """Randomness of image tokens (Emu3.5)."""


class Instruction(Model):
    """What a robot is told."""

    task: Texts
    """One instruction per sequence of the batch."""


class Generate(Model):
    """What is asked of the model."""

    prompts: Texts | None = None
    """Prompts."""
    negative_prompt: Texts | None = None
    """What an image shall not show."""
    modality: Literal["image", "video", "audio", "text"] | None = None
    """Kind of the data beside the prompts."""
    mm_data: tuple[Any, ...] | Text | None = None
    """Files beside the prompts."""
    sampling: Sampling | None = None
    """How tokens are chosen."""
    generator: Generator | None = None
    """Random numbers of a pipeline."""
    height: Positive | None = None
    """Pixels."""
    width: Positive | None = None
    """Pixels."""
    num_frames: Positive | None = None
    """Frames of a video."""
    num_inference_steps: Positive | None = None
    """Denoising steps."""
    num_images_per_prompt: Positive | None = None
    """Images per prompt."""
    guidance_scale: NonNegative | None = None
    """Strength of the prompt."""
    true_cfg_scale: NonNegative | None = None
    """Strength of the prompt against the negative prompt."""
    max_sequence_length: Positive | None = None
    """Tokens of a prompt at most."""
    mode: Literal["U", "G"] | None = None
    """Emu3: understand or generate."""
    ratio: Text | None = None
    """Shape of the image: `default`, `auto`, `16:9`."""
    ratios: tuple[Text, ...] | None = None
    """Shapes of several images."""
    image_area: Positive | None = None
    """Pixels of an image."""
    task_type: Literal["t2i", "x2i", "howto", "story", "explore", "vla"] | None = None
    """Emu3.5's kind of task."""
    images: FrozenMap[str, Text] | tuple[Text, ...] | None = None
    """Image files: a list, or by camera."""
    images_keys: tuple[Text, ...] | None = None
    """Names of the cameras."""
    images_shape: tuple[Positive, ...] | None = None
    """Channels, height and width of an image."""
    state_key: Text | None = None
    """Name of the robot's state."""
    state_path: Text | None = None
    """File of the robot's state."""
    task_path: Text | None = None
    """File of the instruction."""
    rename_map: FrozenMap[str, Text] | None = None
    """Names in the data to names in the model."""
    batch_size: Positive | None = None
    """Sequences per batch."""
    action_dim: Positive | None = None
    """Numbers per action."""
    action_horizon: Positive | None = None
    """Actions per answer."""
    instruction: Instruction | None = None
    """What the robot is told."""
    extra_args: FrozenMap[str, Any] | None = None
    """Arguments of the pipeline's own call that this contract does not know, as they are."""


class InferenceLogging(Model):
    """How inference reports."""

    log_interval: Positive | None = None
    """Prompts between two reports."""
    log_level: Level | None = None
    """Least level shown."""
    log_dir: Text | None = None
    """Folder of the logs."""


def one_or_more(value: Any) -> Any:
    """Let one mapping stand for a list of one."""
    return [value] if isinstance(value, Mapping) else value


class Inference(Model):
    """An inference task."""

    llm: LanguageModel | None = None
    """A language model."""
    engine: Pipeline | None = None
    """Or a pipeline."""
    generate: tuple[Generate, ...] = ()
    """What is asked, one item per run."""
    logging: InferenceLogging | None = None
    """How it reports."""


class InferenceFile(Model):
    """The `inference:` section as it stands in a file."""

    llm: FrozenMap[str, Any] | None = None
    """A language model: vLLM's options, and `save` and `vq_model` of Emu3."""
    engine: Pipeline | None = None
    """A pipeline of images, video or robot actions."""
    generate: Annotated[
        tuple[Generate, ...], BeforeValidator(one_or_more, json_schema_input_type=Generate | list[Generate])
    ] = ()
    """What is asked: a mapping, or a list of them."""
    logging: InferenceLogging | None = None
    """How it reports."""
