"""Training recipes: functions with a frozen, complete configuration as result.

Name and values of a recipe are recorded in the exported checkpoint's manifest and model card. A run resumes only with
its original recipe. Values are checked at construction: a wrong type or an unknown name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hyper_model.engine_environment import native_dtype
from hyper_model.errors import HyperError

TraceStyle = Literal["explicit", "short", "direct"]
"""Contents of traces (`tokens.in_style`): everything, reasoning without perception, or only the answer."""


REWARD_WEIGHTS: Mapping[str, float] = {
    "accuracy": 1.0,
    "format": 0.2,
    "fidelity": 0.2,
    "alignment": 0.5,
    "length": 0.5,
    "environment": 0.2,
    "speakers": 0.2,
    "transcript": 0.2,
}
"""Default weight of every reward of `training.rl.rewards`; the first five are the paper's code, the others are ours."""


class RecipeError(HyperError):
    """A setting is refused; the message names the setting, the received value and the accepted ones."""


def _complete(weights: Mapping[str, float]) -> dict[str, float]:
    """Add the default weight of every reward without one, and refuse unknown names."""
    unknown = [name for name in weights if name not in REWARD_WEIGHTS]
    if unknown:
        raise ValueError(f"unknown reward {', '.join(unknown)}; the rewards are {', '.join(REWARD_WEIGHTS)}")
    return {**REWARD_WEIGHTS, **weights}


_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class LengthRange:
    """Trace lengths, in visible tokens, of the full length reward.

    Attributes:
        min_tokens, max_tokens: Bounds of the full reward.
        ramp_tokens: Distance outside the bounds over which the reward falls to 0. The fall is smooth, because the paper
            saw a collapse at a sharp edge.
    """

    min_tokens: int = 60
    max_tokens: int = 400
    ramp_tokens: int = 60


@dataclass(frozen=True, config=_STRICT)
class Decoder:
    """Shape of a Qwen2 decoder, trained from scratch below Whisper's encoder.

    Attributes:
        vocab_size: 0 takes the vocabulary of the initial checkpoint.
        latent_tokens: Length of a pause's span.
        has_position_tokens: True if each position of a span has its own token, in addition to `vocab_size`. Otherwise
            all positions are copies of the pause token.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    latent_tokens: int
    has_position_tokens: bool = False


@dataclass(frozen=True, config=_STRICT)
class Spelling:
    """Settings of the projector's pretraining (`training/sft/projector_ctc.py`).

    Attributes:
        freezes_embedding: True keeps the embedding unchanged, for a pretrained decoder.
        dropout_states: Share of audio tokens blanked.
        sound_weight: Weight of a second loss beside CTC, in nats per clip: the mean of a clip's rows points at the name
            of its background class, and at "woman" and "man" if they speak. 0 leaves it out.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    freezes_embedding: bool = False
    dropout_states: float = 0.0
    sound_weight: float = 0.0


@dataclass(frozen=True, config=_STRICT)
class Talk:
    """Settings of the sequences of a pretrained decoder behind Whisper base (`training/sft/talk.py`).

    Attributes:
        num_clips: Number of different talk clips before a repetition.
        answer_share: Share of the talk clips with an answer after the transcript.
        first_clip: Index of the first talk clip, for a run that continues from trained parts.
        first_scene: As `first_clip`, for scenes.
        num_scenes: Number of different scenes before a repetition.
        scene_share: Share of scenes among the clips; a scene has a whole trace.
        foreign_share: Share of transcripts after a question and choices about another clip. The transcript then
            depends less on the question.
        hint_share: Share of clips with a context in the prompt, right or wrong (`training/sft/hints.py`).
    """

    num_clips: int
    answer_share: float
    first_clip: int = 0
    first_scene: int = 0
    num_scenes: int = 0
    scene_share: float = 0.0
    foreign_share: float = 0.0
    hint_share: float = 0.0


@dataclass(frozen=True, config=_STRICT)
class Lora:
    """Settings of adapters: rank, scale (alpha / rank) and adapted projections.

    Attributes:
        trains_projector: True also trains the whole audio projector.
    """

    rank: int
    alpha: int
    dropout: float = 0.0
    trains_projector: bool = False
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, config=_STRICT)
class Run:
    """Settings common to both stages.

    Attributes:
        batch_size: Sequences (Stage I) or prompts (Stage II) per step, over all ranks.
        rows_at_once: Sequences per micro batch; fewer cost time and change nothing else.
        dtype: Dtype of the weights in training. With bfloat16, the optimizer keeps float32 copies.
        export_dtype: Dtype of the exported checkpoint.
        autocast: Run float32 weights in bfloat16 (GPU).
        fsdp: transformers' setting, such as "full_shard"; "" keeps the whole model on every rank.
        shown: Figures of the log in the progress bar.
    """

    name: str
    seed: int
    num_steps: int
    batch_size: int
    rows_at_once: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    adam_beta2: float
    max_grad_norm: float
    save_every_steps: int
    log_every_steps: int
    dtype: Literal["float32", "bfloat16"]
    export_dtype: Literal["float32", "bfloat16"]
    autocast: bool
    gradient_checkpointing: bool
    fsdp: str
    lora: Lora | None
    shown: tuple[str, ...]


@dataclass(frozen=True, config=_STRICT)
class SftRecipe(Run):
    """Settings of Stage I: cross entropy on perceptual traces.

    Attributes:
        decoder: Shape of a decoder from scratch, for built clips; None trains a checkpoint on a data set.
        spelling: Pretraining of the projector on built clips; None skips it.
        dropout_states: Share of audio tokens blanked in training, in short spans, so that a word depends on several
            states.
        speech_share: Share of single sentences of open text among the sequences, in the first and in the last step,
            with linear interpolation. The others are scenes.
        pause_share: Share of sequences with latent spans, at possible positions of the gate.
        cut_share: Share of open-text sentences with a trace cut after the transcript, in the first and in the last
            step. The rest of the trace teaches no words and takes a third of the time. Only explicit traces are cut.
        trace_style: Contents of the traces.
        pause_mode: Form of a latent span in built clips; for data sets, the checkpoint's manifest decides.
        wrong_words: Share of wrong input tokens in SPEAKER and ASR of built clips' traces; the targets stay correct.
            One misrecognised word then does not mislead the decoder about its position in the clip (scheduled sampling,
            Bengio et al. 2015, without a second pass).
        read_size: Additional sequences per step without audio (`training/data/text_scenes.py`): CAPTION is input, the
            following sections are targets. Requires explicit traces, since other styles have no CAPTION.
        talk: Aligns a pretrained decoder of a composed checkpoint on talk; None trains on scenes or a data set.
        section_weights: Weight of the targets inside a section by its name; others have weight 1. A short section such
            as ENV is otherwise a small part of the loss.
    """

    decoder: Decoder | None
    spelling: Spelling | None
    dropout_states: float
    speech_share: tuple[float, float]
    pause_share: float
    cut_share: tuple[float, float]
    trace_style: TraceStyle = "explicit"
    pause_mode: Literal["parallel", "sampled"] = "parallel"
    wrong_words: float = 0.0
    read_size: int = 0
    talk: Talk | None = None
    section_weights: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, config=_STRICT)
class GrpoRecipe(Run):
    """Settings of Stage II (method, section 6).

    Attributes:
        group_size: Rollouts per prompt.
        temperature: Sampling temperature of the rollouts.
        max_tokens: Visible tokens per rollout.
        max_pauses: Pause budget per rollout; 0 trains without pauses.
        wanted_pauses: Target of pauses per rollout for the moving threshold; 0 keeps the checkpoint's threshold.
        kl_weight: Beta of the KL divergence to the initial policy.
        loss: Token weights: `grpo` (equal per rollout), `dapo` (equal per token), `dr_grpo` (equal per token, by a
            constant).
        clip_low, clip_high: Bounds 1 - low and 1 + high of the ratio to the sampling policy.
        updates_per_rollout: Optimizer steps per set of rollouts.
        max_importance: Upper limit of the importance weight of trainer to sampler.
        max_gap: Limit of the mean difference of their log-probabilities; three consecutive steps above it end the run.
        max_redraws: Maximum number of redraws per step for groups of equal rewards.
        overlong: Treatment of truncated rollouts: `mask` excludes them from the loss, `keep` uses their reward.
        collapse_length, collapse_format: The run ends if the smoothed length, or the share of strict traces, falls
            below this share of its initial value.
        lgc_weights: Weight advantages by the confidence of their rollouts.
        weights: Weight of each reward by its name; rewards without one have their default of `REWARD_WEIGHTS`.
        trace_length: Trace lengths of the full length reward.
        backend: Sampler of the rollouts.
        gpu_memory_utilization: The engine's share of each GPU's memory; the trainer needs the rest.
        scales_rewards: Divide the advantages by the group's deviation (GRPO, Shao et al. 2024). A group of nearly equal
            rewards then counts as much as one of right and wrong answers. Otherwise the advantage is reward minus mean,
            as in the method. `dr_grpo` never divides.
    """

    group_size: int
    temperature: float
    max_tokens: int
    max_pauses: int
    wanted_pauses: float
    kl_weight: float
    loss: Literal["grpo", "dr_grpo", "dapo"]
    clip_low: float
    clip_high: float
    updates_per_rollout: int
    max_importance: float
    max_gap: float
    max_redraws: int
    overlong: Literal["mask", "keep"]
    collapse_length: float
    collapse_format: float
    lgc_weights: bool
    weights: Annotated[dict[str, float], AfterValidator(_complete)] = field(default_factory=lambda: {**REWARD_WEIGHTS})
    trace_length: LengthRange = field(default_factory=LengthRange)
    backend: Literal["vllm", "transformers"] = "vllm"
    gpu_memory_utilization: float = 0.3
    scales_rewards: bool = True

    @property
    def divides_advantages(self) -> bool:
        """Return True if the group's deviation divides the advantages."""
        return self.scales_rewards and self.loss != "dr_grpo"


def mini_sft() -> SftRecipe:
    """Return Stage I of the embedded checkpoint: Whisper-tiny states, five layers of width 320, on two cores."""
    return SftRecipe(
        name="mini_sft",
        seed=0,
        num_steps=9_000,
        batch_size=32,
        rows_at_once=32,
        learning_rate=1.0e-3,
        min_learning_rate=3e-5,
        warmup_steps=200,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        save_every_steps=250,
        log_every_steps=20,
        dtype=native_dtype(),
        export_dtype="bfloat16",
        autocast=False,
        gradient_checkpointing=False,
        fsdp="",
        lora=None,
        shown=("loss", "step_s"),
        decoder=Decoder(vocab_size=4_096, hidden_size=320, num_layers=5, num_heads=4, ffn_size=896, latent_tokens=8),
        spelling=Spelling(num_steps=600, batch_size=48, learning_rate=3e-3),
        dropout_states=0.04,
        speech_share=(1.0, 0.25),
        pause_share=0.25,
        cut_share=(1.0, 0.0),
        wrong_words=0.06,
        read_size=32,
    )


def mini_grpo() -> GrpoRecipe:
    """Return Stage II of the embedded checkpoint, on two cores."""
    return GrpoRecipe(
        name="mini_grpo",
        seed=0,
        num_steps=300,
        batch_size=4,
        rows_at_once=32,
        learning_rate=1e-5,
        min_learning_rate=1e-6,
        warmup_steps=5,
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        save_every_steps=25,
        log_every_steps=1,
        dtype=native_dtype(),
        export_dtype="bfloat16",
        autocast=False,
        gradient_checkpointing=False,
        fsdp="",
        lora=None,
        shown=("reward", "kl", "pauses", "step_s"),
        group_size=8,
        temperature=1.0,
        max_tokens=320,
        max_pauses=3,
        wanted_pauses=0.75,
        kl_weight=0.05,
        loss="dapo",
        clip_low=0.2,
        clip_high=0.28,
        updates_per_rollout=1,
        max_importance=2.0,
        max_gap=0.05,
        max_redraws=2,
        overlong="keep",
        collapse_length=0.5,
        collapse_format=0.7,
        lgc_weights=True,
    )


def small_sft() -> SftRecipe:
    """The alignment of hyper-small: Whisper base, SmolLM2-135M-Instruct with adapters, on one core."""
    return SftRecipe(
        name="small_sft",
        seed=0,
        num_steps=1_300,
        batch_size=8,
        rows_at_once=5,
        learning_rate=6e-4,
        min_learning_rate=5e-5,
        warmup_steps=60,
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        save_every_steps=100,
        log_every_steps=10,
        dtype=native_dtype(),
        export_dtype="bfloat16",
        autocast=False,
        gradient_checkpointing=False,
        fsdp="",
        lora=Lora(rank=32, alpha=64, trains_projector=True),
        shown=("loss", "step_s"),
        decoder=None,
        spelling=Spelling(
            num_steps=500, batch_size=48, learning_rate=4e-3, freezes_embedding=True, dropout_states=0.05
        ),
        dropout_states=0.05,
        speech_share=(0.0, 0.0),
        pause_share=0.1,
        cut_share=(0.0, 0.0),
        read_size=2,
        talk=Talk(num_clips=20_000, answer_share=0.15),
    )


def small_traces() -> SftRecipe:
    """The second part of hyper-small's Stage I: whole traces of scenes, besides transcripts and reading."""
    return replace(
        small_sft(),
        name="small_traces",
        num_steps=3_000,
        learning_rate=4e-4,
        min_learning_rate=3e-5,
        warmup_steps=30,
        spelling=Spelling(
            num_steps=1_000,
            batch_size=48,
            learning_rate=1e-3,
            freezes_embedding=True,
            dropout_states=0.05,
            sound_weight=2.0,
        ),
        wrong_words=0.05,
        talk=Talk(
            num_clips=20_000,
            # A talk trace with an answer is not strict, and a run with such traces wrote them in a quarter of its
            # replies (docs/LOG.md).
            answer_share=0.0,
            first_clip=8_000,
            num_scenes=20_000,
            scene_share=0.75,
            foreign_share=0.5,
            hint_share=0.5,
        ),
        section_weights={"ENV": 10.0, "SPEAKER": 1.5, "REASONING": 2.0, "SUMMARY": 2.0, "RESPONSE": 3.0},
    )


def qwen2_audio_7b_sft() -> SftRecipe:
    """Return Stage I of the paper: Qwen2-Audio-7B on PAQA (7,470 items, three epochs), on 8 GPUs of 80 GB."""
    return SftRecipe(
        name="qwen2_audio_7b_sft",
        seed=0,
        num_steps=700,
        batch_size=32,
        rows_at_once=2,
        learning_rate=1e-5,
        min_learning_rate=1e-6,
        warmup_steps=35,
        weight_decay=0.01,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        save_every_steps=100,
        log_every_steps=5,
        dtype="float32",
        export_dtype="bfloat16",
        autocast=True,
        gradient_checkpointing=True,
        fsdp="full_shard",
        lora=None,
        shown=("loss", "step_s"),
        decoder=None,
        spelling=None,
        dropout_states=0.0,
        speech_share=(0.0, 0.0),
        pause_share=0.25,
        cut_share=(0.0, 0.0),
    )


def qwen2_audio_7b_grpo() -> GrpoRecipe:
    """Return Stage II of the paper on AVQA: groups of 8, learning rate 1e-6, KL 0.1, 1,000 steps of 16 prompts."""
    return GrpoRecipe(
        name="qwen2_audio_7b_grpo",
        seed=0,
        num_steps=1_000,
        batch_size=16,
        rows_at_once=2,
        learning_rate=1e-6,
        min_learning_rate=1e-6,
        warmup_steps=10,
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        save_every_steps=50,
        log_every_steps=1,
        dtype="float32",
        export_dtype="bfloat16",
        autocast=True,
        gradient_checkpointing=True,
        fsdp="full_shard",
        lora=None,
        shown=("reward", "kl", "pauses", "step_s"),
        group_size=8,
        temperature=1.0,
        max_tokens=1_024,
        max_pauses=3,
        wanted_pauses=0.0,
        kl_weight=0.1,
        loss="grpo",
        clip_low=0.2,
        clip_high=0.28,
        updates_per_rollout=1,
        max_importance=2.0,
        max_gap=0.05,
        max_redraws=2,
        overlong="keep",
        collapse_length=0.5,
        collapse_format=0.7,
        lgc_weights=True,
        scales_rewards=False,
    )


def mini_finetune() -> SftRecipe:
    """Return Stage I of a small checkpoint on a user's data set, on two cores or one GPU."""
    return replace(
        qwen2_audio_7b_sft(),
        name="mini_finetune",
        num_steps=300,
        batch_size=16,
        rows_at_once=16,
        learning_rate=2e-4,
        min_learning_rate=2e-5,
        warmup_steps=20,
        log_every_steps=1,
        save_every_steps=50,
        dtype=native_dtype(),
        autocast=False,
        gradient_checkpointing=False,
        fsdp="",
    )


def debug() -> SftRecipe:
    """Return a few steps of a tiny decoder, for tests."""
    return replace(
        mini_sft(),
        name="debug",
        num_steps=6,
        batch_size=2,
        rows_at_once=2,
        min_learning_rate=1e-4,
        warmup_steps=2,
        weight_decay=0.01,
        save_every_steps=3,
        log_every_steps=1,
        decoder=Decoder(vocab_size=700, hidden_size=64, num_layers=2, num_heads=1, ffn_size=128, latent_tokens=4),
        spelling=Spelling(num_steps=4, batch_size=8, learning_rate=2e-3),
        dropout_states=0.0,
        speech_share=(0.0, 0.0),
        pause_share=0.5,
        wrong_words=0.0,
        read_size=0,
    )


def debug_grpo() -> GrpoRecipe:
    """Return a few steps of Stage II on a small checkpoint, for tests."""
    return replace(
        mini_grpo(),
        name="debug_grpo",
        num_steps=4,
        batch_size=2,
        rows_at_once=8,
        warmup_steps=1,
        save_every_steps=2,
        dtype="float32",
        export_dtype="float32",
        group_size=4,
        max_tokens=160,
        max_pauses=2,
        wanted_pauses=1.0,
        kl_weight=0.1,
        loss="grpo",
        max_gap=1e-3,
        max_redraws=1,
        collapse_length=0.1,
        collapse_format=0.0,
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        mini_sft,
        small_sft,
        small_traces,
        mini_finetune,
        mini_grpo,
        qwen2_audio_7b_sft,
        qwen2_audio_7b_grpo,
        debug,
        debug_grpo,
    )
}

Recipe = SftRecipe | GrpoRecipe
R = TypeVar("R", bound=Recipe)


def with_settings(recipe: R, settings: Sequence[str]) -> R:
    """Return the recipe with `NAME=VALUE` settings applied in order.

    For a text setting, the value is text, else JSON. An object changes only the named entries of a nested setting:
    `weights={"fidelity": 0.0}` keeps the other weights.

    Raises:
        RecipeError: A name is unknown, or a value is not accepted.
    """
    known = [each.name for each in fields(recipe) if each.name != "name"]
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in known:
            raise RecipeError(f"{setting!r}: NAME must be one of {', '.join(known)}")
        values = asdict(recipe)
        before: Any = values[name]
        try:
            value: Any = text if isinstance(before, str) else json.loads(text)
        except ValueError as error:
            raise RecipeError(f"{setting!r}: {text!r} is not a JSON value") from error
        if isinstance(before, dict) and isinstance(value, dict):
            value = {**before, **value}
        values[name] = value
        try:
            recipe = _from_json(type(recipe), values)
        except ValidationError as error:
            raise RecipeError(f"{setting!r}: {_explain(error)}") from error
    return recipe


def recipe_from_dict(kind: type[R], values: Mapping[str, Any]) -> R:
    """Return a recipe from its values in JSON form; newer settings have their defaults.

    Raises:
        RecipeError: The values are not a recipe of this kind.
    """
    try:
        return _from_json(kind, values)
    except ValidationError as error:
        raise RecipeError(f"not a {kind.__name__} of this release: {_explain(error)}") from error


def _from_json(kind: type[R], values: Mapping[str, Any]) -> R:
    # JSON mode converts arrays to tuples and objects to dataclasses, and nothing else.
    return TypeAdapter(kind).validate_json(json.dumps(_with_length_range(values)))


def _with_length_range(values: Mapping[str, Any]) -> dict[str, Any]:
    """Move the length range of a Stage II recipe out of its weights, its place in earlier releases."""
    weights = values.get("weights")
    names = {each.name for each in fields(LengthRange)}
    if not isinstance(weights, dict) or not names & set(weights):
        return dict(values)
    moved = {name: weights[name] for name in weights if name in names}
    kept = {name: weights[name] for name in weights if name not in names}
    return {**values, "weights": kept, "trace_length": {**values.get("trace_length", {}), **moved}}


def _explain(error: ValidationError) -> str:
    """List every refused value with its place."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}, received {json.dumps(each['input'])}"
        for each in error.errors(include_url=False)
    )
