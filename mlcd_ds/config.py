"""Every setting of train.py and of the tools, typed and validated; the one place where a default value stands.

Each class is one command's settings; its fields are the command's flags (`--num_positives 8`), read by `cli.py`.
What belongs to DeepSpeed (batch sizes, precision, ZeRO, clipping, optimizer, schedule) is not here but in the JSON
that `--deepspeed_config` names; `ds_config.py` reads it.
"""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
AllowPipe = Annotated[bool, Field(description="take tars from pipe:COMMAND, which runs that shell command")]
Overwrite = Annotated[bool, Field(description="evaluate sets anew whose result is there, too")]
DropPath = Annotated[
    Finite,
    Field(ge=0, lt=1, description="stochastic depth: rate of the last block, falling linearly to 0 at the first"),
]
Objective = Literal["mlcd", "mlc", "cd"]
MarginType = Literal["arc", "cos", "none"]
MarginGradient = Literal["straight_through", "exact"]


def split_paths(text: str) -> tuple[str, ...]:
    """The paths that '::' joins in --labels and --centers, one per head."""
    return tuple(part.strip() for part in text.split("::")) if "::" in text else (text,)


class Settings(BaseModel):
    """Base of all settings: immutable, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _layers_of(value: object) -> object:
    """all, selective, or a whole number from 0 on."""
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value not in (None, "all", "selective") and not is_number:
        raise ValueError("must be all, selective, or the number of blocks")
    return value


def _range_of(value: object) -> object:
    """10-15, or 10 for 10-10, as (10, 15)."""
    if not isinstance(value, str):
        return value
    first, dash, last = value.partition("-")
    numbers = (first, last if dash else first)
    if not all(number.isdigit() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise ValueError("must be steps like 10-15, counted from 1, the first not above the last")
    return tuple(int(number) for number in numbers)


class HeadConfig(Settings):
    """The class head (DESIGN section 1): objective, margin, sampling, and the optimizer of the centers."""

    objective: Objective = Field("mlcd", description="mlcd (eq. 5), mlc (eq. 4) or cd (eq. 3, nearest center alone)")
    num_positives: int = Field(8, ge=1, description="l: positives per image, the nearest centers of its label list")
    positives_drawn: int | None = Field(
        None,
        ge=1,
        description="draw this many of the num_positives anew at every visit of an image (cd: the nearest of those "
        "drawn); none: use all",
    )
    sample_rate: float = Field(0.1, gt=0, le=1, description="r: share of the classes that take part in a step")
    sample_budget: Literal["negatives", "total"] = Field(
        "negatives", description="r of the negatives beside all positives (the paper's |N'| = r|N|), or of all classes"
    )
    scale: Finite = Field(64.0, gt=0, le=256, description="S: logits are S times a cosine")
    margin: Finite = Field(
        0.3,
        ge=0,
        le=2.3,
        description="m: margin on the positives (radians for arc, whose fallback rises again above 2.33)",
    )
    margin_type: MarginType = Field("arc", description="arc: cos(theta+m); cos: cos(theta)-m; none")
    margin_gradient: MarginGradient = Field("straight_through", description="straight_through or exact")
    negative_filter: Finite | None = Field(None, gt=-1, le=1, description="ignore negatives with cosine above this")
    head_lr_scale: Finite = Field(1.0, gt=0, description="learning rate of the centers / that of the encoder")
    head_weight_decay: Finite | None = Field(None, ge=0, description="weight decay of the centers; none: the JSON's")
    head_grad_clip: Finite = Field(
        1.0, ge=0, description="norm, over all shards, to clip the centers' gradient at; 0: off"
    )
    head_precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the head's products; auto: bfloat16 on GPUs where the JSON enables bf16"
    )
    gather_precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the embeddings that ranks send each other; auto: as head_precision"
    )
    head_kernels: Literal["torch", "triton"] = Field(
        "torch",
        description="triton: fused kernels for GPUs, tested in Triton's interpreter, not yet measured on a GPU. "
        "Sums that need a maximum (scale + log K beyond 87) are made by torch all the same",
    )
    head_moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the centers' AdamW moments; bfloat16 is rounded stochastically"
    )
    workspace_mb: int | None = Field(
        None,
        ge=1,
        description="MB of logits that exist at one time; none: 128, or what 512 images need, up to 1400",
    )
    head_weights: tuple[float, ...] | None = Field(
        None, description="weight of each head's loss, one per folder of labels, separated by commas; none: all 1"
    )

    @property
    def labels_per_visit(self) -> int:
        """Labels of one head that an image brings along each time it is visited."""
        return self.num_positives if self.positives_drawn is None else self.positives_drawn

    @field_validator("head_weights", mode="before")
    @classmethod
    def _numbers(cls, value):
        if value is None:
            return None
        try:
            weights = tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError):
            weights = ()
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError("must be finite numbers above 0, separated by commas, like 1,0.5")
        return weights

    @model_validator(mode="after")
    def _draw(self):
        if self.labels_per_visit > self.num_positives:
            raise ValueError(
                f"--positives_drawn {self.positives_drawn} is more than the --num_positives {self.num_positives} to draw "
                "from: lower the first, or raise the second (the label files must store as many)"
            )
        return self


class EncoderWork(Settings):
    """What decides, beside an encoder's preset, the memory and the FLOPs of its training."""

    register_tokens: int = Field(0, ge=0, description="learned tokens beside class token and patches; not exportable")
    patch_dropout: Finite = Field(0.0, ge=0, lt=1, description="share of an image's patches left out in training")
    checkpoint_layers: Annotated[str | int | None, BeforeValidator(_layers_of)] = Field(
        None,
        description="activation checkpointing: all, so many first blocks, or selective (keeps matrix products); none: all "
        "where the JSON has the section activation_checkpointing",
    )


class EncoderOptions(EncoderWork):
    """How an encoder is trained beside what its preset says: what is left out at random, recomputed, compiled."""

    drop_path: DropPath = 0.0
    norm: Literal["torch", "apex"] = Field(
        "torch", description="layer norms: torch's, or the fused ones of NVIDIA's apex"
    )
    compile: bool = Field(False, description="torch.compile for each block; the first start takes a minute more")
    compile_cache: str | None = Field(
        None, description="folder where compiled code stays for the next start; none: compile_cache in the run folder"
    )

    @model_validator(mode="after")
    def _cache_needs_compile(self):
        if self.compile_cache is not None and not self.compile:
            raise ValueError(f"--compile_cache {self.compile_cache} only means something with --compile")
        return self


class RunSettings(Settings):
    """What training and fine-tuning have in common: data and its order, length, checkpoints, waits, what is told."""

    deepspeed_config: str = Field(
        description="DeepSpeed JSON (ds_configs/): batch, precision, ZeRO, optimizer, schedule"
    )
    shards: str = Field(description="image tars: brace expansion, glob, text file of paths, '::' joins several")
    output_dir: str = Field(description="the run folder")
    init_from: str | None = Field(
        None,
        description="run folder, or hf:FOLDER (CLIP or MLCD), to start the encoder from: its activation and norm_eps stay, "
        "its positions are resized",
    )
    image_size: int | None = Field(None, ge=8, description="pixels; none: the preset's")
    epochs: Finite | None = Field(None, gt=0, description="length of the run in epochs")
    samples: int | None = Field(None, gt=0, description="length of the run in samples")
    steps: int | None = Field(None, gt=0, description="length of the run in optimizer steps")
    default_epochs: Finite = Field(32.0, gt=0, description="length when none of epochs, samples, steps is given")
    warmup_steps: int = Field(2000, ge=0, description="steps of linear warm-up (at most a tenth of the run)")
    resume: Literal["auto", "never"] = Field("never", description="auto: go on from the last complete checkpoint")
    allow_changed: str | None = Field(
        None, description="what a resumed run may change though it enters the mathematics: names joined by commas"
    )
    seed: int = Field(0, ge=0, lt=2**31)
    workers: int = Field(4, ge=0, description="loader processes per rank")
    prefetch: int = Field(4, ge=1, description="pieces (of up to 256 images) that each worker reads ahead")
    crop_scale_min: Finite = Field(0.4, gt=0, le=1, description="smallest area share of the random resized crop")
    flip: bool = Field(True, description="random horizontal flips")
    shuffle_window: int = Field(16384, ge=1, description="samples within which a lane of the data plan is permuted")
    max_skipped_fraction: Finite = Field(0.01, ge=0, le=1, description="stop above this share of unusable samples")
    max_pixels: int = Field(50_000_000, ge=1, description="larger images are skipped, judged by their header")
    shard_cache: str | None = Field(None, description="folder for remote tars; needed for URLs")
    allow_pipe: AllowPipe = False
    save_every_steps: int = Field(1000, ge=1)
    keep_last: int = Field(3, ge=1, description="checkpoints kept")
    keep_every: int | None = Field(
        None, ge=1, description="steps; the checkpoints of its multiples are kept for good, beside the last ones"
    )
    max_failed_saves: int = Field(3, ge=1, description="stop when so many saves in a row could not be written")
    max_bad_steps: int = Field(
        5, ge=1, description="stop after so many steps in a row were skipped for a loss or gradient that is no number"
    )
    max_bad_steps_of_1000: int = Field(
        10, ge=1, description="stop when more than so many of the last 1000 were skipped"
    )
    log_every_steps: int = Field(10, ge=1)
    profile_steps: Annotated[tuple[int, int] | None, BeforeValidator(_range_of)] = Field(
        None,
        description="steps to profile, like 10-15, counted from 1: traces in profile/ of the run folder, and a table",
    )
    peak_tflops: Finite | None = Field(
        None, gt=0, description="TFLOP/s of a rank that MFU is a share of; none: of a large matrix product, measured"
    )
    timeout_minutes: Finite = Field(10.0, gt=0, description="longest wait for another rank, and for data")
    start_timeout_minutes: Finite = Field(
        30.0,
        gt=0,
        description="longest wait for another rank while the run starts, in its first step, and during saves; never less "
        "than timeout_minutes",
    )
    warn_data_wait_seconds: Finite = Field(60.0, gt=0, description="a longer wait for data is told while it lasts")
    expect_world_size: int | None = Field(None, ge=1, description="refuse to start with another number of ranks")

    @model_validator(mode="after")
    def _kept_are_saved(self):
        if self.keep_every is not None and self.keep_every % self.save_every_steps:
            raise ValueError(
                f"--keep_every {self.keep_every} is no multiple of --save_every_steps {self.save_every_steps}: only "
                "steps that are saved can be kept"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self):
        given = [name for name in ("epochs", "samples", "steps") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"--{' and --'.join(given)} all say how long the run is: give one of them")
        return self


class RunConfig(HeadConfig, EncoderOptions, RunSettings):
    """mlcd_ds/train.py."""

    objective: Literal["mlcd", "mlc", "cd", "clip"] = Field(
        "mlcd",
        description="mlcd (eq. 5), mlc (eq. 4), cd (eq. 3, nearest center alone), or clip (eq. 1): images against the "
        "captions in the tars, without labels",
    )
    tokenizer: str | None = Field(
        None, description="clip: tokenizer.json, or a transformers tokenizer folder; tools/train_tokenizer.py makes one"
    )
    text_model: str = Field("text_b", description="clip: text tower preset (text_b, text_l: CLIP's; text_toy)")
    lock_image: bool = Field(False, description="clip: keep the image tower of --init_from as it is (LiT)")

    labels: str = Field(
        "",
        description="folder of label shards, written by tools/assign_labels.py; '::' joins several, with a head for each; "
        "needed, but for clip",
    )
    model: str = Field("vit_b32", description="encoder preset")
    centers: str | None = Field(
        None,
        description="centers folder or centers.npy to start the head from, '::' joins one per labels folder; none: random",
    )
    allow_missing_shards: bool = Field(
        False, description="start without tars that are missing, up to max_skipped_fraction of the images"
    )
    histogram_every_steps: int = Field(100, ge=1, description="cosine histograms to TensorBoard (the paper's Fig. 3)")
    world_size: int | None = Field(None, ge=1, description="with --dry_run: the number of ranks to plan for")
    dry_run: bool = Field(False, description="print the startup card and stop")
    device: Literal["cpu", "cuda"] | None = Field(None, description="with --dry_run: what to plan for; none: as here")

    @property
    def labels_folders(self) -> tuple[str, ...]:
        """The folders of --labels, one per head; none where captions are trained on."""
        return split_paths(self.labels) if self.labels else ()

    @property
    def on_captions(self) -> bool:
        """Whether images are paired with captions rather than with labels."""
        return self.objective == "clip"

    @field_validator("labels", mode="after")
    @classmethod
    def _needed(cls, value: str, info: ValidationInfo):
        if not value and info.data.get("objective") != "clip":
            raise PydanticCustomError("missing", "Field required")
        return value

    @model_validator(mode="after")
    def _captions_or_labels(self):
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        given = [name for name, value in self if value != defaults[name]]
        if self.on_captions:
            idle = [name for name in ("labels", "centers", *HeadConfig.model_fields) if name in given]
            idle = [f"--{name}" for name in idle if name != "objective"]
            if idle:
                raise ValueError(
                    f"--objective clip learns from the captions in the tars and has no class head: {', '.join(idle)} "
                    "would do nothing. Leave out, or choose another objective"
                )
            if self.tokenizer is None:
                raise ValueError(
                    "--objective clip needs --tokenizer: a tokenizer.json or a transformers tokenizer folder, or train one "
                    "on the captions: python tools/train_tokenizer.py --shards TARS --output tokenizer.json"
                )
            if self.lock_image and self.init_from is None:
                raise ValueError("--lock_image keeps the image tower of --init_from: name a run, or hf:FOLDER, there")
            return self
        if idle := [f"--{name}" for name in ("tokenizer", "text_model", "lock_image") if name in given]:
            raise ValueError(f"{', '.join(idle)} is for --objective clip: add that, or leave it out")
        return self

    @model_validator(mode="after")
    def _one_of_each_per_head(self):
        folders = self.labels_folders
        centers = None if self.centers is None else split_paths(self.centers)
        if not all(folders):
            raise ValueError(f"--labels {self.labels!r} names an empty folder: write FOLDER or FOLDER::FOLDER")
        if centers is not None and (len(centers) != len(folders) or not all(centers)):
            raise ValueError(
                f"--centers {self.centers!r} names {sum(map(bool, centers))} centers, --labels {len(folders)} folders: give "
                "the centers of each folder, joined by '::', or none to start all heads from random centers"
            )
        if self.head_weights is not None and len(self.head_weights) != len(folders):
            raise ValueError(
                f"--head_weights names {len(self.head_weights)} weights, --labels {len(folders)} folders: give a weight for "
                "each folder, separated by commas, or none for all 1"
            )
        return self

    @model_validator(mode="after")
    def _for_a_plan(self):
        if self.world_size is not None and not self.dry_run:
            raise ValueError("--world_size only means something with --dry_run; a run takes it from the launcher")
        if self.device is not None and not self.dry_run:
            raise ValueError("--device only means something with --dry_run; a run takes a GPU where there is one")
        return self


class PlanConfig(EncoderWork, HeadConfig):
    """tools/plan.py. What it assumes of a machine stands here, and on the page that it prints."""

    model: str = Field(description="encoder preset")
    image_size: int | None = Field(None, ge=8, description="pixels; none: the preset's")
    num_classes: int = Field(1_000_000, ge=1, description="k")
    deepspeed_config: str = Field(description="DeepSpeed JSON (ds_configs/) to plan with")
    gpus: int = Field(ge=1, description="ranks")
    gpus_per_node: int = Field(8, ge=1, description="of one machine")
    gpu_gb: Finite = Field(80.0, gt=0, description="memory of one GPU, of which 8% are left alone")
    device: Literal["cuda", "cpu"] = Field("cuda", description="what to plan for")
    samples: int = Field(400_000_000, ge=1, description="images of an epoch")
    epochs: Finite = Field(32.0, gt=0, description="length of the run")
    tflops: Finite | None = Field(None, gt=0, description="of a large matrix product on one GPU; none: measured here")
    efficiency: Finite = Field(0.5, gt=0, le=1, description="share of that rate that the encoder reaches")
    head_efficiency: Finite = Field(0.5, gt=0, le=1, description="share of that rate that the head's products reach")
    memory_gb_per_s: Finite = Field(3000.0, gt=0, description="read or written by one GPU in its own memory")
    link_gb_per_s: Finite = Field(50.0, gt=0, description="of the network card of one GPU (400 Gb/s), 80% of it used")
    node_link_gb_per_s: Finite = Field(300.0, gt=0, description="of one GPU to others of its machine (NVLink)")
    latency_us: Finite = Field(3.0, ge=0, description="of one hop of a collective")
    images_per_core: Finite = Field(
        250.0, gt=0, description="decoded and cropped per core and second: docs/data.md has the measured ones"
    )
    cores_per_gpu: Finite = Field(12.0, gt=0, description="for the loader")
    suggest: bool = Field(False, description="print the JSON of the fastest configuration that fits")
    fake: bool = Field(False, description="take one step of rank 0's head in a pretended group and compare the bytes")


class FinetuneConfig(RunSettings):
    """tools/finetune.py."""

    deepspeed_config: str = Field(
        description="DeepSpeed JSON (ds_configs/): batch, precision, ZeRO, optimizer, WarmupCosineLR schedule"
    )
    shards: str = Field(description="training tars: braces, globs, text files of paths, '::' between several")
    test_shards: str = Field(description="tars to evaluate on after each epoch")
    init_from: str = Field(description="run folder, checkpoint, or hf:FOLDER (CLIP or MLCD) to start the encoder from")
    image_size: int | None = Field(None, ge=8, description="pixels; none: the encoder's; positions are resized")
    classes_key: str = Field(
        "classes", description="field of KEY.json with the list of the one true class; else KEY.cls"
    )
    num_classes: int | None = Field(
        None, ge=2, description="none: one more than the largest class of the training images"
    )
    dataset_name: str | None = Field(None, description="what the result calls --test_shards; none: the shards")
    default_epochs: Finite = Field(30.0, gt=0, description="length when none of epochs, samples, steps is given")
    warmup_steps: int = Field(1000, ge=0, description="steps of linear warm-up (at most a tenth of the run)")
    layer_decay: Finite = Field(
        0.65,
        gt=0,
        le=1,
        description="learning rate of a block / that of the block above it; the classifier has the JSON's",
    )
    label_smoothing: Finite = Field(0.1, ge=0, lt=1, description="share of the target that all classes get alike")
    mixup: Finite = Field(0.8, ge=0, description="alpha of mixup's Beta(alpha, alpha); 0: off")
    cutmix: Finite = Field(1.0, ge=0, description="alpha of CutMix's; both on: each takes half of the batches; 0: off")
    drop_path: DropPath = 0.0
    ema_decay: Finite = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a moving average of the weights that stays at each step, like 0.9999; it is evaluated and "
        "saved besides; 0: off",
    )
    mix_probability: Finite = Field(1.0, ge=0, le=1, description="share of the micro-batches that are mixed")
    workers: int = Field(4, ge=0, description="loader processes per rank; as many threads decode test images")
    crop_scale_min: Finite = Field(0.08, gt=0, le=1, description="smallest area share of the random resized crop")
    keep_last: int = Field(2, ge=1, description="checkpoints kept")


class DeepSpeedDefaults(Settings):
    """What the DeepSpeed JSON leaves out or calls "auto" (ds_config.py); these are no flags, the JSON is their place."""

    gradient_clipping: Finite = Field(1.0, ge=0, description="norm of the encoder's gradient")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW")
    eps: Finite = Field(1e-8, gt=0, description="AdamW")
    warmup_type: Literal["linear", "log"] = "linear"
    reduce_bucket_size: int = Field(
        50_000_000, ge=1, description="elements: large enough for full bandwidth, small enough to overlap and to fit"
    )
    prefetch_bucket_size: int = Field(50_000_000, ge=0, description="elements: about two blocks of ViT-H ahead")
    param_persistence_threshold: int = Field(100_000, ge=0, description="elements: biases and norms stay whole")
    tag_validation: Literal["Warn", "Ignore", "Fail"] = Field(
        "Fail", description="ranks disagree on a checkpoint's name"
    )
    tensorboard_folder: str = Field("tensorboard", description="below the run folder")
    csv_folder: str = Field("csv", description="below the run folder")


class ToyShardsConfig(Settings):
    """tools/make_toy_shards.py."""

    output_dir: str = Field(description="folder to write; gets train/ and test/")
    num_train: int = Field(4000, ge=1)
    num_test: int = Field(1000, ge=1)
    images_per_shard: int = Field(500, ge=1)
    image_size: int = Field(32, ge=16, description="pixels")
    seed: int = Field(0, ge=0)


class IndexShardsConfig(Settings):
    """tools/index_shards.py."""

    shards: str = Field(description="tars: braces, globs, text files of paths, '::' between several")
    shard_cache: str | None = Field(None, description="folder for remote tars; needed for URLs")
    allow_pipe: AllowPipe = False
    timeout_minutes: Finite = Field(60.0, gt=0, description="longest wait for another rank")


class TokenizerConfig(Settings):
    """tools/train_tokenizer.py."""

    shards: str = Field(description="tars with captions: KEY.txt, or KEY.json with a caption")
    output: str = Field(description="JSON file to write, for train.py's --tokenizer")
    vocab_size: int = Field(8192, ge=3, description="tokens at most, special ones included (CLIP: 49,408)")
    max_captions: int | None = Field(None, ge=1, description="captions to learn from at most; none: all")
    shard_cache: str | None = Field(None, description="folder for remote tars; needed for URLs")
    allow_pipe: AllowPipe = False
    force: bool = Field(False, description="replace output where it exists")


class FeaturesConfig(Settings):
    """tools/extract_features.py."""

    shards: str = Field(description="image tars: brace expansion, glob, text file of paths, '::' joins several")
    output_dir: str = Field(description="features folder (clip-retrieval's layout)")
    model: str = Field(
        "builtin:patches",
        description="builtin:patches, hf:PATH_OR_NAME (a transformers CLIP folder), or run:PATH (a run folder of ours)",
    )
    embedding: Literal["image", "mean"] = Field("image", description="mean: mean of image and text embedding (hf only)")
    batch_size: int = Field(256, ge=1, description="images per forward pass")
    workers: int = Field(0, ge=0, description="decoding threads beside the main one")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs")
    max_skipped_fraction: Finite = Field(0.01, ge=0, le=1, description="stop above this share of unusable images")
    fast_images: bool = Field(
        False, description="decode and crop 2 to 5 times as many images a second, 40 dB or more from the exact crops"
    )
    max_pixels: int = Field(50_000_000, ge=1)
    shard_cache: str | None = Field(None, description="folder for remote tars; needed for URLs")
    allow_pipe: AllowPipe = False
    patch_size: int = Field(6, ge=2, description="builtin:patches: side of a patch in pixels")
    dictionary_size: int = Field(512, ge=2, description="builtin:patches: number of dictionary patches")
    patch_features: int = Field(256, ge=1, description="builtin:patches: features of an image, at most")
    whitening_power: Finite = Field(
        0.25, ge=0, le=1, description="builtin:patches: components are divided by eigenvalue^this; 0.5 whitens fully"
    )
    images_to_fit: int = Field(4096, ge=2, description="builtin:patches: images sampled to learn from")
    patches_to_fit: int = Field(100_000, ge=100, description="builtin:patches: patches drawn to learn the dictionary")
    seed: int = Field(0, ge=0)
    timeout_minutes: Finite = Field(60.0, gt=0)


class ClusterConfig(Settings):
    """tools/cluster.py."""

    features: str | None = Field(
        None, description="features folder; needed, but for a dry run with num_features and dim"
    )
    output_dir: str | None = Field(None, description="centers folder; needed, but for a dry run")
    k: int = Field(1_000_000, ge=1, description="number of centers")
    iterations: int = Field(20, ge=1)
    max_points_per_center: int = Field(
        256, ge=1, description="use at most k times this many features (a stated sample)"
    )
    init: str = Field("random", description="random, kmeans++-subset, or an .npy of k rows to start from")
    assign: Literal["faiss", "torch", "ivf"] = Field(
        "faiss", description="search for the nearest center: faiss and torch are exact, ivf is approximate"
    )
    nprobe: int = Field(16, ge=1, description="ivf: lists that are looked into")
    drop_bad_rows: bool = Field(False, description="leave out features that are zero or no numbers, and count them")
    stop_below: Finite = Field(0.0, ge=0, le=1, description="end early when no more than this share of features moves")
    two_level: bool = Field(
        False, description="k-means inside coarse clusters, then over all centers: a fraction of the time"
    )
    coarse: int | None = Field(None, ge=1, description="with --two_level: coarse clusters; none: the root of k")
    refinements: int = Field(2, ge=0, description="with --two_level: iterations over all centers at the end")
    probes: int = Field(
        16,
        ge=0,
        description="with --two_level: nearest coarse clusters whose centers those look into; 0: all centers, each "
        "iteration at the price of a flat one",
    )
    seed: int = Field(0, ge=0)
    timeout_minutes: Finite = Field(60.0, gt=0, description="longest wait for another rank")
    dry_run: bool = Field(False, description="print memory, bytes, FLOPs and hours, and stop")
    num_features: int | None = Field(None, ge=1, description="dry run without --features: how many there will be")
    dim: int | None = Field(None, ge=1, description="dry run without --features: their dimensions")
    gpus: int | None = Field(None, ge=1, description="dry run: GPUs to plan for; none: the ranks of this start")
    tflops: Finite | None = Field(None, gt=0, description="dry run: of the search on one rank; none: measured here")
    link_gb_per_s: Finite | None = Field(None, gt=0, description="dry run: sent by a rank; none: measured here")
    disk_gb_per_s: Finite | None = Field(None, gt=0, description="dry run: read by a rank; none: measured here")
    prepare_gb_per_s: Finite | None = Field(
        None, gt=0, description="dry run: float16 made unit rows by a rank; none: measured here"
    )

    @model_validator(mode="after")
    def _inputs(self):
        if not self.dry_run:
            planning = ("num_features", "dim", "gpus", "tflops", "link_gb_per_s", "disk_gb_per_s", "prepare_gb_per_s")
            idle = [f"--{name}" for name in planning if getattr(self, name) is not None]
            if idle:
                raise ValueError(f"{', '.join(idle)} only plan: add --dry_run, or leave them out")
        elif self.features is None and None in (self.num_features, self.dim):
            raise ValueError("--dry_run needs --features, or --num_features and --dim")
        elif self.features is not None and (self.num_features, self.dim) != (None, None):
            raise ValueError("--num_features and --dim are for a --dry_run without --features, which says both")
        return self

    @model_validator(mode="after")
    def _levels(self):
        if not self.two_level:
            for name in ("coarse", "refinements", "probes"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"--{name} {getattr(self, name)} is for --two_level: add that, or leave it out")
        elif self.coarse is not None and self.coarse > self.k:
            raise ValueError(f"--coarse {self.coarse} is more than --k {self.k}: leave it out for the root of k")
        return self


class AssignConfig(Settings):
    """tools/assign_labels.py."""

    features: str = Field(description="features folder")
    centers: str = Field(description="centers folder")
    output_dir: str = Field(description="labels folder")
    top: int = Field(8, ge=1, description="l: nearest centers stored per image")
    threshold: Finite | None = Field(None, ge=-1, le=1, description="keep only centers with at least this cosine")
    batch_size: int = Field(4096, ge=1, description="images per search")
    assign: Literal["faiss", "torch", "ivf"] = Field("faiss", description="as for tools/cluster.py")
    nprobe: int = Field(64, ge=1, description="ivf: lists that are looked into")
    drop_bad_rows: bool = Field(
        False, description="give images whose features are zero or no numbers no label at all, and count them"
    )
    tar_of_key: int | None = Field(
        None,
        ge=1,
        description="so many first characters of a key name its tar (img2dataset: 5), for features files that do not "
        "hold one tar each; none: they do",
    )
    verify: int = Field(0, ge=0, description="recompute so many random images exactly and report the recall")
    seed: int = Field(0, ge=0, description="of the images that --verify draws")
    timeout_minutes: Finite = Field(60.0, gt=0, description="longest wait for another rank")


class InspectConfig(Settings):
    """tools/inspect_clusters.py."""

    shards: str = Field(description="image tars to look at, whose labels are there: all of them, or some")
    labels: str = Field(description="folder of label shards, written by tools/assign_labels.py")
    centers: str = Field(description="centers folder the labels are of")
    output: str = Field(description="HTML page to write")
    random_clusters: int = Field(6, ge=0, le=100, description="clusters shown, drawn among those with images")
    largest_clusters: int = Field(4, ge=0, le=100, description="clusters shown for their size")
    tightest_clusters: int = Field(4, ge=0, le=100, description="clusters shown for the highest mean cosine")
    loosest_clusters: int = Field(4, ge=0, le=100, description="clusters shown for the lowest mean cosine")
    nearest_images: int = Field(8, ge=1, le=32, description="thumbnails of a cluster")
    images: int = Field(8, ge=0, le=100, description="images shown with all their labels")
    images_per_label: int = Field(3, ge=1, le=16, description="thumbnails of each of their labels")
    thumbnail_pixels: int = Field(96, ge=16, le=256, description="longer side of a thumbnail")
    sample_images: int = Field(
        10_000, ge=1, le=1_000_000, description="images whose labels are compared with each other"
    )
    near_cosine: Finite = Field(0.9, ge=-1, le=1, description="two labels of an image count as near above this cosine")
    giant_factor: Finite = Field(10.0, gt=1, description="a cluster of more than this times the mean size is a giant")
    true_classes: Literal["auto", "yes", "no"] = Field(
        "auto", description="compare with the classes in the tars; auto: where the first labelled image has some"
    )
    classes_key: str = Field("classes", description="field of KEY.json with the list of true classes")
    class_names: str | None = Field(None, description="text file with the name of class 0, 1, ... a line each")
    max_pixels: int = Field(50_000_000, ge=1, description="larger images are not made thumbnails of")
    shard_cache: str | None = Field(None, description="folder for remote tars; needed for URLs")
    allow_pipe: AllowPipe = False
    seed: int = Field(0, ge=0, description="of the clusters and images that are drawn")


class CheckpointPathConfig(Settings):
    """tools/checkpoint.py verify, list."""

    path: str = Field(description="a run folder, or one checkpoint (run/checkpoints/step_000001000)")


class ReshardConfig(CheckpointPathConfig):
    """tools/checkpoint.py reshard."""

    world_size: int = Field(ge=1, description="number of ranks that the new run will have")
    output_dir: str = Field(description="new run folder; the run of --path stays as it is")


class ConsolidateConfig(CheckpointPathConfig):
    """tools/checkpoint.py consolidate."""

    output_dir: str = Field(description="folder to make, with encoder.safetensors and centers.safetensors")


class EvaluationConfig(Settings):
    """What tools that evaluate frozen features have in common."""

    model: str = Field(
        description="run:PATH, untrained:RUN_PATH, features:TRAIN+TEST, hf:FOLDER (CLIP, MLCD), builtin:FILE.npz"
    )
    train_shards: str | None = Field(
        None, description="tars whose KEY.json, .cls or .npy names the true classes; needed without --root"
    )
    test_shards: str | None = Field(None, description="tars to report on")
    root: str | None = Field(
        None, description="folder of evaluation sets in CLIP_benchmark's layout, in place of shards"
    )
    datasets: str = Field("all", description="with --root: names joined by commas, or all: CLIP's 27")
    dataset_name: str | None = Field(None, description="what results call --test_shards; none: the shards")
    output: str | None = Field(None, description="JSON to write; one that is newer than all inputs is kept")
    output_dir: str | None = Field(None, description="folder for a JSON per set, each kept like --output")
    overwrite: Overwrite = False
    cache: str | None = Field(
        None, description="folder for features, found again by hashes of weights and tars; needed with many ranks"
    )
    classes_key: str = Field("classes", description="field of KEY.json with the list of true classes")
    batch_size: int = Field(256, ge=1, description="images per forward pass")
    workers: int = Field(1, ge=1, description="decoding threads")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the encoder's products")
    max_skipped_fraction: Finite = Field(0.01, ge=0, le=1, description="stop above this share of unusable images")
    max_pixels: int = Field(50_000_000, ge=1)
    shard_cache: str | None = Field(None, description="folder for remote tars; needed for URLs")
    allow_pipe: AllowPipe = False
    timeout_minutes: Finite = Field(60.0, gt=0, description="longest wait for another rank")

    @model_validator(mode="after")
    def _one_place(self):
        shards = [f"--{name}" for name in ("train_shards", "test_shards") if getattr(self, name) is not None]
        if self.root is not None and shards:
            raise ValueError(f"--root and {' and '.join(shards)} both name images: give one of them")
        if len(shards) == 1:
            raise ValueError(f"{shards[0]} alone: --train_shards and --test_shards go together")
        if self.root is not None and self.output is not None:
            raise ValueError("--output is one file, --root may hold many sets: give --output_dir FOLDER")
        if self.root is not None and self.model.startswith("features:"):
            raise ValueError("--model features:TRAIN+TEST goes with --train_shards and --test_shards, not with --root")
        return self


class ProbeConfig(EvaluationConfig):
    """tools/linear_probe.py."""

    metric: Literal[
        "auto",
        "accuracy",
        "mean_per_class",
        "mean_average_precision",
        "11_point_mean_average_precision",
        "top1_top5",
        "roc_auc",
    ] = Field(
        "auto",
        description="what to report and pick lambda by; auto: as the paper does for its 27 sets, for others accuracy where "
        "every image has one class, else mean_average_precision",
    )
    max_iterations: int = Field(1000, ge=1, description="L-BFGS iterations")
    tolerance: Finite = Field(1e-6, gt=0, description="root of the loss per image that may be left to gain")
    validation_fraction: Finite = Field(
        0.2, gt=0, lt=1, description="share of the training images that picks lambda where the set has no val/"
    )
    lambda_min: Finite = Field(1e-6, gt=0, description="smallest lambda of the sweep (CLIP's range)")
    lambda_max: Finite = Field(1e6, gt=0, description="largest lambda of the sweep")
    lambda_coarse: int = Field(7, ge=1, description="log-spaced lambdas tried first")
    lambda_halvings: int = Field(4, ge=0, description="times the spacing is halved round the best: 4 gives 8 a decade")
    seed: int = Field(0, ge=0, description="of the validation split and of untrained weights")

    @model_validator(mode="after")
    def _range(self):
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"--lambda_min {self.lambda_min} is above --lambda_max {self.lambda_max}")
        return self


class KnnConfig(EvaluationConfig):
    """tools/knn.py."""

    k: str = Field("10,20,100,200", description="neighbours that vote, several joined by commas")
    temperature: Finite = Field(0.07, gt=0, description="a neighbour of cosine c has exp(c / temperature) votes")
    block_rows: int = Field(16_384, ge=1, description="training features that are compared at a time")
    seed: int = Field(0, ge=0, description="of untrained weights")


class TextEvaluationConfig(Settings):
    """What tools that evaluate an image and a text tower together have in common."""

    model: str = Field(description="run:RUN (a run on captions) or hf:FOLDER (a CLIPModel with its tokenizer)")
    root: str = Field(description="folder of evaluation sets in CLIP_benchmark's layout")
    datasets: str = Field("all", description="names of sets below the root, joined by commas; all: every one that fits")
    split: str = Field("test", description="folder of a set whose tars are evaluated")
    output_dir: str | None = Field(
        None, description="folder for a result JSON per set; one that is newer than all inputs is kept"
    )
    overwrite: Overwrite = False
    language: str = Field("en", description="of the texts, for the result files")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs")
    batch_size: int = Field(256, ge=1, description="images, and texts, per forward pass")
    workers: int = Field(1, ge=1, description="decoding threads")
    max_skipped_fraction: Finite = Field(0.01, ge=0, le=1, description="stop above this share of unusable images")
    max_pixels: int = Field(50_000_000, ge=1)
    shard_cache: str | None = Field(None, description="folder for remote tars; needed for URLs")
    timeout_minutes: Finite = Field(60.0, gt=0, description="longest wait for another rank")


class ZeroShotConfig(TextEvaluationConfig):
    """tools/zero_shot.py."""

    classnames: str | None = Field(None, description="file of class names; none: the set's classnames.txt")
    templates: str | None = Field(
        None, description="file of sentences with {c}; none: the set's zeroshot_classification_templates.txt"
    )
    classes_key: str = Field("classes", description="field of KEY.json with the list of true classes")


class RetrievalConfig(TextEvaluationConfig):
    """tools/retrieval.py."""

    recall_k: str = Field("1,5,10", description="ranks to report recall at, joined by commas")
    block_rows: int = Field(1024, ge=1, description="images, or texts, whose scores exist at one time")


class ExportConfig(Settings):
    """tools/export_hf.py."""

    run: str = Field(description="run folder, checkpoint, or folder with encoder.json")
    output_dir: str = Field(description="the folder to make")
    kind: Literal["auto", "mlcd", "clip", "clip_vision"] = Field(
        "auto",
        description="mlcd: MLCDVisionModel (rotary presets); clip: CLIPModel with its tokenizer, of a run on captions, else "
        "as clip_vision: CLIPVisionModelWithProjection (presets with learned positions)",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the weights")
    force: bool = Field(False, description="replace output_dir where it exists")


class VisualizeConfig(Settings):
    """tools/visualize_patches.py."""

    model: str = Field(description="run:PATH, untrained:RUN_PATH or hf:FOLDER (CLIP, MLCD)")
    images: str = Field(description="image files or tars: paths, braces, globs; '::' joins several")
    output_dir: str = Field(description="folder for a PNG per image, and contact_sheet.png with all of them")
    image_size: int | None = Field(None, ge=8, description="pixels to show an image to the encoder at; none: its own")
    limit: int = Field(16, ge=1, description="images at most, the first ones")
    foreground: bool = Field(True, description="leave patches black that the first component takes for background")
    together: bool = Field(
        False, description="one PCA over all images, for images of one kind: like parts get like colours; else one each"
    )
    layer: int | None = Field(None, ge=1, description="block whose output is shown; none: the last")
    tile_size: int = Field(224, ge=16, description="pixels a side of each picture")
    batch_size: int = Field(8, ge=1, description="images per forward pass")
    max_pixels: int = Field(50_000_000, ge=1)
    seed: int = Field(0, ge=0, description="of untrained weights")


class ReportConfig(Settings):
    """tools/report.py."""

    results: str = Field(description="folder of result JSON files, ours or CLIP_benchmark's; '::' joins several")
    output: str | None = Field(None, description="HTML page to write")
    markdown: str | None = Field(None, description="Markdown file to write; none: the tables are printed")
    names: str | None = Field(
        None,
        description="LABEL=PRETRAINED joined by commas: what to call runs, and in which order; none: as the files do",
    )
    compare: str | None = Field(
        None,
        description="two labels joined by a comma, for the bars: second minus first; none: the two, where there are two",
    )
    title: str = Field("Results", description="of the page")


def _floats_of(value: object) -> object:
    return tuple(float(part) for part in value.split(",")) if isinstance(value, str) else value


class ReproduceConfig(Settings):
    """tools/reproduce.py."""

    root: str = Field(description="folder with scenes64/ and cifar10/, each with train/ and test/ tars")
    output_dir: str = Field(description="folder for everything; the same command goes on there")
    deepspeed_config: str = Field("ds_configs/cpu.json", description="of every training")
    ranks: int = Field(2, ge=1, description="processes of a training, on this machine")
    jobs: int = Field(1, ge=1, description="encoders trained or tried at the same time, each by so many processes")
    model: str = Field("vit_toy64", description="encoder preset, of 64 pixels")
    text_model: str = Field("text_toy", description="text tower preset")
    steps: int = Field(2500, ge=20, description="optimizer steps of every encoder")
    lit_steps: int = Field(500, ge=20, description="optimizer steps of a text tower fitted to a locked encoder")
    k: int = Field(1000, ge=2, description="clusters of the comparison")
    scale: Finite = Field(64.0, gt=0, description="of the cosines in cd, mlc and mlcd: the paper's S")
    margin: Finite = Field(0.3, ge=0, lt=1.5, description="of arc, radians, in cd, mlc and mlcd")
    seeds: int = Field(3, ge=1, description="of the comparison")
    ablations: bool = Field(True, description="also other l, r and k")
    ablation_seeds: int = Field(1, ge=1, description="of each value that the comparison does not have")
    ablate_l: Annotated[tuple[float, ...], BeforeValidator(_floats_of)] = Field(
        (1, 2, 4, 8, 16), description="labels per image, joined by commas, as the next two"
    )
    ablate_r: Annotated[tuple[float, ...], BeforeValidator(_floats_of)] = Field(
        (0.01, 0.1, 1.0), description="shares of the negatives"
    )
    ablate_k: Annotated[tuple[float, ...], BeforeValidator(_floats_of)] = Field(
        (250, 1000, 4000), description="numbers of clusters"
    )


class ResultsTableConfig(Settings):
    """tools/results_table.py."""

    results: str = Field(description="NAME=FILE of each result, separated by commas")


def _numbers_of(value: object) -> object:
    return tuple(int(part) for part in value.split(",")) if isinstance(value, str) else value


Numbers = Annotated[tuple[int, ...], BeforeValidator(_numbers_of)]


class KillsConfig(Settings):
    """tools/soak.py kills."""

    output_dir: str = Field(description="folder for the runs; may be removed afterwards")
    kills: int = Field(100, ge=1, description="kills to survive")
    seed: int = Field(0, ge=0, description="of the moments")
    hours: Finite | None = Field(None, gt=0, description="stop after so long, however many kills that were")
    ranks: int = Field(2, ge=1, description="processes of each run")
    steps: int = Field(8, ge=2, description="optimizer steps of each run; every second one is saved")
    kills_per_run: int = Field(7, ge=1, description="a run is killed up to so often before it is left to end")
    zero_stages: Numbers = Field((0, 1, 2, 3), description="joined by commas, as the next two")
    workers: Numbers = Field((0, 2), description="loader processes per rank")
    accumulations: Numbers = Field((1, 2), description="micro-batches a step")
    output: str | None = Field(None, description="JSON to write with the counts")


class BenchHeadConfig(Settings):
    """tools/bench.py head."""

    shapes: str | None = Field(
        None, description="B256_K200000_D512_r0.1 each, joined by commas: global batch, classes, embedding, sample rate"
    )
    labels_per_image: int = Field(8, ge=1, description="L, distinct")
    ranks: int = Field(1, ge=1, description="processes on this machine, a shard of the classes each")
    repeats: int = Field(7, ge=1, description="rounds; each times every contender once")
    threads: int | None = Field(None, ge=1, description="of each rank; none: the cores divided by the ranks")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="of the products' factors, of shapes that do not end in _float32 or _bfloat16; none: bfloat16 on GPUs",
    )
    workspace_mb: int | None = Field(None, ge=1, description="the head's, as in train.py")
    kernels: Literal["torch", "triton"] = Field("torch", description="train.py's --head_kernels")
    materialised: bool = Field(True, description="also autograd on the whole [B, S] logits (with one rank)")
    timing: bool = Field(True, description="measure times")
    memory: bool = Field(False, description="measure peak memory, in fresh processes (with one rank)")
    memory_batches: str = Field(
        "1024,2048,4096,8192", description="batches to see the head's memory at, with K, D and r of each shape"
    )
    output: str | None = Field(None, description="JSON to write with all numbers")
    seed: int = Field(0, ge=0, lt=2**31)


class BenchKMeansConfig(Settings):
    """tools/bench.py kmeans."""

    points: int = Field(4096, ge=1, description="random features that each search looks for")
    k: int = Field(16_384, ge=1, description="random centers that it searches")
    d: int = Field(512, ge=1, description="dimensions")
    tops: str = Field("1,8", description="nearest centers wanted, several joined by commas")
    backends: str = Field("faiss,torch,ivf", description="searches (tools/cluster.py's --assign), joined by commas")
    nprobe: int = Field(16, ge=1, description="ivf: lists that are looked into")
    repeats: int = Field(7, ge=1, description="rounds; each times every contender once")
    threads: int | None = Field(None, ge=1, description="none: the cores")
    clock: Literal["wall", "cpu"] = Field(
        "wall", description="cpu: this process's CPU seconds, for CPUs that others use at the same time"
    )
    search: bool = Field(True, description="measure the searches")
    memory: bool = Field(False, description="measure the searches' peak memory, in fresh processes")
    lloyd: bool = Field(True, description="measure whole iterations against faiss.Kmeans")
    lloyd_points: int = Field(65_536, ge=1, description="features of a mixture that they cluster")
    lloyd_k: int = Field(2048, ge=1, description="centers that they find")
    lloyd_d: int = Field(128, ge=1, description="dimensions")
    lloyd_iterations: str = Field("1,5", description="iterations, several joined by commas")
    lloyd_repeats: int = Field(3, ge=1, description="rounds")
    levels: bool = Field(False, description="measure two levels against flat k-means")
    levels_points: int = Field(200_000, ge=1, description="features of a mixture that both cluster")
    levels_k: int = Field(8192, ge=1, description="centers that they find")
    levels_d: int = Field(128, ge=1, description="dimensions")
    levels_iterations: int = Field(20, ge=1, description="of flat k-means, and of the first level")
    levels_probes: str = Field("16,0", description="--probes of tools/cluster.py, several joined by commas")
    levels_repeats: int = Field(1, ge=1, description="rounds")
    iteration_points: int | None = Field(
        None,
        ge=1,
        description="float16 features on the device for one iteration; none: 10M on a GPU, not done on a CPU",
    )
    iteration_k: int = Field(1_000_000, ge=1)
    iteration_d: int = Field(768, ge=1)
    output: str | None = Field(None, description="JSON to write with all numbers")
    seed: int = Field(0, ge=0, lt=2**31)


class BenchDataConfig(Settings):
    """tools/bench.py data."""

    shards: str | None = Field(None, description="tars of photographs; none: pictures of 1600 x 1200 made for it")
    image_size: int = Field(224, ge=8, description="pixels a side to crop photographs to")
    images: int = Field(48, ge=1, description="photographs to decode at most (and to make)")
    small_images: int = Field(3000, ge=1, description="pictures of 32 x 32 to make")
    batch_size: int = Field(32, ge=1, description="of the whole loader")
    repeats: int = Field(5, ge=1, description="rounds; each times every contender once")
    output: str | None = Field(None, description="JSON to write with all numbers")
    seed: int = Field(0, ge=0, lt=2**31)


class BenchStepConfig(Settings):
    """tools/bench.py step."""

    presets: str | None = Field(None, description="encoders, joined by commas; none: vit_l14 on a GPU, vit_ti on a CPU")
    image_size: int | None = Field(None, ge=8, description="pixels; none: the preset's")
    micro_batches: Numbers | None = Field(None, description="images a step, joined by commas; none: 256, on a CPU 32")
    zero_stages: Numbers = Field((1,), description="joined by commas")
    checkpointing: str = Field("none", description="none, all, selective, or a number of blocks, joined by commas")
    compile: Literal["off", "on", "both"] = Field("off", description="torch.compile, as train.py's --compile")
    compile_cache: str | None = Field(None, description="folder of compiled code; none: torch's own")
    precision: Literal["float32", "bfloat16"] | None = Field(None, description="none: bfloat16 on a GPU")
    classes: int | None = Field(None, ge=8, description="of the head; none: a million on a GPU, 10,000 on a CPU")
    sample_rate: Finite = Field(0.1, gt=0, le=1, description="of the head")
    labels_per_image: int = Field(8, ge=1, description="L, distinct")
    peer: bool = Field(True, description="also transformers' CLIP encoder in the same engine (learned positions only)")
    data: Literal["fake", "real"] = Field(
        "fake", description="real: also the first setting's steps with images from tars"
    )
    shards: str | None = Field(None, description="tars for --data real; none: toy scenes made on the way")
    labels: str | None = Field(None, description="their labels")
    real_steps: int = Field(8, ge=1, description="steps in each turn of fake and real data")
    workers: int = Field(4, ge=0, description="loader processes of --data real")
    memory: bool = Field(False, description="measure peak memory on a CPU, each setting in a fresh process")
    peak_tflops: Finite | None = Field(
        None, gt=0, description="what MFU is a share of; none: a large product, in the run"
    )
    repeats: int = Field(7, ge=1, description="rounds; each times every setting once")
    threads: int | None = Field(None, ge=1, description="none: the cores")
    output: str | None = Field(None, description="JSON to write with all numbers")
    seed: int = Field(0, ge=0, lt=2**31)


class SoakMutationsConfig(Settings):
    """tools/soak_mutations.py."""

    count: int = Field(6000, ge=1, description="damaged files to read, tars and label files in turn")
    output: str | None = Field(None, description="JSON to write with the counts")
    seed: int = Field(0, ge=0, lt=2**31)
