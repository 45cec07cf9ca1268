"""Train, quantise, pack and score the best language model that fits in 16,000,000 bytes (Parameter Golf), in one file.

    python train_gpt.py                                        one GPU or the CPU, settings from the environment
    torchrun --standalone --nproc_per_node=8 train_gpt.py      eight GPUs: same batches, same losses
    python train_gpt.py --help                                 every setting, its default and its meaning

A run is train -> quantise -> pack -> evaluate, each also alone (STAGE=train|quantize|evaluate) from what the one before
left in runs/$RUN_ID/. The score is computed from the bytes of the artifact on disk and nothing else.

Contents, in the order of execution (every section starts with a line `# === NAME ===`):
    CONFIG      every setting, declared once: type, default, range, meaning
    RUN         rank, device, run folder, log, metrics, errors
    DATA        shards, the two training loaders, validation tokens and their bytes
    KERNELS     fused GPU kernels, each beside its plain reference
    MODEL       route (the order of layer visits) and parameter table, attention backends, the one forward
    OPTIMIZERS  Muon on parameter banks, Adam, EMA, schedule
    QUANTIZE    calibration, GPTQ with SDClip or with rate-distortion steps on a trellis
    ARTIFACT    entropy coder, the container on disk, the packed script
    EVALUATE    windows, scores, plain and sliding evaluation, test-time training
    TRAIN       warm-up, the training loop, checkpoints
    MAIN        stages

Shapes: B batch, T positions, D model width, H heads, V vocabulary. This file stays under 2,400 lines."""

from __future__ import annotations

import base64, ctypes, dataclasses, difflib, fcntl, functools, hashlib, importlib.util, itertools, json, lzma, math
import os, pickle, platform, re, resource, shutil, signal, struct, subprocess, sys, time, typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

# === CONFIG ===
# Only the standard library up to here: a wrong setting stops the run before the seconds that loading torch takes.


class Stop(SystemExit):
    """A one-line error for the user: the variable or file, its value and the remedy. Exit status 1."""


def stop_if(wrong: object, message: str) -> None:
    """Raise Stop with `message` if `wrong`."""
    if wrong:
        raise Stop(message)


Check = tuple[Callable[[Any], bool], str]
finite: Check = (lambda v: not isinstance(v, float) or math.isfinite(v), "must be finite")
positive: Check = (lambda v: v > 0, "must be greater than 0")
not_negative: Check = (lambda v: v >= 0, "must not be negative")
fraction: Check = (lambda v: 0 <= v <= 1, "must lie between 0 and 1")
below_one: Check = (lambda v: 0 <= v < 1, "must be at least 0 and less than 1")
bit_width: Check = (lambda v: 5 <= v <= 8, "must be 5, 6, 7 or 8")
trellis_size: Check = (lambda v: v in (0, 8, 64, 256), "must be 0, 8, 64 or 256")
bit_width_or_default: Check = (lambda v: v == 0 or 5 <= v <= 8, "must be 5, 6, 7 or 8 (or 0: MATRIX_BITS)")
file_name: Check = (
    lambda v: re.fullmatch(r"(?!\.*$)[\w.-]+|", v, re.ASCII),
    "may hold letters, digits and ._- only",
)


def knob(default: Any, meaning: str, check: Check = finite) -> Any:
    """One setting: default, meaning in one line, and what its value must satisfy."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "check": check})


class Section(NamedTuple):
    """A heading of the settings table; `shapes` says which stage's result the settings below it decide."""

    title: str
    shapes: Literal["nothing", "training", "artifact", "score"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting, read from the environment variable of its name in capitals, as #1585, #1738, #1755, #1693 do."""

    _run = Section("Run", "nothing")
    stage: Literal["all", "train", "quantize", "evaluate"] = knob(
        "all", "part of the run to do, from what is on disk"
    )
    run_id: str = knob(
        "", "folder under OUT_DIR; empty: the unfinished run of these settings or a new one", file_name
    )
    out_dir: str = knob("runs", "where run folders are made")
    artifact: str = knob(
        "", "artifact to score with STAGE=evaluate; empty: final_model.ptz of the run folder"
    )
    checkpoint_every: int = knob(
        1000, "steps between resumable checkpoints; 0: only the trained model", not_negative
    )
    train_log_every: int = knob(500, "steps between log lines (the first ten are always logged)", positive)
    val_loss_every: int = knob(
        0, "steps between diagnostic validations; 0: score only the artifact", not_negative
    )
    attention: Literal["auto", "fa3", "fa2", "varlen", "sdpa"] = knob(
        "auto", "attention; auto: the first usable"
    )
    kernels: Literal["auto", "triton", "reference"] = knob(
        "auto", "fused kernels; auto: triton if there is a GPU"
    )
    mlp_kernel: Literal["auto", "cutlass", "triton", "reference"] = knob(
        "auto", "MLP; auto: the first usable"
    )
    compile: Literal["auto", "on", "off"] = knob("auto", "torch.compile; auto: if there is a GPU")
    compute_dtype: Literal["auto", "bfloat16", "float32"] = knob(
        "auto", "of products; auto: bfloat16 if it is native"
    )
    _data = Section("Data", "nothing")
    data_dir: str = knob("./data", "parent of datasets/ and tokenizers/")
    datasets_dir: str = knob("", "folder of the shards; empty: DATA_DIR/datasets/fineweb10B_sp{VOCAB_SIZE}")
    tokenizer_path: str = knob(
        "", "SentencePiece model; empty: beside the shards or fineweb_{VOCAB_SIZE}_bpe.model"
    )
    _batch = Section("Batches", "training")
    seed: int = knob(1337, "initial weights", not_negative)
    loader: Literal["packed", "shuffled"] = knob(
        "packed", "documents with attention inside each, or plain windows"
    )
    train_batch_tokens: int = knob(
        786_432, "tokens per optimiser step over all ranks, in 8 micro-batches", positive
    )
    micro_batch_tokens: int = knob(
        98_304, "most tokens per forward; smaller micro-batches are joined", positive
    )
    train_seq_len: int = knob(
        2048, "tokens per window, and the longest document segment when packed", positive
    )
    _model = Section("Model", "training")
    vocab_size: int = knob(
        8192, "entries of the tokenizer", (lambda v: 4 < v <= 65_536, "must be 5 to 65536")
    )
    num_layers: int = knob(11, "layers with weights of their own", positive)
    model_dim: int = knob(512, "width of the residual stream", positive)
    num_heads: int = knob(8, "query heads", positive)
    num_kv_heads: int = knob(4, "key and value heads (grouped-query attention)", positive)
    mlp_mult: float = knob(4.0, "hidden width of the MLP over MODEL_DIM", positive)
    rope_dims: int = knob(16, "leading dimensions of each head that are rotated", not_negative)
    rope_base: float = knob(
        10_000.0, "base of the rotation frequencies", (lambda v: v > 1, "must be greater than 1")
    )
    rope_yarn: bool = knob(
        False, "raise the base for rows longer than TRAIN_SEQ_LEN (NTK), as #1585, #1738, #1755 do"
    )
    qk_gain_init: float = knob(5.25, "initial gain of the normalised queries, per head", positive)
    xsa_last_n: int = knob(
        11, "last layers whose attention output loses its own value direction (XSA)", not_negative
    )
    ln_scale: bool = knob(True, "scale the input of layer i by 1/sqrt(i+1)")
    head_gate: Literal["none", "attn_out", "sparse"] = knob(
        "sparse", "2 sigmoid(Wx) (#1667) or sigmoid(Wx) (#1787)"
    )
    gate_attn_src: Literal["residual", "proj", "q"] = knob(
        "proj", "x: block input, the same normalised, or queries"
    )
    gate_width: int = knob(12, "leading channels that head and smear gates read; 0: all", not_negative)
    sparse_attn_gate_scale: float = knob(0.5, "factor inside the sigmoid of HEAD_GATE=sparse", positive)
    smear_gate: bool = knob(True, "add a gated share of the previous token's embedding (#1667)")
    smear_gate_bos_fix: bool = knob(
        True, "smear nothing into the first token of a document or segment (#1851)"
    )
    skip_gates_enabled: bool = knob(True, "U-Net skips merge through a learned gate instead of being added")
    num_loops: int = knob(2, "extra passes through layers LOOP_START..LOOP_END", not_negative)
    loop_start: int = knob(3, "first looped layer", not_negative)
    loop_end: int = knob(5, "last looped layer", not_negative)
    parallel_residual: Literal["none", "gptj", "two_lane"] = knob(
        "two_lane", "late layers: how attention and MLP meet"
    )
    parallel_start_layer: int = knob(8, "first layer of PARALLEL_RESIDUAL", not_negative)
    parallel_first_skip: Literal["lane0", "both"] = knob(
        "lane0", "first two-lane skip: after or before the split"
    )
    tied_embed_init_std: float = knob(
        0.005, "standard deviation of the initial embedding (also the head)", positive
    )
    logit_softcap: float = knob(30.0, "c in logits = c tanh(raw/c)", positive)
    _schedule = Section("Schedule", "training")
    schedule: Literal["time", "steps"] = knob(
        "time", "rates and loops follow the clock or (repeatable) the steps"
    )
    iterations: int = knob(20_000, "most training steps; the schedule's length with SCHEDULE=steps", positive)
    max_wallclock_seconds: float = knob(600.0, "training budget, calibration included", positive)
    gptq_reserve_seconds: float = knob(8.0, "part of the budget kept for calibration", not_negative)
    warmup_steps: int = knob(
        20, "untimed steps per loop state before the clock; all is restored after", not_negative
    )
    warmdown_frac: float = knob(
        0.85, "last fraction of the run over which the learning rate falls linearly", fraction
    )
    min_lr: float = knob(0.1, "lowest learning rate, as a fraction of the highest", fraction)
    enable_looping_at: float = knob(0.35, "fraction of the run at which the loops are switched on", fraction)
    _optimizer = Section("Optimizers", "training")
    matrix_lr: float = knob(0.026, "Muon step of the matrices", positive)
    muon_momentum: float = knob(0.97, "Muon momentum after its ramp", below_one)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", below_one)
    muon_momentum_warmup_steps: int = knob(1500, "steps of the linear momentum ramp", not_negative)
    muon_coefficients: Literal["polar_express", "classic"] = knob(
        "polar_express", "Newton-Schulz polynomial of Muon"
    )
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", positive)
    muon_row_normalize: bool = knob(True, "divide each row of the update by its norm first (MuonEq-R)")
    muon_wd: float = knob(0.095, "decoupled weight decay of the matrices", not_negative)
    wd_taper_start_frac: float = knob(
        1.0, "progress at which MUON_WD starts to fall linearly (#1729: 0.7)", fraction
    )
    wd_taper_final_mult: float = knob(0.5, "MUON_WD at the end, as a fraction of that before", fraction)
    tied_embed_lr: float = knob(0.03, "Adam step of the embedding", positive)
    embed_wd: float = knob(0.085, "weight decay of the embedding", not_negative)
    scalar_lr: float = knob(0.02, "Adam step of gains, scales, mixes and gates", positive)
    adam_wd: float = knob(0.02, "weight decay of gains, scales, mixes and gates", not_negative)
    beta1: float = knob(0.9, "Adam, first moment", below_one)
    beta2: float = knob(0.99, "Adam, second moment", below_one)
    adam_eps: float = knob(1e-8, "Adam epsilon", positive)
    grad_clip_norm: float = knob(0.3, "largest global gradient norm; 0: no clipping", not_negative)
    grad_clip_scope: Literal["global", "local"] = knob(
        "global", "clip after or before averaging over ranks (#1585)"
    )
    ema_decay: float = knob(0.9965, "decay of the weight average that is quantised", below_one)
    _quantizer = Section("Quantizer", "artifact")
    quantizer: Literal["rate_distortion", "sdclip"] = knob(
        "rate_distortion", "sensitivity steps, or clipped rows"
    )
    trellis_states: int = knob(64, "rate_distortion: states of the trellis; 0: scalar rounding", trellis_size)
    artifact_target_bytes: int = knob(0, "rate_distortion: fill this, 0: the cap less the code", not_negative)
    gptq_calibration_batches: int = knob(
        32, "training micro-batches for calibration, over all ranks", positive
    )
    gptq_dampening: float = knob(
        0.01, "added to the inputs' second moments, as a fraction of their mean", positive
    )
    matrix_bits: int = knob(6, "sdclip: integer width of matrices", bit_width)
    attn_bits: int = knob(0, "sdclip: that of attention matrices; 0: MATRIX_BITS", bit_width_or_default)
    mlp_bits: int = knob(0, "sdclip: that of MLP matrices; 0: MATRIX_BITS", bit_width_or_default)
    embed_bits: int = knob(7, "sdclip: integer width of the embedding", bit_width)
    attn_clip_sigmas: float = knob(
        13.0, "sdclip: largest level of attention, in deviations of a row", positive
    )
    mlp_clip_sigmas: float = knob(11.5, "sdclip: largest level of MLPs, in deviations of a row", positive)
    embed_clip_sigmas: float = knob(
        14.0, "sdclip: largest level of the embedding, in deviations of a row", positive
    )
    compressor: Literal["brotli", "lzma"] = knob("brotli", "entropy coder of the artifact's streams")
    artifact_cap_bytes: int = knob(16_000_000, "limit for artifact plus packed code", positive)
    _prequant = Section("Training on validation text before quantising (not legal)", "artifact")
    prequant_ttt_enabled: bool = knob(
        False, "AdamW on the validation tokens before quantising; stamps the run illegal"
    )
    prequant_ttt_epochs: int = knob(
        21, "passes over the validation tokens, weights averaged over ranks each", positive
    )
    prequant_ttt_lr: float = knob(5e-4, "AdamW step of the first pass; cosine to a tenth", positive)
    prequant_ttt_freeze_blocks: int = knob(
        2, "first layers kept as they are, embedding too if > 0", not_negative
    )
    prequant_ttt_wd: float = knob(0.0, "AdamW weight decay", not_negative)
    prequant_ttt_chunk_tokens: int = knob(32_768, "tokens per step and rank", positive)
    prequant_ttt_grad_clip: float = knob(1.0, "largest gradient norm, per rank", positive)
    ttt_ema_enabled: bool = knob(False, "keep an average over the passes instead of the last weights")
    ttt_ema_decay: float = knob(0.7, "decay of that average per pass", below_one)
    _evaluation = Section("Evaluation", "score")
    eval_seq_len: int = knob(2048, "tokens of context per window", positive)
    eval_stride: int = knob(64, "new tokens per sliding window", positive)
    sliding_window_enabled: bool = knob(False, "score with overlapping windows after the plain score")
    eval_prequant: bool = knob(True, "also score the unquantised weights, after the artifact is sealed")
    val_batch_tokens: int = knob(524_288, "tokens per evaluation batch over 8 ranks", positive)
    eval_budget_seconds: float = knob(600.0, "limit of the evaluation clock", positive)
    _ttt = Section("Test-time training: score, then learn", "score")
    ttt_enabled: bool = knob(True, "adapt to the validation text already scored; the run's final score")
    ttt_mode: Literal["doc_lora", "chunk_sgd"] = knob(
        "doc_lora", "adapters per document with phases of SGD, or SGD"
    )
    ttt_optimizer: Literal["auto", "sgd", "adam", "adamw"] = knob(
        "auto", "auto: sgd for chunk_sgd, adamw for doc_lora"
    )
    hash_embed_enabled: bool = knob(
        False, "its SGD also learns an embedding of hashed token pairs, from zero (#1523)"
    )
    hash_embed_size: int = knob(16_384, "rows of that embedding", positive)
    ttt_lr: float = knob(0.005, "chunk_sgd: step at the first chunk; cosine to 0 at the last", not_negative)
    ttt_epochs: int = knob(3, "chunk_sgd: passes over a chunk after it was scored", positive)
    ttt_chunk_tokens: int = knob(32_768, "chunk_sgd: targets scored, then learnt", positive)
    ttt_freeze_blocks: int = knob(
        0, "chunk_sgd: first layers kept as they are, embedding too if > 0", not_negative
    )
    ttt_momentum: float = knob(0.9, "chunk_sgd: momentum", below_one)
    ttt_batch_seqs: int = knob(
        32, "chunk_sgd: most rows of EVAL_SEQ_LEN tokens per step and stream", positive
    )
    ttt_grad_clip: float = knob(1.0, "chunk_sgd: largest gradient norm", positive)
    ttt_adamw_wd: float = knob(0.0, "chunk_sgd: weight decay with TTT_OPTIMIZER=adamw", not_negative)
    ttt_lora_rank: int = knob(80, "doc_lora: rank of the adapters", positive)
    ttt_lora_alpha: float = knob(
        144.0, "doc_lora: adapters are scaled by this over their rank; 0: by 1", not_negative
    )
    ttt_lora_lr: float = knob(1e-4, "doc_lora: AdamW step of the adapters", not_negative)
    ttt_chunk_size: int = knob(48, "doc_lora: targets scored, then learnt, per document", positive)
    ttt_eval_seq_len: int = knob(2048, "doc_lora: most tokens of context", positive)
    ttt_batch_size: int = knob(64, "doc_lora: documents adapted side by side", positive)
    ttt_grad_steps: int = knob(1, "doc_lora: AdamW steps per chunk", positive)
    ttt_weight_decay: float = knob(0.5, "doc_lora: weight decay of the adapters", not_negative)
    ttt_beta1: float = knob(0.0, "doc_lora: AdamW, first moment", below_one)
    ttt_beta2: float = knob(0.99, "doc_lora: AdamW, second moment", below_one)
    ttt_q_lora: bool = knob(True, "doc_lora: adapt the queries")
    ttt_k_lora: bool = knob(True, "doc_lora: adapt the keys")
    ttt_v_lora: bool = knob(True, "doc_lora: adapt the values")
    ttt_o_lora: bool = knob(
        True, "doc_lora: adapt the attention output, reading the block's normalised input"
    )
    ttt_mlp_lora: bool = knob(True, "doc_lora: adapt the MLP's output, reading its normalised input")
    phased_ttt_num_phases: int = knob(1, "doc_lora: passes of SGD over documents scored so far", not_negative)
    phased_ttt_prefix_docs: int = knob(2500, "doc_lora: documents of the last of these passes", positive)
    global_ttt_lr: float = knob(0.001, "phases: SGD step at the first chunk; cosine to 0", not_negative)
    global_ttt_momentum: float = knob(0.9, "phases: momentum", below_one)
    global_ttt_epochs: int = knob(1, "phases: passes over each chunk", positive)
    global_ttt_chunk_tokens: int = knob(32_768, "phases: tokens per chunk", positive)
    global_ttt_batch_seqs: int = knob(
        32, "phases: most rows of EVAL_SEQ_LEN tokens per step and stream", positive
    )
    global_ttt_warmup_chunks: int = knob(
        0, "phases: chunks over which the step rises linearly first", not_negative
    )
    global_ttt_warmup_start_lr: float = knob(0.0, "phases: step at the first of these", not_negative)
    global_ttt_grad_clip: float = knob(1.0, "phases: largest gradient norm", positive)
    global_ttt_respect_doc_boundaries: bool = knob(True, "phases: attention stays within documents")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, meaning = getattr(self, field.name), field.metadata["meaning"]
            for holds, rule in (finite, field.metadata["check"]):
                stop_if(not holds(value), f"{field.name.upper()}={value}: {rule} ({meaning})")
        c, head_dim, micro = self, self.model_dim // self.num_heads, STREAMS * self.train_seq_len
        stop_if(c.model_dim % c.num_heads, f"NUM_HEADS={c.num_heads}: must divide MODEL_DIM={c.model_dim}")
        stop_if(
            c.num_heads % c.num_kv_heads,
            f"NUM_KV_HEADS={c.num_kv_heads}: must divide NUM_HEADS={c.num_heads}",
        )
        stop_if(
            c.rope_dims % 2 or c.rope_dims > head_dim,
            f"ROPE_DIMS={c.rope_dims}: must be even and at most MODEL_DIM/NUM_HEADS={head_dim}",
        )
        stop_if(
            not (c.mlp_mult * c.model_dim).is_integer(),
            f"MLP_MULT={c.mlp_mult}: MLP_MULT*MODEL_DIM={c.mlp_mult * c.model_dim} must be a whole number",
        )
        stop_if(
            c.num_loops and not c.loop_start <= c.loop_end < c.num_layers,
            f"LOOP_START={c.loop_start}, LOOP_END="
            f"{c.loop_end}: need LOOP_START <= LOOP_END < NUM_LAYERS={c.num_layers} (or NUM_LOOPS=0)",
        )
        stop_if(
            c.gate_width > c.model_dim, f"GATE_WIDTH={c.gate_width}: must not exceed MODEL_DIM={c.model_dim}"
        )
        stop_if(
            c.train_batch_tokens % (STREAMS if c.loader == "packed" else micro),
            f"TRAIN_BATCH_TOKENS={c.train_batch_tokens}: must be a multiple of {STREAMS}, with LOADER=shuffled of "
            f"{STREAMS} x TRAIN_SEQ_LEN = {micro}",
        )
        stop_if(
            c.eval_stride > c.eval_seq_len,
            f"EVAL_STRIDE={c.eval_stride}: must not exceed EVAL_SEQ_LEN={c.eval_seq_len}, tokens would be skipped",
        )
        stop_if(
            c.gptq_reserve_seconds >= c.max_wallclock_seconds,
            f"GPTQ_RESERVE_SECONDS={c.gptq_reserve_seconds}: "
            f"must be less than MAX_WALLCLOCK_SECONDS={c.max_wallclock_seconds}",
        )
        stop_if(
            c.ttt_optimizer not in ("auto", "adamw", "sgd" if c.ttt_mode == "chunk_sgd" else "adam"),
            f"TTT_OPTIMIZER={c.ttt_optimizer}: not an optimiser of TTT_MODE={c.ttt_mode}; set TTT_OPTIMIZER=auto",
        )
        stop_if(
            c.hash_embed_enabled and c.ttt_mode == "doc_lora" and c.phased_ttt_num_phases == 0,
            "HASH_EMBED_ENABLED=1: nothing would train it with TTT_MODE=doc_lora and PHASED_TTT_NUM_PHASES=0",
        )
        stop_if(c.artifact and c.stage != "evaluate", f"ARTIFACT={c.artifact}: only STAGE=evaluate reads it")

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> Config:
        """The settings in `environment`; Stop names a variable that is misspelt, of the wrong type or out of range."""
        types, known, values = (
            typing.get_type_hints(cls),
            {f.name.upper(): f.name for f in dataclasses.fields(cls)},
            {},
        )
        for name, text in environment.items():
            stop_if(name in REFUSED, f"{name}={text}: {REFUSED.get(name)}; unset {name}")
            if name in known or name in ALIASES:
                names, meanings = ALIASES.get(name, (name, {}))
                for target in names.split():
                    value = parse_value(target, meanings.get(text, text), types[known[target]])
                    if values.setdefault(known[target], value) not in (value,):  # `in`: nan is itself
                        raise Stop(
                            f"{name}={text}: another variable sets {target} to another value; unset one"
                        )
            elif name not in NOT_OURS | FIXED.keys() and (
                near := difflib.get_close_matches(name, known, 1, 0.85)
            ):
                raise Stop(f"{name}={text}: not a setting; did you mean {near[0]}? (or unset {name})")
        config = cls(**values)
        for name in FIXED.keys() & environment.keys():
            only = format_value(getattr(config, FIXED[name].lower(), FIXED[name]))
            if environment[name] not in (only, only + ".0"):
                raise Stop(
                    f"{name}={environment[name]}: every published run has {only}; nothing else is implemented"
                )
        return config

    def overrides(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by variable name."""
        return {
            f.name.upper(): v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default
        }

    def chosen(self, *which: str) -> dict[str, Any]:
        """The settings of the sections with these titles, or that shape these results, by variable name."""
        return {
            f.name.upper(): getattr(self, f.name)
            for section, fields in self.sections()
            for f in fields
            if {section.title, section.shapes} & set(which)
        }

    @classmethod
    def sections(cls) -> list[tuple[Section, list[dataclasses.Field]]]:
        """The settings under their headings, in order of declaration."""
        fields, table = {f.name: f for f in dataclasses.fields(cls)}, []
        for name, value in vars(cls).items():
            if isinstance(value, Section):
                table.append((value, []))
            elif name in fields:
                table[-1][1].append(fields[name])
        return table

    @classmethod
    def describe(cls) -> Iterator[str]:
        """The lines of the table of all settings for --help."""
        types = typing.get_type_hints(cls)
        for section, fields in cls.sections():
            yield f"\n{section.title}"
            for f in fields:
                options = f" [{', '.join(options)}]" if (options := typing.get_args(types[f.name])) else ""
                yield f"  {f.name.upper():<32} {format_value(f.default) or '(empty)':<14} {f.metadata['meaning']}{options}"


STREAMS = (
    8  # data streams: 8 ranks have one each, fewer ranks take several in turn, and the batch stays the same
)
# Of the four submissions: other names of settings and values, names of one value (or that of a setting), names unread.
ALIASES: dict[str, tuple[str, dict[str, str]]] = {
    "PARALLEL_RESIDUAL": ("PARALLEL_RESIDUAL", {"0": "none", "1": "two_lane"}),
    "PARALLEL_RESIDUAL_START": ("PARALLEL_START_LAYER", {}),
    "ATTN_OUT_GATE": ("HEAD_GATE", {"0": "none", "1": "attn_out"}),
    "ARTIFACT_DIR": ("OUT_DIR", {"": "runs"}),
    "MATRIX_CLIP_SIGMAS": ("ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS", {}),
}
FIXED = {
    "TIE_EMBEDDINGS": "1",
    "EMBEDDING_DIM": "MODEL_DIM",
    "PARALLEL_FINAL_LANE": "mean",
    "TTT_EVAL_BATCHES": "",
    "PARALLEL_FREEZE_LANE0": "0",
    "PARALLEL_IDENTITY_INIT": "1",
    "PARALLEL_SKIP_LANE0_ONLY": "1",
    "PARALLEL_MLP_READ_MIX": "0",
    "PARALLEL_START_LAYER_IS_PHYSICAL": "1",
    "VAL_DOC_FRACTION": "1",
    "PHASED_TTT_ENABLED": "1",
    "GPTQ_BLOCKSIZE": "128",
}
REFUSED = {
    name: reason
    for reason, names in {
        "declared in the published scripts, read by no code": "ROPE_TRAIN_SEQ_LEN MUON_BETA2 GPTQ_ENABLED SWA_ENABLED "
        "SWA_EVERY LAWA_ENABLED LAWA_K LAWA_FREQ QAT_ENABLED LATE_QAT_THRESHOLD MTP_NUM_HEADS MTP_LOSS_WEIGHT BIGRAM_DIM "
        "BIGRAM_VOCAB_SIZE DTG_ENABLED VE_ENABLED VE_DIM VE_LAYERS GATED_ATTENTION VALUE_RESIDUAL ETLB_ENABLED ETLB_LR "
        "ETLB_STEPS ETLB_CLIP",
        "SLOT fits a correction to the tokens it scores, which is not legal": "LBFGS_SLOT_ENABLED "
        "LBFGS_SLOT_ITERS LBFGS_SLOT_HISTORY LBFGS_SLOT_FOCAL LBFGS_SLOT_CLAMP LBFGS_SLOT_LR",
        "only untied embeddings would need it (TIED_EMBED_LR is the rate in use)": "EMBED_LR HEAD_LR",
        "the parameter table decides what stays in fp16": "CONTROL_TENSOR_NAME_PATTERNS",
    }.items()
    for name in names.split()
}
NOT_OURS = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"}  # torchrun's


def format_value(value: Any) -> str:
    """A setting's value in the form `parse` reads back."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def parse_value(name: str, text: str, kind: Any) -> Any:
    """`text` as the type `kind` of the setting `name`; integers may be written 1e4 or 524_288."""
    truth = dict.fromkeys(("0", "false", "no", "off"), False) | dict.fromkeys(
        ("1", "true", "yes", "on"), True
    )
    options = typing.get_args(kind)
    stop_if(options and text not in options, f"{name}={text}: must be one of {', '.join(options)}")
    if kind is bool:
        stop_if(text.lower() not in truth, f"{name}={text}: must be 0 or 1")
        return truth[text.lower()]
    if options or kind is str:
        return text
    try:
        return kind(number if (number := float(text)).is_integer() else text)
    except ValueError:
        raise Stop(f"{name}={text}: must be {'a whole number' if kind is int else 'a number'}") from None


def command_line(arguments: list[str]) -> Config:
    """The settings of this process; ends it after serving --help or --print-config, Stop for any other argument."""
    if not arguments:
        return Config.from_env(os.environ)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the output may be cut by `| head`
    if arguments == ["--help"]:
        print(
            (__doc__ or "").split("\n\nContents")[0], "\nSettings (environment)", *Config.describe(), sep="\n"
        )
    elif arguments == ["--print-config"]:
        config = Config.from_env(os.environ)
        print(
            "\n".join(
                f"{f.name.upper()}={format_value(getattr(config, f.name))}"
                for f in dataclasses.fields(config)
            )
        )
    else:
        raise Stop(
            f"{' '.join(arguments)}: settings are environment variables, as in `SEED=2 python train_gpt.py`; "
            "the only arguments are --help and --print-config"
        )
    raise SystemExit(0)


if __name__ == "__main__":
    CONFIG = command_line(sys.argv[1:])
    if importlib.util.find_spec("torch") is None:
        raise Stop(
            f"{sys.executable}: torch is not installed there; use ./run.sh, or pip install -r requirements.txt"
        )
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # threads that spin while idle starve a busy machine 20-fold

import numba, numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

try:
    import triton, triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    triton_jit = triton.jit
except ImportError:  # there is no triton for macOS and Windows; pick_kernels says so where it is asked for
    triton = tl = None
    triton_jit = lambda function: function


# === RUN ===
class Run:
    """Where this process is (rank, device, folder) and how it speaks (log, metrics, sums over ranks: if any)."""

    def __init__(self, config: Config):
        self.config = config
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        stop_if(
            STREAMS % self.world_size,
            f"WORLD_SIZE={self.world_size}: launch torchrun with --nproc_per_node 1, 2, 4 or 8",
        )
        self.is_main = self.rank == 0  # the rank that logs and writes
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        self.is_cuda = self.device.type == "cuda"
        native = self.is_cuda or torch.cpu._is_avx512_bf16_supported()
        dtype = (
            config.compute_dtype if config.compute_dtype != "auto" else "bfloat16" if native else "float32"
        )
        self.dtype = getattr(torch, dtype)
        self.streams = range(self.rank, STREAMS, self.world_size)
        self.folder, self.lock, self.sink, self.metrics = Path(), None, None, None
        tune_process(self.is_cuda)
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1:
            dist.init_process_group(
                "nccl" if self.is_cuda else "gloo", device_id=self.device if self.is_cuda else None
            )

    def open(self, folder: Path) -> Path:
        """Make `folder` the run folder, locked against a second run; Stop if it cannot be written or is in use."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")  # noqa: SIM115 -- open as long as the run
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            append = lambda name: open(folder / name, "a", buffering=1)  # noqa: SIM115
            self.sink, self.metrics = append("train.log"), append("metrics.jsonl")
            return folder
        except BlockingIOError:
            raise Stop(
                f"{folder}: another process is writing this run; wait for it or choose another RUN_ID"
            ) from None
        except OSError as error:
            raise Stop(
                f"{folder}: cannot be written ({error.strerror}); set OUT_DIR to a writable folder"
            ) from None

    def log(self, line: str, console: bool = True) -> None:
        """One line to train.log, and to the terminal unless `console` is false. Rank 0 only."""
        if self.is_main and console:
            print(line, flush=True)
        if self.sink:
            self.sink.write(line + "\n")

    def metric(self, kind: str, **values: Any) -> None:
        """One record of full-precision values to metrics.jsonl. Rank 0 only."""
        if self.metrics:
            self.metrics.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")

    def ledger(self, event: str, **values: Any) -> None:
        """Write to the ledger when data were read, clocks ran and the artifact was sealed, for compliance.py."""
        self.metric("ledger", event=event, **values)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_main_rank(self, action: Callable[[], Any]) -> Any:
        """`action` on rank 0 alone; the others get its value or its Stop, so nobody waits in a collective for ever."""
        outcome = ["", None]  # the message of a Stop, the value
        if self.is_main:
            try:
                outcome[1] = action()
            except Stop as stop:
                outcome[0] = str(stop)
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, device=self.device)
        if outcome[0]:
            raise Stop(outcome[0] if self.is_main else 1)
        return outcome[1]

    def progress(self, what: str, items: Sequence) -> Iterator:
        """The items one by one, with a bar on a terminal, otherwise a line at most every 10 s. Rank 0 only."""
        bar = tqdm(
            items, what, leave=False, file=sys.stdout, disable=not (self.is_main and sys.stdout.isatty())
        )
        total, start = len(items), (last := time.monotonic())
        for done, item in enumerate(bar):
            if bar.disable and (now := time.monotonic()) - last >= 10:
                left, last = (now - start) * (total - done) / max(done, 1), now
                self.log(f"{what}: {100 * done / total:.0f}% left:{left:.0f}s")
            yield item

    def now(self) -> float:
        """Seconds of a monotonic clock after the device has finished its work."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.monotonic()

    def close(self) -> None:
        """Release the log files and the lock of the run folder; with several ranks, end this process."""
        for file in filter(None, (self.sink, self.metrics, self.lock)):
            file.close()
        if self.world_size > 1:
            dist.barrier()
            sys.stdout.flush()
            os._exit(
                0
            )  # gloo's threads outlive destroy_process_group and may abort an interpreter that ends (2 of 8)


def tune_process(is_cuda: bool) -> None:
    """Linux: die with torchrun, leaving no orphan. glibc without a GPU: keep freed blocks, which saves half a step."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if not is_cuda and platform.libc_ver()[0] == "glibc":
        for parameter, value in (
            (-3, 2**30),
            (-1, 2**31 - 1),
            (-2, 2**26),
        ):  # M_MMAP_THRESHOLD, M_TRIM_..., M_TOP_PAD
            ctypes.CDLL(None).mallopt(parameter, value)


def find_run_folder(config: Config, shards: str) -> Path:
    """The folder of this run: RUN_ID, else the newest that this stage can go on from (same data, `shards`, and settings
    up to what it still decides; with all and train neither finished nor being written), else a new name."""
    root = Path(config.out_dir)
    if config.run_id:
        folder = root / config.run_id
        stop_if(
            config.stage in ("all", "train") and (folder / "summary.json").exists(),
            f"RUN_ID={config.run_id}: "
            f"{folder} holds a finished run; choose another RUN_ID, or STAGE=evaluate to score it again",
        )
        return folder
    kinds = ("training",) if config.stage == "quantize" else ("training", "artifact")
    wanted, same = "final_model.ptz" if config.stage == "evaluate" else "checkpoint.pt", config.chosen(*kinds)
    for folder in sorted(
        (path.parent for path in root.glob("*/config.json")), key=lambda f: f.name, reverse=True
    ):
        if (
            describe_differences(read_json(folder / "config.json"), same | {"data": shards})
            or not (folder / wanted).exists()
        ):
            continue
        if config.stage in ("quantize", "evaluate") or not (
            is_locked(folder) or (folder / "summary.json").exists()
        ):
            return folder
    stop_if(
        config.stage in ("quantize", "evaluate") and not config.artifact,
        f"STAGE={config.stage}: no run under "
        f"{root}/ with these settings has a {wanted}; set RUN_ID"
        + (" or ARTIFACT" if config.stage == "evaluate" else ", or train one first"),
    )
    digest = hashlib.sha256(json.dumps(config.chosen("training", "artifact")).encode()).hexdigest()
    return root / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{digest[:6]}-seed{config.seed}"


def describe_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first settings in which `theirs` differ from `ours`, for an error message; empty if none does."""
    found = [f"{n}={theirs.get(n)} there, {v} here" for n, v in ours.items() if theirs.get(n) != v]
    return "; ".join(found[:3]) + ("; ..." if len(found) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file; Stop if it holds anything else."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise Stop(f"{path}: cannot be read ({error}); delete it or make it again") from None
    stop_if(not isinstance(content, dict), f"{path}: not a JSON object; delete it or make it again")
    return content


def is_locked(folder: Path) -> bool:
    """Whether a living process writes to the run `folder`."""
    try:
        with open(folder / ".lock") as lock:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) is not None
    except (FileNotFoundError, BlockingIOError) as error:
        return isinstance(error, BlockingIOError)


def write_atomically(path: Path, write: bytes | Callable[[typing.BinaryIO], Any]) -> None:
    """Replace `path` by bytes, or by what `write` writes, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(write) if isinstance(write, bytes) else write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise Stop(f"{path}: cannot be written ({error}); free disk space or set OUT_DIR elsewhere") from None


def versions(run: Run) -> dict[str, str]:
    """Versions, hardware and source of this run, for the log and summary.json."""
    source, here = Path(__file__).read_bytes(), Path(__file__).resolve().parent
    git = shutil.which("git") and subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": getattr(triton, "__version__", "none"),
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(run.device) if run.is_cuda else f"{os.cpu_count()}-core CPU",
        "dtype": str(run.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "commit": (git and git.stdout.strip()) or "none",
        "source_sha256": hashlib.sha256(source).hexdigest(),
    }


# === DATA ===
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES, BOS = 20240520, 1, 1024, 1


def read_shard(path: Path) -> np.ndarray:
    """Map the uint16 values of one shard; Stop if magic, version or file size are not what the format says."""
    remedy = "delete it and prepare or download the data again"
    try:
        size, words = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3)
    except OSError as error:
        raise Stop(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    magic, version, count = map(int, words) if size >= SHARD_HEADER_BYTES else (SHARD_MAGIC, SHARD_VERSION, 0)
    stop_if(
        (magic, version) != (SHARD_MAGIC, SHARD_VERSION),
        f"{path}: starts with {magic}, {version} instead of "
        f"magic {SHARD_MAGIC}, version {SHARD_VERSION}: not a token shard; {remedy}",
    )
    stop_if(
        count < 1 or size != SHARD_HEADER_BYTES + 2 * count,
        f"{path}: {size} bytes, but a shard "
        f"of {count} values has {SHARD_HEADER_BYTES + 2 * count}: truncated or empty; {remedy}",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


class Dataset:
    """The shards, tokenizer and manifest of one dataset folder, checked for what the settings say about them."""

    def __init__(self, config: Config, need_training: bool = True):
        self.folder = Path(
            config.datasets_dir or f"{config.data_dir}/datasets/fineweb10B_sp{config.vocab_size}"
        )
        shared = Path(config.data_dir, "tokenizers", f"fineweb_{config.vocab_size}_bpe.model")
        beside = self.folder / "tokenizer.model"
        self.tokenizer = Path(config.tokenizer_path or (beside if beside.exists() else shared))
        self.vocab_size = config.vocab_size
        self.train_files, self.val_files, self.sidecar_files = (
            sorted(self.folder.glob(f"fineweb_{kind}_[0-9]*.bin")) for kind in ("train", "val", "val_bytes")
        )
        for pattern, found in (
            ("fineweb_val_*.bin", self.val_files),
            ("fineweb_train_*.bin", self.train_files),
        ):
            stop_if(
                not found and (need_training or found is self.val_files),
                f"DATASETS_DIR={self.folder}: no "
                f"{pattern} there; set it, or make data with data/demo.py, data/prepare.py or data/download.py",
            )
        self.train = [read_shard(path) for path in self.train_files]
        self.manifest = read_json(self.folder / "manifest.json")
        import sentencepiece

        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer))
        except (RuntimeError, OSError):
            reason = "not a SentencePiece model" if self.tokenizer.exists() else "no such file"
            raise Stop(f"TOKENIZER_PATH={self.tokenizer}: {reason}; set it to that of the dataset") from None
        stop_if(
            (size := self.pieces.vocab_size()) != self.vocab_size,
            f"VOCAB_SIZE={self.vocab_size}: {self.tokenizer}"
            f" has {size} entries; set VOCAB_SIZE={size} or another TOKENIZER_PATH",
        )

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What data this is: manifest and tokenizer hashes, and the counts of the manifest or of the shard headers."""
        digest = hashlib.sha256()
        for path in [*self.train_files, *self.val_files, *self.sidecar_files]:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
        for path in self.train_files:  # only these: no validation token is read before the artifact is sealed
            with open(path, "rb") as file:
                digest.update(file.read(1 << 16))
        manifest, short = (
            self.folder / "manifest.json",
            lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        )
        counts = {
            key: self.manifest[key]
            for key in ("name", "docs_train", "docs_val", "val_tokens", "val_bytes")
            if key in self.manifest
        }
        # Whether validation is the contest's: the first 50,000 documents.
        standard = self.manifest.get("validation", {}).get("standard", counts.get("docs_val") == 50_000)
        return {
            "shards": digest.hexdigest()[:16],
            "manifest": short(manifest) if manifest.exists() else None,
            "standard": standard,
            "tokenizer": short(self.tokenizer),
            "train_shards": len(self.train_files),
            "train_tokens": sum(map(len, self.train)),
            **counts,
        }

    def check_ids(self, tokens: np.ndarray, where: object) -> np.ndarray:
        """`tokens`, or Stop if one of them is not in the vocabulary."""
        stop_if(
            (largest := tokens.max(initial=0)) >= self.vocab_size,
            f"{where}: holds token {largest}, but VOCAB_SIZE"
            f"={self.vocab_size}: the shards belong to another tokenizer; set DATASETS_DIR or VOCAB_SIZE",
        )
        return tokens


class Batch(NamedTuple):
    """Token ids (B, T) int64 and, for packed documents (B = 1), the int32 segment starts with the total as padding."""

    inputs: Tensor
    targets: Tensor
    starts: Tensor | None = None
    longest: int = 0


def segment_starts(tokens: np.ndarray, longest: int, breaks: np.ndarray | None = None) -> Tensor:
    """pad_starts of the attention segments in a packed row (T,): at every BOS and break, at most `longest` long."""
    starts = np.flatnonzero(tokens == BOS)
    starts = np.unique(np.concatenate([[0], starts, *([] if breaks is None else [breaks])]))
    lengths = np.diff(np.append(starts, len(tokens)))
    pieces = -(-lengths // longest)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return pad_starts(np.repeat(starts, pieces) + within * longest, len(tokens))


def pad_starts(starts: np.ndarray, total: int) -> Tensor:
    """`starts` as an int32 vector that ends with `total`, repeated up to a multiple of 64: few shapes (#1530)."""
    padded = np.full(-(-(len(starts) + 1) // 64) * 64, total, dtype=np.int32)
    padded[: len(starts)] = starts
    return torch.from_numpy(padded)


class ShuffledLoader:
    """Windows of TRAIN_SEQ_LEN tokens in random order, ignoring documents (#1394). Stream s draws from files s, s+8,
    ... (fewer than 8: its share of one). The order follows from the epoch alone: a resumed run has the same data."""

    def __init__(self, config: Config, data: Dataset):
        self.data, self.length, self.plans = data, config.train_seq_len, {}
        self.rows = config.train_batch_tokens // STREAMS // self.length
        stop_if(
            min(len(self.plan(stream, 0)) for stream in range(STREAMS)) == 0,
            f"DATASETS_DIR={data.folder}: the training shards hold fewer than {STREAMS} windows of "
            f"TRAIN_SEQ_LEN={self.length} tokens per file; use more data or a shorter TRAIN_SEQ_LEN",
        )

    def plan(self, stream: int, epoch: int) -> np.ndarray:
        """(windows, 2): file index and first token of each window, in the order they are used."""
        if (stream, epoch) not in self.plans:
            self.plans = {
                key: plan for key, plan in self.plans.items() if key[0] != stream or key[1] >= epoch - 1
            }
            generator = lambda *seed: np.random.Generator(np.random.PCG64(seed))
            shards, parts = len(self.data.train), []
            for file in range(stream % shards, shards, STREAMS):
                windows = (len(self.data.train[file]) - self.length) // self.length  # the same in every epoch
                phase = generator(epoch, file).integers(self.length)
                mine = np.arange(stream // shards, max(windows, 0), max(1, len(range(file, STREAMS, shards))))
                parts.append(np.stack([np.full(len(mine), file), phase + mine * self.length], 1))
            windows = np.concatenate(parts)
            self.plans[stream, epoch] = windows[generator(epoch, stream, 1).permutation(len(windows))]
        return self.plans[stream, epoch]

    def get(self, step: int, stream: int) -> Batch:
        """The micro-batch of `stream` at `step`: (rows, TRAIN_SEQ_LEN)."""
        out = np.empty((self.rows, self.length + 1), dtype=np.int64)
        size = len(self.plan(stream, 0))
        for row in range(self.rows):
            epoch, place = divmod(step * self.rows + row, size)
            file, start = self.plan(stream, epoch)[place]
            out[row] = self.data.train[file][start : start + self.length + 1]
        tokens = torch.from_numpy(self.data.check_ids(out, self.data.folder))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class PackedLoader:
    """Consecutive tokens of the shards, 8 adjacent slices a step, without remainders; attention by document (#1530)."""

    def __init__(self, config: Config, data: Dataset):
        self.data, self.longest = data, config.train_seq_len
        self.slice = config.train_batch_tokens // STREAMS + 1
        first_bos = [int(np.argmax(shard[: 1 << 20] == BOS)) for shard in data.train]
        sizes = [len(shard) - first for shard, first in zip(data.train, first_bos, strict=True)]
        self.first, self.ends = first_bos, np.cumsum([size // (STREAMS * self.slice) for size in sizes])
        stop_if(
            self.ends[-1] == 0,
            f"TRAIN_BATCH_TOKENS={config.train_batch_tokens}: the largest training shard in "
            f"{data.folder} has {max(sizes)} tokens; use a smaller batch or more data",
        )

    def get(self, step: int, stream: int) -> Batch:
        """The micro-batch of `stream` at `step`: (1, TRAIN_BATCH_TOKENS/8)."""
        step %= int(self.ends[-1])
        shard = int(np.searchsorted(self.ends, step, side="right"))
        local = step - (int(self.ends[shard - 1]) if shard else 0)
        start = self.first[shard] + (local * STREAMS + stream) * self.slice
        tokens = self.data.check_ids(
            self.data.train[shard][start : start + self.slice], self.data.train_files[shard]
        )
        row = torch.from_numpy(tokens.astype(np.int64))
        return Batch(row[None, :-1], row[None, 1:], segment_starts(tokens[:-1], self.longest), self.longest)


LOADERS = {"shuffled": ShuffledLoader, "packed": PackedLoader}


def join_batches(batches: list[Batch]) -> Batch:
    """Several micro-batches as one: rows below each other, or packed rows one behind the other."""
    if len(batches) == 1:
        return batches[0]
    packed, size = batches[0].starts is not None, batches[0].inputs.size(1)
    inputs, targets = (torch.cat([batch[side] for batch in batches], int(packed)) for side in range(2))
    if not packed:
        return Batch(inputs, targets)
    starts = np.concatenate([np.unique(b.starts.numpy())[:-1] + i * size for i, b in enumerate(batches)])
    return Batch(inputs, targets, pad_starts(starts, inputs.numel()), batches[0].longest)


class Feed:
    """The micro-batches of this rank, step by step; a thread prepares the next step while the present one computes."""

    def __init__(self, run: Run, loader: ShuffledLoader | PackedLoader):
        self.run, self.loader, self.worker, self.step, self.ahead = (
            run,
            loader,
            ThreadPoolExecutor(1),
            -1,
            None,
        )

    def get(self, step: int) -> list[Batch]:
        """The micro-batches of `step` on the device."""
        ready = self.ahead if step == self.step else self.worker.submit(self.load, step)
        self.step, self.ahead = step + 1, self.worker.submit(self.load, step + 1)
        return [to_device(batch, self.run) for batch in ready.result()]

    def load(self, step: int) -> list[Batch]:
        """The micro-batches of `step` in host memory."""
        c, batches = self.run.config, [self.loader.get(step, stream) for stream in self.run.streams]
        group = max(1, c.micro_batch_tokens * STREAMS // c.train_batch_tokens)
        group = max(
            n for n in range(1, len(batches) + 1) if len(batches) % n == 0 and n <= group
        )  # equal parts
        joined = [join_batches(batches[i : i + group]) for i in range(0, len(batches), group)]
        return tree_map_only(Tensor, Tensor.pin_memory, joined) if self.run.is_cuda else joined


def to_device(batch: Batch, run: Run) -> Batch:
    """`batch` on the device of `run`, without waiting for the copy."""
    return tree_map_only(Tensor, lambda t: t.to(run.device, non_blocking=True), batch)


class Validation(NamedTuple):
    """All validation tokens (N,) uint16, the original bytes each accounts for (N,), and where those come from."""

    tokens: np.ndarray
    bytes: np.ndarray
    source: str


def load_validation(data: Dataset) -> Validation:
    """Tokens and byte counts of the whole validation set; Stop rather than count a byte that is not in the text. If no
    sidecar holds them, the bytes are the UTF-8 length of the piece, and one for the space before it unless
    the token before is a control token. Case operators (private-use code points) are no bytes and need the sidecar."""
    tokens = data.check_ids(np.concatenate([read_shard(path) for path in data.val_files]), data.val_files[0])
    if data.sidecar_files:
        sizes = np.concatenate([read_shard(path) for path in data.sidecar_files])
        stop_if(
            len(sizes) < len(tokens),
            f"{data.sidecar_files[-1]}: the byte sidecar has {len(sizes)} values for "
            f"{len(tokens)} validation tokens; prepare or download it again",
        )
        return Validation(tokens, sizes[: len(tokens)].astype(np.int32), "byte_sidecar")
    sp, size = data.pieces, data.vocab_size
    pieces = [sp.id_to_piece(i) for i in range(size)]
    operators = [i for i, piece in enumerate(pieces) if re.search("[\ue000-\uf8ff]", piece)]
    stop_if(
        operators,
        f"DATASETS_DIR={data.folder}: the tokenizer has case operators (ids {operators[:4]}...), which "
        "are no bytes of the text, and there is no fineweb_val_bytes_*.bin; prepare or download this sidecar",
    )
    special = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(size)])
    lead = np.array([piece.startswith("\u2581") for piece in pieces]) & ~special
    length = np.array(
        [1 if sp.is_byte(i) else len(p.removeprefix("\u2581").encode()) for i, p in enumerate(pieces)]
    )
    length[special] = 0
    credit = length[tokens].astype(np.int32)
    credit[1:] += lead[tokens[1:]] & ~special[tokens[:-1]]
    return Validation(tokens, credit, "lut")


# === KERNELS ===
# Per kernel: the plain reference, the Triton code, the launcher. Kernels take their dtype from the data and compute in
# fp32. The CPU tests run them in Triton's interpreter (TRITON_INTERPRET=1 KERNELS=triton) against the reference.
OPERATORS = "golf_" + __name__.strip(
    "_"
)  # a second copy of this file in the process must not free these operators


def softcapped_ce_reference(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Cross-entropy in nats (N,) fp32 of raw `logits` (N, V) under cap*tanh(logits/cap), for `targets` (N,)."""
    return F.cross_entropy(cap * torch.tanh(logits.float() / cap), targets, reduction="none")


@triton_jit
def softcapped_ce_forward_kernel(logits, targets, losses, normalizers, columns, cap, BLOCK: tl.constexpr):
    """One row per program: streaming log-sum-exp of the capped logits; tanh as 2 sigmoid(2x) - 1."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * columns
    largest, total = -float("inf"), 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        raw = tl.load(line + column, mask=live, other=0.0).to(tl.float32)
        capped = tl.where(live, cap * (2.0 * tl.sigmoid(2.0 * raw / cap) - 1.0), -float("inf"))
        larger = tl.maximum(largest, tl.max(capped, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(capped - larger), 0)
        largest = larger
    normalizer = largest + tl.log(total)
    chosen = tl.load(line + tl.load(targets + row)).to(tl.float32)
    tl.store(losses + row, normalizer - cap * (2.0 * tl.sigmoid(2.0 * chosen / cap) - 1.0))
    tl.store(normalizers + row, normalizer)


@triton_jit
def softcapped_ce_backward_kernel(
    logits, targets, normalizers, upstream, gradient, columns, cap, BLOCK: tl.constexpr
):
    """One (row, block of columns) per program: upstream * (softmax - one-hot) * (1 - tanh^2)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    raw = tl.load(logits + row * columns + column, mask=live, other=0.0).to(tl.float32)
    rising, falling = tl.sigmoid(2.0 * raw / cap), tl.sigmoid(-2.0 * raw / cap)
    probability = tl.exp(cap * (2.0 * rising - 1.0) - tl.load(normalizers + row))
    hit = (column == tl.load(targets + row)).to(tl.float32)
    slope = (
        tl.load(upstream + row) * (probability - hit) * (4.0 * rising * falling)
    )  # 1 - tanh^2, exact when saturated
    tl.store(gradient + row * columns + column, slope.to(gradient.dtype.element_ty), mask=live)


@torch.library.custom_op(f"{OPERATORS}::softcapped_ce", mutates_args=())
def softcapped_ce_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(losses, normalizers), both (N,) fp32: see softcapped_ce_reference."""
    rows, columns = logits.shape
    losses, normalizers = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    block = min(triton.next_power_of_2(columns), 8192)
    softcapped_ce_forward_kernel[(rows,)](
        logits, targets, losses, normalizers, columns, cap, BLOCK=block, num_warps=8
    )
    return losses, normalizers


@torch.library.custom_op(f"{OPERATORS}::softcapped_ce_backward", mutates_args=())
def softcapped_ce_backward_op(
    logits: Tensor, targets: Tensor, normalizers: Tensor, grad: Tensor, cap: float
) -> Tensor:
    """The gradient of the losses with respect to `logits`, in their dtype."""
    rows, columns = logits.shape
    gradient, block = torch.empty_like(logits), 1024
    softcapped_ce_backward_kernel[(rows, -(-columns // block))](
        logits, targets, normalizers, grad, gradient, columns, cap, BLOCK=block, num_warps=4
    )
    return gradient


softcapped_ce_backward_op.register_fake(lambda logits, *_: torch.empty_like(logits))
softcapped_ce_op.register_fake(
    lambda x, *_: tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
)


def _softcapped_ce_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.cap = inputs[2]


def _softcapped_ce_gradient(ctx, upstream, _):
    logits, targets, normalizers = ctx.saved_tensors
    return softcapped_ce_backward_op(logits, targets, normalizers, upstream.contiguous(), ctx.cap), None, None


softcapped_ce_op.register_autograd(_softcapped_ce_gradient, setup_context=_softcapped_ce_save)


@triton_jit
def gemm_kernel(
    a,
    b,
    aux,
    out,
    rows,
    columns,
    depth,
    linear,
    square,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of a (N, M, K) times b (N, C, K) transposed, or b (N, K, C) in backward, and what follows elementwise."""
    BACKWARD: tl.constexpr = MODE == "times_slope" or MODE == "times_input"
    SYMMETRIC: tl.constexpr = MODE == "gram" or MODE == "polynomial"
    # Programs near in time share rows of a and of b, so that L2 serves them.
    tile, n, across = tl.program_id(0), tl.program_id(1), tl.cdiv(columns, BLOCK_N)
    first, within = tile // (GROUP * across) * GROUP, tile % (GROUP * across)
    height = min(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    i, j = (first + within % height) * BLOCK_M, within // height * BLOCK_N
    if not SYMMETRIC or i <= j:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            left = a.load([n, i, k]).reshape(BLOCK_M, BLOCK_K)
            if BACKWARD:
                right = b.load([n, k, j]).reshape(BLOCK_K, BLOCK_N)
            else:
                right = b.load([n, j, k]).reshape(BLOCK_N, BLOCK_K).T
            total = tl.dot(left, right, total)
        if BACKWARD or MODE == "polynomial":
            other = aux.load([n, i, j]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
            if MODE == "polynomial":
                total = linear * other + square * total
            elif MODE == "times_slope":
                total *= other
            else:
                total *= tl.where(other > 0, 2.0, 0.5) * other
        elif (
            not SYMMETRIC
        ):  # two expressions without a common part: more than one tile alive would spill registers
            kept = tl.where(total > 0, 2.0, 0.5) * total if MODE == "act_and_slope" else total
            aux.store([n, i, j], kept.to(aux.dtype).reshape(1, BLOCK_M, BLOCK_N))
            total = tl.where(total > 0, 1.0, 0.25) * total * total
        out.store([n, i, j], total.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))
        if SYMMETRIC and i < j:
            out.store([n, j, i], total.to(out.dtype).T.reshape(1, BLOCK_N, BLOCK_M))


def gemm(
    mode: str, a: Tensor, b: Tensor, aux: Tensor | None = None, linear: float = 0.0, square: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(out, aux) of gemm_kernel for whole matrices, (N, M, C) each; an aux that is not given is what the mode keeps."""
    if a.dtype == torch.bfloat16 and not a.is_cuda:  # Triton's interpreter would multiply the bits
        found = gemm(mode, a.float(), b.float(), aux if aux is None else aux.float(), linear, square)
        return found[0].bfloat16(), found[1].bfloat16()
    wide, align, backward = a.dtype == torch.float32, 16 // a.element_size(), mode.startswith("times")
    m, n, k = 128, 128 if wide or mode in ("gram", "polynomial") else 256, 32 if wide else 64
    rows, depth, columns = *a.shape[1:], b.size(2 if backward else 1)
    out = torch.empty((len(a), rows, -(-columns // align) * align), dtype=a.dtype, device=a.device)
    kept = torch.empty_like(out) if aux is None else aux
    crop = lambda t: t[..., :columns].contiguous()
    fill = lambda t: (
        F.pad(t, (0, -t.size(2) % align)) if t.size(2) % align else t.contiguous()
    )  # TMA: whole 16 bytes
    describe = lambda t, *block: TensorDescriptor.from_tensor(fill(t), [1, *block])
    # The MLP's tiles fill the shared memory of an H100; in a smaller one half the stages have to do.
    large = a.is_cuda and torch.cuda.get_device_properties(a.device).shared_memory_per_block_optin >= 200_000
    gemm_kernel[-(-rows // m) * -(-columns // n), len(a)](
        describe(a, m, k),
        describe(b, *((k, n) if backward else (n, k))),
        describe(kept, m, n),
        describe(out, m, n),
        rows,
        columns,
        depth,
        linear,
        square,
        mode,
        m,
        n,
        k,
        GROUP=8,
        num_warps=8,
        num_stages=4 if large else 2,
    )
    return crop(out), crop(kept) if aux is None else aux


@torch.library.custom_op(f"{OPERATORS}::symmetric_product", mutates_args=())
def symmetric_product_op(x: Tensor, linear: float, square: float) -> Tensor:
    """linear x + square x x^T of the matrices of x (N, R, C), symmetric if linear is not 0, from half of the tiles."""
    return gemm("polynomial" if linear else "gram", x, x, x, linear, square)[0]


@torch.library.custom_op(f"{OPERATORS}::mlp", mutates_args=())
def mlp_op(x: Tensor, up: Tensor, down: Tensor, keep_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mlp_reference of x (M, D); to keep, (M, H): the activation, and its derivative (#1523) or its input (#1530)."""
    act, aux = gemm("act_and_input" if keep_input else "act_and_slope", x[None], up[None])
    return act[0] @ down.T, act[0], aux[0]


@torch.library.custom_op(f"{OPERATORS}::mlp_backward", mutates_args=())
def mlp_backward_op(upstream: Tensor, down: Tensor, aux: Tensor, keep_input: bool) -> Tensor:
    """The gradient (M, H) at the activation's input: upstream (M, D) @ down (D, H), times the derivative."""
    return gemm("times_input" if keep_input else "times_slope", upstream[None], down[None], aux[None])[0][0]


symmetric_product_op.register_fake(lambda x, *_: x.new_empty(len(x), x.size(1), x.size(1)))
mlp_op.register_fake(lambda x, up, down, _: tuple(x.new_empty(len(x), len(w)) for w in (down, up, up)))
mlp_backward_op.register_fake(lambda upstream, down, *_: upstream.new_empty(len(upstream), down.size(1)))


def _mlp_save(ctx, inputs, output):
    ctx.keep_input = inputs[3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else the backward would fill two (M, H) blocks with zeros
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _mlp_gradients(ctx, upstream, *_):
    (x, up, down, act, aux), need = ctx.saved_tensors, ctx.needs_input_grad
    hidden = mlp_backward_op(upstream.contiguous(), down, aux, ctx.keep_input)
    return hidden @ up, hidden.T @ x if need[1] else None, upstream.T @ act if need[2] else None, None


mlp_op.register_autograd(_mlp_gradients, setup_context=_mlp_save)
MLP = Callable[[Tensor, Tensor, Tensor], Tensor]


def mlp_reference(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """LeakyReLU(x up^T, 1/2)^2 down^T."""
    return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)


def mlp_triton(x: Tensor, up: Tensor, down: Tensor, keep_input: bool = False) -> Tensor:
    """mlp_reference with all that is elementwise in the epilogues of two products, x (..., D)."""
    return mlp_op(x.flatten(0, -2).contiguous(), up, down, keep_input)[0].view(*x.shape[:-1], -1)


def missing_triton(run: Run) -> str:
    """Why no Triton kernel can run here; empty if one can."""
    interpreted = run.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return "triton is not installed" if triton is None else "" if interpreted else "there is no GPU"


def pick_kernels(config: Config, run: Run) -> bool:
    """Whether the Triton kernels are used; logs the choice and its reason, Stop if KERNELS=triton cannot be had."""
    missing, kind, wanted = missing_triton(run), run.device.type, config.kernels
    stop_if(
        wanted == "triton" and missing,
        f"KERNELS=triton: {missing}; set KERNELS=reference (or TRITON_INTERPRET=1 to run them on the CPU)",
    )
    chosen = wanted == "triton" or (wanted == "auto" and run.is_cuda and not missing)
    reason = missing or ("interpreted" if chosen and not run.is_cuda else f"KERNELS={wanted}, {kind}")
    run.log(f"kernels: {'triton' if chosen else 'reference'} ({reason})")
    return chosen


def first_usable(run: Run, what: str, variable: str, wanted: str, order: dict[str, Callable[[], Any]]) -> Any:
    """What the function of the wanted backend gives, with auto the first to give no string: the reason against it."""
    refused = []
    for name in order if wanted == "auto" else (wanted,):
        if not isinstance(found := order[name](), str):
            run.log(f"{what}: {name}" + (f" (not {'; not '.join(refused)})" if refused else ""))
            return found
        refused.append(f"{name}: {found}")
    raise Stop(f"{variable}={wanted}: {found}; install it (requirements-gpu.txt) or set {variable}=auto")


def pick_mlp(config: Config, run: Run, fused: bool) -> MLP:
    """The MLP of all layers: MLP_KERNEL, or the first usable one; `fused`: whether KERNELS are the Triton ones."""

    def cutlass() -> MLP | str:
        if not (Path(__file__).resolve().parent / "cutlass_evt_fusion").is_dir():
            return "there is no folder cutlass_evt_fusion beside the script"
        if config.model_dim % 8 or config.mlp_mult * config.model_dim % 8:
            return "MODEL_DIM and MLP_MULT*MODEL_DIM must be multiples of 8"
        library = importlib.import_module("cutlass_evt_fusion")
        return library.available(run.dtype, run.device) or library.leaky_relu_squared_mlp

    kept = "" if fused or config.mlp_kernel == "triton" else f"KERNELS={config.kernels} chose the reference"
    # Assumed until bench/gpu.py measures it: what is more specialised is faster (#1420: CUTLASS by 1 %, others: not).
    return first_usable(
        run,
        "mlp",
        "MLP_KERNEL",
        config.mlp_kernel,
        {
            "cutlass": cutlass,
            "triton": lambda: missing_triton(run) or kept or mlp_triton,
            "reference": lambda: mlp_reference,
        },
    )


# === MODEL ===
# In: the settings, an attention backend and a Batch of token ids. Out: the loss in nats of every target. One
# forward serves training, scores, calibration and test-time training. Three tables say what the network is:
# the route (which layer is visited when, and how its outputs join the residual stream), MATRICES (what is
# quantised with calibration) and parameter_table (shape, initial values, optimiser, quantiser of each
# parameter). A new parameter is a row there and its use in GPT; a new form of residual is a method of GPT.
class Visit(NamedTuple):
    """One pass through a layer."""

    layer: int  # whose weights
    index: int  # how many visits came before
    pushes_skip: bool  # first half of the route, the U-Net's encoder: its output is remembered
    skip_row: int | None  # second half: the row of the skip parameters that first merges a remembered output
    residual: Literal["serial", "gptj", "two_lane"]  # GPT has a method of the same name for each


def make_route(config: Config, looped: bool) -> tuple[Visit, ...]:
    """The order of layer visits; a looped layer appears again."""
    layers = range(config.num_layers)
    loop = range(config.loop_start, config.loop_end + 1)
    repeats = config.num_loops if looped else 0
    order = [*layers[: loop.stop], *[*loop] * repeats, *layers[loop.stop :]]
    half = len(order) // 2

    def residual(index: int, layer: int) -> str:
        if config.parallel_residual == "none" or layer < config.parallel_start_layer:
            return "serial"
        if config.parallel_residual == "two_lane" and index < half:
            return "serial"  # a skip remembers one stream: the lanes part in the second half alone
        return config.parallel_residual

    route = []
    for index, layer in enumerate(order):
        # The first half pushes skips, the second pops them; the last of an odd number has no partner.
        skip_row = index - half if half <= index < 2 * half else None
        route.append(Visit(layer, index, index < half, skip_row, residual(index, layer)))
    return tuple(route)


def show_route(route: tuple[Visit, ...]) -> str:
    """The route as text: encoder | decoder; '=': two lanes, '+': attention and MLP side by side."""
    marks = {"serial": "", "gptj": "+", "two_lane": "="}
    words = [f"{visit.layer}{marks[visit.residual]}" for visit in route]
    half = sum(visit.pushes_skip for visit in route)
    return " ".join([*words[:half], "|", *words[half:]])


Initialiser = Callable[[Tensor], Any]


def normal(deviation: float) -> Initialiser:
    """Normal values around 0."""
    return functools.partial(nn.init.normal_, std=deviation)


def constant(value: float) -> Initialiser:
    """One value everywhere."""
    return functools.partial(nn.init.constant_, val=value)


def orthogonal(bank: Tensor) -> None:
    """Each matrix of a bank."""
    for matrix in bank:
        nn.init.orthogonal_(matrix)


def halves(dim: int, first: Initialiser, second: Initialiser) -> Initialiser:
    """An initialiser for each half of dimension `dim`."""

    def initialise(weight: Tensor) -> None:
        for part, initialiser in zip(weight.chunk(2, dim), (first, second), strict=True):
            initialiser(part)

    return initialise


# parameter -> its groups of layers along dim 0, each as (name in the artifact, site where its input is seen).
MATRICES = {
    "embed": (("tok_emb.weight", "head"),),  # tied: as a matrix it is the head, and no bank
    "qo": (("blocks.{}.attn.c_q.weight", "q"), ("blocks.{}.attn.proj.weight", "o")),
    "kv": (("blocks.{}.attn.c_k.weight", "k"), ("blocks.{}.attn.c_v.weight", "v")),
    "up": (("blocks.{}.mlp.fc.weight", "up"),),
    "down": (("blocks.{}.mlp.proj.weight", "down"),),
}


class ParameterSpec(NamedTuple):
    """One row of the parameter table."""

    shape: tuple[int, ...]
    init: Initialiser
    optimizer: Literal["muon", "embed", "scalar"]
    quantizer: Literal["attn", "mlp", "embed", "fp16"]
    layered: bool = True  # dim 0 counts layers: once, or once per group of MATRICES


def parameter_table(config: Config) -> dict[str, ParameterSpec]:
    """name -> row: creates parameters, splits them over optimisers and quantisers, orders the artifact."""
    layers = config.num_layers
    heads = config.num_heads
    width = config.model_dim
    kv_width = config.num_kv_heads * width // heads
    hidden = int(config.mlp_mult * width)
    gate_width = config.gate_width or width
    skips = len(make_route(config, config.num_loops > 0)) // 2
    both_routes = (*make_route(config, False), *make_route(config, True))
    two_lanes = any(visit.residual == "two_lane" for visit in both_routes)

    zeros = nn.init.zeros_
    ones = nn.init.ones_
    tied = normal(config.tied_embed_init_std)
    # Initial values are drawn in the order of the rows.
    table = {
        "embed": ParameterSpec((config.vocab_size, width), tied, "embed", "embed", layered=False),
        "qo": ParameterSpec((2 * layers, width, width), halves(0, orthogonal, zeros), "muon", "attn"),
        "kv": ParameterSpec((2 * layers, kv_width, width), orthogonal, "muon", "attn"),
        "up": ParameterSpec((layers, hidden, width), orthogonal, "muon", "mlp"),
        "down": ParameterSpec((layers, width, hidden), zeros, "muon", "mlp"),
        "q_gain": ParameterSpec((layers, heads), constant(config.qk_gain_init), "scalar", "fp16"),
        "attn_scale": ParameterSpec((layers, width), ones, "scalar", "fp16"),
        "mlp_scale": ParameterSpec((layers, width), ones, "scalar", "fp16"),
        "resid_mix": ParameterSpec((layers, 2, width), halves(1, ones, zeros), "scalar", "fp16"),
        "head_gate": ParameterSpec((layers, heads, gate_width), zeros, "scalar", "fp16"),
        "skip_weights": ParameterSpec((skips, width), ones, "scalar", "fp16", layered=False),
        "skip_gates": ParameterSpec((skips, width), zeros, "scalar", "fp16", layered=False),
        "smear_w": ParameterSpec((1, gate_width), zeros, "scalar", "fp16", layered=False),
        "smear_lambda": ParameterSpec((1,), zeros, "scalar", "fp16", layered=False),
        "parallel_post_lambdas": ParameterSpec((layers, 2, 2), ones, "scalar", "fp16"),
        "parallel_resid_lambdas": ParameterSpec((layers, 2), constant(1.1), "scalar", "fp16"),
    }
    exists = {  # all others always
        "head_gate": config.head_gate != "none",
        "skip_weights": skips > 0,
        "skip_gates": skips > 0 and config.skip_gates_enabled,
        "smear_w": config.smear_gate,
        "smear_lambda": config.smear_gate,
        "parallel_post_lambdas": two_lanes,
        "parallel_resid_lambdas": two_lanes,
    }
    return {name: spec for name, spec in table.items() if exists.get(name, True)}


class Matrix(NamedTuple):
    """One matrix that is quantised with calibration."""

    name: str  # in the artifact
    parameter: str
    index: int | None  # in its bank; None: the parameter is the matrix
    key: tuple[str, int]  # (site, layer) of its input
    quantizer: str


def list_matrices(table: dict[str, ParameterSpec]) -> list[Matrix]:
    """Every matrix that is quantised with calibration, in table order."""
    found = []
    for parameter, groups in MATRICES.items():
        spec = table[parameter]
        banked = len(spec.shape) == 3
        layers = spec.shape[0] // len(groups) if banked else 1
        for group, (name, site) in enumerate(groups):
            for layer in range(layers):
                index = group * layers + layer if banked else None
                found.append(Matrix(name.format(layer), parameter, index, (site, layer), spec.quantizer))
    return found


# A backend of causal attention: q (B, T, H, D), k and v (B, T, KV, D), and for a packed row (B = 1) the int32
# starts of its segments and the length of the longest; gives (B, T, H, D).
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", int], Tensor]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> Tensor:
    """Causal attention by PyTorch alone, as Attend says; a packed row document by document."""

    def dense(*qkv: Tensor) -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in qkv)
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    if starts is None:
        return dense(q, k, v)
    edges = torch.unique(starts).tolist()
    return torch.cat([dense(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(edges)], 1)


def attend_varlen() -> Attend:
    """PyTorch's varlen kernel; attend_sdpa for rows that are not packed."""
    from torch.nn.attention.varlen import varlen_attn

    # Builds from January 2026 on say it in keyword-only options (pytorch#172238), those before as a flag.
    causal = {"window_size": (-1, 0)} if varlen_attn.__kwdefaults__ else {"is_causal": True}

    def attend(q, k, v, starts, longest):
        if starts is None:
            return attend_sdpa(q, k, v, None, longest)
        queries = q[0]
        keys, values = (t[0].repeat_interleave(q.size(2) // t.size(2), 1) for t in (k, v))
        return varlen_attn(queries, keys, values, starts, starts, longest, longest, **causal)[None]

    return attend


def attend_flash(backend: str) -> Attend:
    """FlashAttention-3 ("fa3"), FlashAttention-2 ("fa2") or PyTorch's varlen kernel, as attend_sdpa."""
    if backend == "varlen":
        return attend_varlen()
    library = importlib.import_module({"fa3": "flash_attn_interface", "fa2": "flash_attn"}[backend])

    def output(result):  # some builds give the log-sum-exp as well
        return result[0] if isinstance(result, tuple) else result

    def attend(q, k, v, starts, longest):
        if starts is None:
            return output(library.flash_attn_func(q, k, v, causal=True))
        packed = library.flash_attn_varlen_func(
            q[0], k[0], v[0], starts, starts, longest, longest, causal=True
        )
        return output(packed)[None]

    return attend


def usable_attention(backend: str, run: Run) -> Attend | str:
    """The backend, or why it cannot be used."""
    if backend == "sdpa":
        return attend_sdpa
    if not run.is_cuda or run.dtype != torch.bfloat16:
        return "needs a GPU and bfloat16"
    if backend == "fa3" and torch.cuda.get_device_capability(run.device)[0] != 9:
        return "needs a Hopper GPU"
    try:
        return attend_flash(backend)
    except ImportError as error:
        return f"cannot be imported: {error}"


def pick_attention(config: Config, run: Run) -> Attend:
    """The backend ATTENTION, or the first of fa3, fa2, varlen, sdpa that can be used; logs which and why."""
    backends = ("fa3", "fa2", "varlen", "sdpa")
    order = {backend: functools.partial(usable_attention, backend, run) for backend in backends}
    return first_usable(run, "attention", "ATTENTION", config.attention, order)


def rms_norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last dimension, without gain."""
    return F.rms_norm(x, (x.size(-1),))


class LoRA(nn.Module):
    """Low-rank deltas x -> x A^T B^T, one per document, site and visit; the head has one visit (#1530)."""

    def __init__(self, config: Config, documents: int, device: torch.device):
        super().__init__()
        width = config.model_dim
        kv_width = config.num_kv_heads * width // config.num_heads
        rank = config.ttt_lora_rank
        visits = len(make_route(config, config.num_loops > 0))
        sites = {  # (visits, outputs, whether it has adapters)
            "q": (visits, width, config.ttt_q_lora),
            "k": (visits, kv_width, config.ttt_k_lora),
            "v": (visits, kv_width, config.ttt_v_lora),
            "o": (visits, width, config.ttt_o_lora),
            "down": (visits, width, config.ttt_mlp_lora),
            "head": (1, config.vocab_size, True),
        }
        read = {}
        write = {}
        for site, (count, outputs, enabled) in sites.items():
            if enabled:
                read[site] = nn.Parameter(torch.empty(count, documents, rank, width, device=device))
                write[site] = nn.Parameter(torch.empty(count, documents, outputs, rank, device=device))
        # Given a dictionary, ParameterDict sorts it: the order in which `reset` draws.
        self.read = nn.ParameterDict(read)
        self.write = nn.ParameterDict(write)
        self.scale = config.ttt_lora_alpha / rank if config.ttt_lora_alpha else 1.0

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Fresh adapters: A uniform in +-1/sqrt(inputs) from `seed`, B zero, so that the delta is zero."""
        generator = torch.Generator(self.read["head"].device).manual_seed(seed)
        for read, write in zip(self.read.values(), self.write.values(), strict=True):
            bound = read.size(-1) ** -0.5
            read.uniform_(-bound, bound, generator=generator)
            write.zero_()

    def per_visit(self, dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """site -> (A, B) of each visit in `dtype`: scaled (documents, rank, in), (documents, out, rank)."""
        adapters = {}
        for site in self.read:
            read = (self.read[site] * self.scale).to(dtype).unbind(0)
            write = self.write[site].to(dtype).unbind(0)
            adapters[site] = list(zip(read, write, strict=True))
        return adapters


# Calibration looks at every product through one: called with the site, the layer, the input and the output.
Tap = Callable[[str, int, Tensor, Tensor], None]


class Hooks(NamedTuple):
    """What hangs on the matrices besides their weights: a calibration tap, adapters by site and visit."""

    tap: Tap | None = None
    lora: dict[str, list[tuple[Tensor, Tensor]]] | None = None

    def adapt(self, site: str, visit: Visit, x: Tensor, y: Tensor) -> Tensor:
        """y plus what the site's adapter makes of x on this visit, if there is one."""
        if self.lora is None or site not in self.lora:
            return y
        read, write = self.lora[site][visit.index]
        return y + x @ read.mT @ write.mT


# The head is no layer, but its product has the same hooks: a tap sees it as layer 0, its only adapter has
# index 0. It comes after the last visit, so what is said of skips and residual means nothing here.
HEAD_VISIT = Visit(layer=0, index=0, pushes_skip=False, skip_row=None, residual="serial")


class Shared(NamedTuple):
    """What all visits of one forward read."""

    banks: dict[str, tuple[Tensor, ...]]  # parameter -> its entries along dim 0, in the model's dtype
    rotation: tuple[Tensor, Tensor]
    x0: Tensor  # the embedding (B, T, D), to which every layer may return
    batch: Batch
    hooks: Hooks


class GPT(nn.Module):
    """The one network: layers as the route says, weights from the table, matrices in banks (#1523)."""

    def __init__(
        self,
        config: Config,
        attend: Attend = attend_sdpa,
        fused: bool = False,
        dtype: torch.dtype = torch.float32,
        feed_forward: MLP = mlp_reference,
    ):
        super().__init__()
        self.config = config
        self.attend = attend
        self.fused = fused
        self.dtype = dtype
        self.feed_forward = feed_forward
        self.looped = False
        self.routes = {looped: make_route(config, looped) for looped in (False, True)}
        self.table = parameter_table(config)
        for name, spec in self.table.items():
            weight = torch.empty(spec.shape)
            spec.init(weight)
            if spec.optimizer == "embed":
                weight = weight.to(dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.register_parameter("hash_embed", None)  # exists during test-time training alone

    def forward(self, batch: Batch, tap: Tap | None = None, lora: LoRA | None = None) -> Tensor:
        """Cross-entropy in nats of every target, (B, T) fp32."""
        hooks = Hooks(tap, None if lora is None else lora.per_visit(self.dtype))
        logits = self.matmul("head", self.embed, self.trunk(batch, hooks), HEAD_VISIT, hooks).flatten(0, 1)
        targets = batch.targets.flatten()
        if self.fused:
            losses, _ = softcapped_ce_op(logits, targets, self.config.logit_softcap)
        else:
            losses = softcapped_ce_reference(logits, targets, self.config.logit_softcap)
        return losses.view_as(batch.targets)

    def trunk(self, batch: Batch, hooks: Hooks) -> Tensor:
        """The normalised output of the last layer, (B, T, D): the input of the head."""
        # One cast and one unbind per bank: looped layers reuse them, and the backward has a node per bank,
        # not per visit.
        banks = {name: getattr(self, name).to(self.dtype).unbind(0) for name in self.table if name != "embed"}
        shared = Shared(banks, self.rotation(batch), self.embedding(batch), batch, hooks)

        x = shared.x0
        lane = None  # the residual stream of the MLP, once it has parted from that of attention
        skips = []
        for visit in self.routes[self.looped]:
            before = x
            if visit.skip_row is not None:
                x = self.merge_skip(x, skips.pop(), visit, shared)
            if visit.residual == "two_lane":
                if lane is None:
                    lane = before if self.config.parallel_first_skip == "lane0" else x
                x, lane = self.two_lane(x, lane, visit, shared)
            elif visit.residual == "gptj":
                x = self.gptj(x, visit, shared)
            else:
                x = self.serial(x, visit, shared)
            if visit.pushes_skip:
                skips.append(x)
        return rms_norm(x if lane is None else 0.5 * (x + lane))

    def merge_skip(self, x: Tensor, skip: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """x with a remembered output, channel by channel: through a gate between the two, or added."""
        skip = shared.banks["skip_weights"][visit.skip_row] * skip
        if not self.config.skip_gates_enabled:
            return x + skip
        gate = torch.sigmoid(shared.banks["skip_gates"][visit.skip_row])
        return torch.lerp(skip, x, gate)

    # The three forms of residual differ in what the MLP reads and where the outputs of attention and MLP go.
    # In all of them attention reads its stream mixed with the embedding, normalised.

    def serial(self, x: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """The MLP reads what attention has written; both write to the mixed stream."""
        x = self.mix(x, visit, shared)
        x = x + self.attention(self.normalise(x, visit), x, visit, shared)
        return x + self.mlp(self.normalise(x, visit), visit, shared)

    def gptj(self, x: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """Attention and MLP read the same, as in GPT-J; both write to the mixed stream."""
        x = self.mix(x, visit, shared)
        normed = self.normalise(x, visit)
        return x + self.attention(normed, x, visit, shared) + self.mlp(normed, visit, shared)

    def two_lane(self, x: Tensor, lane: Tensor, visit: Visit, shared: Shared) -> tuple[Tensor, Tensor]:
        """Attention reads x mixed, the MLP `lane` as it is; both write to both; the mix is not kept (#1529)."""
        mixed = self.mix(x, visit, shared)
        attended = self.attention(self.normalise(mixed, visit), mixed, visit, shared)
        transformed = self.mlp(self.normalise(lane, visit), visit, shared)
        keep = shared.banks["parallel_resid_lambdas"][visit.layer]
        post = shared.banks["parallel_post_lambdas"][visit.layer]  # [branch, lane]: its share for the lane
        return (
            keep[0] * x + post[0, 0] * attended + post[1, 0] * transformed,
            keep[1] * lane + post[0, 1] * attended + post[1, 1] * transformed,
        )

    def mix(self, x: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """x with the embedding let in again, channel by channel."""
        keep, again = shared.banks["resid_mix"][visit.layer]
        return keep * x + again * shared.x0

    def normalise(self, x: Tensor, visit: Visit) -> Tensor:
        """x normalised, with LN_SCALE the smaller the deeper the layer."""
        return rms_norm(x) * ((visit.layer + 1) ** -0.5 if self.config.ln_scale else 1.0)

    @staticmethod
    def matmul(
        site: str, weight: Tensor, x: Tensor, visit: Visit, hooks: Hooks, adapt: Tensor | None = None
    ) -> Tensor:
        """x (B, T, in) times weight (out, in), with its hooks; an adapter reads `adapt` if given, else x."""
        y = F.linear(x, weight)
        if hooks.tap is not None:
            hooks.tap(site, visit.layer, x, y)
        return hooks.adapt(site, visit, x if adapt is None else adapt, y)

    def attention(self, x: Tensor, residual: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """The scaled output of attention on x (B, T, D), which is `residual` normalised."""
        config = self.config
        banks = shared.banks
        layer = visit.layer
        B, T, _ = x.shape
        raw = self.matmul("q", banks["qo"][layer], x, visit, shared.hooks)
        k = self.matmul("k", banks["kv"][layer], x, visit, shared.hooks)
        v = self.matmul("v", banks["kv"][config.num_layers + layer], x, visit, shared.hooks)
        q = raw.view(B, T, config.num_heads, -1)
        k = k.view(B, T, config.num_kv_heads, -1)
        v = v.view(B, T, config.num_kv_heads, -1)

        q = self.rotate(rms_norm(q), shared.rotation) * banks["q_gain"][layer][:, None]
        k = self.rotate(rms_norm(k), shared.rotation)
        y = self.attend(q, k, v, shared.batch.starts, shared.batch.longest)
        if layer >= config.num_layers - config.xsa_last_n:
            y = self.without_own_value(y, v)
        if config.head_gate != "none":
            source = {"residual": residual, "proj": x, "q": raw}[config.gate_attn_src]
            y = self.gate_heads(y, source, banks["head_gate"][layer])

        weight = banks["qo"][config.num_layers + layer]
        y = self.matmul("o", weight, y.flatten(2), visit, shared.hooks, adapt=x)
        return banks["attn_scale"][layer] * y

    def rotation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, ROPE_DIMS/2) of every position."""
        length = batch.inputs.size(1)
        dims = self.config.rope_dims
        base = self.config.rope_base
        if self.config.rope_yarn and dims > 2:
            # NTK: where rows are longer than in training, the slowest wave becomes longer by the same factor.
            base = base * max(1.0, length / self.config.train_seq_len) ** (dims / (dims - 2))
        # Angles in fp32: rounding these would cost phase.
        options = {"device": batch.inputs.device, "dtype": torch.float32}
        frequencies = base ** -(torch.arange(0, dims, 2, **options) / max(dims, 1))
        angles = torch.outer(torch.arange(length, **options), frequencies)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary embedding of the first ROPE_DIMS of each head of x (B, T, H, D), in halves."""
        half = self.config.rope_dims // 2
        cos, sin = rotation
        a = x[..., :half]
        b = x[..., half : 2 * half]
        rest = x[..., 2 * half :]
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)

    @staticmethod
    def without_own_value(y: Tensor, v: Tensor) -> Tensor:
        """XSA: y (B, T, H, D) less its part along the value of its own position, v (B, T, KV, D)."""
        own = F.normalize(v, dim=-1)[:, :, :, None]
        grouped = y.view(*v.shape[:3], -1, y.size(-1))
        return (grouped - (grouped * own).sum(-1, keepdim=True) * own).reshape(y.shape)

    def gate_heads(self, y: Tensor, source: Tensor, weight: Tensor) -> Tensor:
        """y (B, T, H, D), each head times a gate that `weight` (H, G) reads from `source` (B, T, >= G)."""
        opening = F.linear(source[..., : self.config.gate_width or None], weight)
        if self.config.head_gate == "attn_out":
            gate = 2 * torch.sigmoid(opening)  # 1 with the initial weights
        else:
            gate = torch.sigmoid(self.config.sparse_attn_gate_scale * opening)
        return y * gate[..., None]

    def mlp(self, x: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """The scaled output of LeakyReLU(x up^T, 1/2)^2 down^T, in one unless calibration looks inside."""
        hooks = shared.hooks
        up = shared.banks["up"][visit.layer]
        down = shared.banks["down"][visit.layer]
        if hooks.tap is None:
            y = hooks.adapt("down", visit, x, self.feed_forward(x, up, down))
        else:
            hidden = F.leaky_relu(self.matmul("up", up, x, visit, hooks), 0.5).square()
            y = self.matmul("down", down, hidden, visit, hooks, adapt=x)
        return shared.banks["mlp_scale"][visit.layer] * y

    def embedding(self, batch: Batch) -> Tensor:
        """The normalised token embeddings (B, T, D), with what they take from the token before."""
        ids = batch.inputs
        # Where a packed row starts a segment; the starts that are padding lie behind its end.
        opens = torch.zeros(ids.size(1) + 1, dtype=torch.bool, device=ids.device)
        if batch.starts is not None:
            opens = opens.index_fill(0, batch.starts.long(), True)
        opens = opens[:-1]

        x = rms_norm(F.embedding(ids, self.embed))
        if self.hash_embed is not None:
            x = x + self.hashed_pairs(ids, opens).to(x.dtype)
        if self.config.smear_gate:
            x = self.smear(x, ids, opens)
        return x

    def hashed_pairs(self, ids: Tensor, opens: Tensor) -> Tensor:
        """The hash embedding of each (token before, token); 0 comes before the start of a segment (#1523)."""
        previous = F.pad(ids[:, :-1], (1, 0)).masked_fill(opens, 0)
        return F.embedding((2039 * previous + ids) % self.config.hash_embed_size, self.hash_embed)

    def smear(self, x: Tensor, ids: Tensor, opens: Tensor) -> Tensor:
        """x with a gated share of the position before (#1667)."""
        opening = F.linear(x[:, 1:, : self.config.gate_width or None], self.smear_w.to(x.dtype))
        share = self.smear_lambda.to(x.dtype) * torch.sigmoid(opening)
        if self.config.smear_gate_bos_fix:  # nothing into the start of a document or segment (#1851)
            share = share.masked_fill(((ids == BOS) | opens)[:, 1:, None], 0)
        return torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), 1)


# === OPTIMIZERS ===
# In: the gradients of this rank's share of a batch. Out: parameters one step further, the same on every rank.
# Muon moves the banks of matrices, AdamW the embedding and everything small: a column of the parameter table
# says which. Ranks divide Muon's work bank by bank and do the rest in full each. The schedules at the end are
# functions of progress or step alone: change them freely.

# A row (a, b, c) per iteration of X <- aX + (bA + cA^2)X with A = XX^T; iterations after the last row repeat
# it. "classic" is Muon's own quintic, "polar_express" as in #1787.
NEWTON_SCHULZ = {
    "classic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.5000),
        (3.8917, -2.7725, 0.5061),
        (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    ),
}


def orthogonalize(
    update: Tensor, coefficients: tuple[tuple[float, float, float], ...], fused: bool = False
) -> Tensor:
    """The matrices (N, R, C) of `update`, all singular values moved close to 1, by Newton-Schulz."""
    wide = update.size(-2) <= update.size(-1)
    x = update if wide else update.mT  # the Gram matrix of the shorter side is the smaller one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        if fused:
            gram = symmetric_product_op(x, 0.0, 1.0)
            polynomial = symmetric_product_op(gram, b, c)
        else:
            gram = x @ x.mT
            polynomial = b * gram + c * gram @ gram
        x = a * x + polynomial @ x
    return x if wide else x.mT


def muon_update(
    gradient: Tensor,
    buffer: Tensor,
    momentum: Tensor,
    rows: bool,
    dtype: torch.dtype,
    coefficients: tuple[tuple[float, float, float], ...],
    fused: bool = False,
) -> Tensor:
    """Nesterov momentum (updating `buffer`), row normalisation in fp32, Newton-Schulz in `dtype`."""
    buffer.mul_(momentum).add_(gradient)
    update = (gradient + momentum * buffer).float()
    if rows:
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return orthogonalize(update.to(dtype), coefficients, fused)


# The same collectives under the names of torch from 2.13 on and before.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Muon:
    """MuonEq-R on banks of matrices: each rank averages, orthogonalises and gives back its share of each."""

    # A step in the order of its communication, all of it asynchronous:
    #   reduce  starts a reduce-scatter per bank. While these run, the caller reduces and moves the rest.
    #   step    bank by bank, in the same order: wait for this rank's shard, orthogonalise it, start to gather
    #           the results of all ranks; then apply those of the bank before, which were gathered meanwhile.
    # So every rank issues the same collectives in the same order. Zeros fill up a bank until its shards are
    # equal in size. One rank alone does the same without communication.

    def __init__(self, run: Run, banks: dict[str, nn.Parameter], compiled: bool, fused: bool = False):
        self.run = run
        self.fused = fused
        self.dtype = run.dtype
        rows = NEWTON_SCHULZ[run.config.muon_coefficients]
        self.coefficients = tuple(rows[min(i, len(rows) - 1)] for i in range(run.config.muon_backend_steps))
        # Compiled as one, so that what is elementwise is fused.
        self.update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update
        # Large banks first: their communication hides the most work.
        self.banks = dict(sorted(banks.items(), key=lambda item: -item[1].numel()))
        self.momenta = {}
        for name, bank in self.banks.items():
            count = -(-len(bank) // run.world_size)
            self.momenta[name] = torch.zeros((count, *bank.shape[1:]), dtype=self.dtype, device=bank.device)
        self.shards = {}  # this rank's part of each averaged gradient, from `reduce` to `step`
        self.pending = {}  # (handle, what is sent) of each reduce-scatter under way

    def reduce(self) -> None:
        """Start averaging the gradients into `shards`, this rank's part of each bank, to be waited for."""
        world_size = self.run.world_size
        for name, bank in self.banks.items():
            gradient = bank.grad.to(self.dtype)
            if world_size == 1:
                self.shards[name] = gradient
                continue
            padded = gradient.new_zeros((len(self.momenta[name]) * world_size, *bank.shape[1:]))
            padded[: len(bank)] = gradient / world_size
            self.shards[name] = torch.empty_like(self.momenta[name])
            self.pending[name] = reduce_scatter(self.shards[name], padded, async_op=True), padded

    def wait(self, name: str) -> None:
        """Until the shard of a bank has arrived."""
        if name in self.pending:
            handle, _ = self.pending.pop(name)
            handle.wait()

    def step(self, rate: float, momentum: float, decay: float, scale: Tensor | None) -> None:
        """p <- p (1 - rate*decay) - rate sqrt(max(1, R/C)) X for every bank; `scale`: of the gradients."""
        mu = torch.tensor(momentum, dtype=self.dtype, device=self.run.device)
        rows = self.run.config.muon_row_normalize
        previous = None
        for name, bank in self.banks.items():
            self.wait(name)
            shard = self.shards.pop(name)
            if scale is not None:
                shard.mul_(scale)
            update = self.update(
                shard, self.momenta[name], mu, rows, self.dtype, self.coefficients, self.fused
            )
            gathered = self.gather(update)
            if previous is not None:
                self.apply(*previous, rate, decay)
            previous = (bank, *gathered)
        self.apply(*previous, rate, decay)

    def gather(self, shard: Tensor) -> tuple[Tensor, Any]:
        """The shards of all ranks as one tensor, and what to wait for before reading it (one rank: None)."""
        if self.run.world_size == 1:
            return shard, None
        whole = shard.new_empty((len(shard) * self.run.world_size, *shard.shape[1:]))
        return whole, all_gather(whole, shard.contiguous(), async_op=True)

    @staticmethod
    def apply(bank: nn.Parameter, gathered: Tensor, handle: Any, rate: float, decay: float) -> None:
        """Move one bank by its gathered update."""
        if handle is not None:
            handle.wait()
        scale = math.sqrt(max(1.0, bank.size(1) / bank.size(2)))
        bank.data.mul_(1 - rate * decay).add_(gathered[: len(bank)].to(bank.dtype), alpha=-rate * scale)

    def state(self) -> dict[str, Tensor]:
        """The whole momentum of each bank, whatever the number of ranks."""
        gathered = {name: self.gather(shard) for name, shard in self.momenta.items()}
        state = {}
        for name, (whole, handle) in gathered.items():
            if handle is not None:
                handle.wait()
            state[name] = whole[: len(self.banks[name])].clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take this rank's part of a `state`."""
        for name, shard in self.momenta.items():
            part = state[name][self.run.rank * len(shard) : (self.run.rank + 1) * len(shard)]
            shard.zero_()
            shard[: len(part)] = part.to(shard)


class Optimizers:
    """Muon for the banks, AdamW for the embedding and everything small, one gradient clip for all of it."""

    def __init__(self, run: Run, model: GPT, compiled: bool):
        self.run = run
        config = run.config

        def moved_by(optimizer: str) -> dict[str, nn.Parameter]:
            parameters = model.named_parameters()
            return {name: p for name, p in parameters if model.table[name].optimizer == optimizer}

        embed = list(moved_by("embed").values())
        scalar = list(moved_by("scalar").values())
        self.muon = Muon(run, moved_by("muon"), compiled, model.fused)
        self.replicated = [*embed, *scalar]  # moved in full on every rank
        self.parameters = [*self.muon.banks.values(), *self.replicated]
        groups = [
            {"params": embed, "lr": config.tied_embed_lr, "weight_decay": config.embed_wd},
            {"params": scalar, "lr": config.scalar_lr, "weight_decay": config.adam_wd},
        ]
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, fused=run.is_cuda)
        self.rates = [group["lr"] for group in self.adam.param_groups]

    def step(self, rate_scale: float, momentum: float, decay: float) -> None:
        """One update of all parameters from their gradients, which are freed; `decay`: of the matrices."""
        config = self.run.config
        for parameter in self.parameters:
            if parameter.grad is None:  # the route of this step visits no layer that uses it
                parameter.grad = torch.zeros_like(parameter)

        if config.grad_clip_norm and config.grad_clip_scope == "local":
            nn.utils.clip_grad_norm_(self.parameters, config.grad_clip_norm, foreach=True)
        self.muon.reduce()
        self.reduce_replicated()
        scale = None
        if config.grad_clip_norm and config.grad_clip_scope == "global":
            scale = self.global_clip_scale()
            torch._foreach_mul_([parameter.grad for parameter in self.replicated], scale)

        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_scale
        self.adam.step()
        self.muon.step(config.matrix_lr * rate_scale, momentum, decay, scale)

        for parameter in self.parameters:
            parameter.grad = None

    def reduce_replicated(self) -> None:
        """Average the gradients of `replicated`, in one flat all-reduce per dtype."""
        world_size = self.run.world_size
        if world_size == 1:
            return
        # In the order of the parameters: that of a set differs between ranks, which would mix the dtypes up.
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.replicated):
            gradients = [parameter.grad for parameter in self.replicated if parameter.dtype == dtype]
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / world_size
            parts = self.run.sum_over_ranks(flat).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def global_clip_scale(self) -> Tensor:
        """What brings the norm of all averaged gradients down to GRAD_CLIP_NORM."""

        def square(gradients: Iterable[Tensor]) -> Tensor:
            return sum(gradient.float().square().sum() for gradient in gradients)

        for name in self.muon.banks:
            self.muon.wait(name)
        sharded = self.run.sum_over_ranks(square(self.muon.shards.values()))
        norm = (sharded + square(parameter.grad for parameter in self.replicated)).sqrt()
        return (self.run.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)

    def state(self) -> dict[str, Any]:
        """Everything `load` needs, as tensors and numbers."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a `state`."""
        self.adam.load_state_dict(state["adam"])
        self.muon.load(state["muon"])


@torch.no_grad()
def update_ema(average: dict[str, Tensor], model: GPT, decay: float) -> None:
    """Move the fp32 `average` of all parameters towards the live ones by 1 - decay (#1585)."""
    averages = list(average.values())
    # Two fused calls instead of two per parameter.
    live = [model.get_parameter(name).detach().float() for name in average]
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, live, alpha=1 - decay)


def learning_rate_scale(config: Config, progress: float) -> float:
    """Learning-rate multiplier at `progress` (0 to 1): 1, then linear over WARMDOWN_FRAC, at least MIN_LR."""
    if config.warmdown_frac == 0 or progress < 1 - config.warmdown_frac:
        return 1.0
    return max((1 - progress) / config.warmdown_frac, config.min_lr)


def muon_weight_decay(config: Config, progress: float) -> float:
    """Muon weight decay at `progress`: constant, then linear to WD_TAPER_FINAL_MULT of it (#1729)."""
    start = config.wd_taper_start_frac
    taper = max(0.0, progress - start) / max(1 - start, 1e-9)
    return config.muon_wd * (1 - taper * (1 - config.wd_taper_final_mult))


def muon_momentum(config: Config, step: int) -> float:
    """Muon momentum at `step`: a linear ramp, then constant."""
    if config.muon_momentum_warmup_steps == 0:
        return config.muon_momentum
    ramp = min(1.0, step / config.muon_momentum_warmup_steps)
    return (1 - ramp) * config.muon_momentum_warmup_start + ramp * config.muon_momentum


# === QUANTIZE ===
# A matrix (R, C) becomes integers times steps. QUANTIZER=sdclip: one step per row, integers clipped. rate_distortion:
# delta 2^(row/8) 2^(column/8), following how much outputs and inputs matter, delta such that the file is full. Going
# down a column, the state of a trellis gives the parity of each integer: only integer >> 1 is coded.

TRELLIS_POLYNOMIALS = {
    8: (0o13, 0o4),
    64: (0o103, 0o24),
    256: (0o515, 0o362),
}  # parity polynomials of Ungerboeck's codes
STEPS_PER_OCTAVE = 8  # steps are 2^(n/OCTAVE)
SENSITIVITY_POWERS, BIT_PRICE = (
    (1.0, 1.0, 1.0),
    0.5,
)  # of the sensitivities between matrices, of rows, of columns; weight of the bits
SYMBOLS, SIZE_CLASSES, COUNT_GAIN, COUNT_LIMIT, INTERVAL_MASK = (
    256,
    40,
    32,
    1 << 18,
    (1 << 56) - 1,
)  # of the entropy coder: counts, interval
numba_jit = numba.njit(
    nogil=True, cache=os.path.exists((lambda: 0).__code__.co_filename)
)  # packed: it has no file


def parallel_map(work: Callable, jobs: Iterable, threads: int | None = None) -> list:
    """[work(job)] on as many threads as there are cores, or on `threads`."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return list(pool.map(work, jobs))


def clip_and_bits(config: Config, quantizer: str) -> tuple[float, int]:
    """(standard deviations covered by the integer range, integer width) of a quantiser class."""
    return {
        "attn": (config.attn_clip_sigmas, config.attn_bits or config.matrix_bits),
        "mlp": (config.mlp_clip_sigmas, config.mlp_bits or config.matrix_bits),
        "embed": (config.embed_clip_sigmas, config.embed_bits),
    }[quantizer]


def least_bits(config: Config, quantizer: str) -> float:
    """Bits that a weight needs at least: 16 in fp16, 1.5 in rate_distortion, 95 % of a Gaussian's entropy in SDClip."""
    if quantizer == "fp16" or config.quantizer == "rate_distortion":
        return 16 if quantizer == "fp16" else 1.5
    sigmas, bits = clip_and_bits(config, quantizer)
    return 0.95 * (math.log2((2 ** (bits - 1) - 1) / sigmas) + 2.05)


def collect_moments(run: Run, model: GPT, data: Dataset) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(E[x x^T] of the inputs, E[g^2] of the loss gradients at the outputs) of every matrix, by (site, layer).
    GPTQ_CALIBRATION_BATCHES micro-batches of shuffled training windows are dealt to the ranks, whose number changes
    nothing. A looped layer counts every visit. Labels are drawn from the model, for the Fisher diagonal (SDClip: 0)."""
    c, cap, keys = (
        run.config,
        run.config.logit_softcap,
        {m.key: m.parameter for m in list_matrices(model.table)},
    )
    rows = max(1, c.train_batch_tokens // STREAMS // c.train_seq_len)
    part = max(1, min(rows, 2**14 // c.train_seq_len))  # per forward: the backward keeps every activation
    count, tokens = c.gptq_calibration_batches * rows // part, part * c.train_seq_len
    loader = ShuffledLoader(
        dataclasses.replace(c, loader="shuffled", train_batch_tokens=STREAMS * tokens), data
    )
    zeros, shape = lambda *n: torch.zeros(n, device=run.device), lambda name: model.get_parameter(name).shape
    sums = {key: (zeros(*2 * shape(name)[-1:]), zeros(shape(name)[-2])) for key, name in sorted(keys.items())}
    sensitive = c.quantizer == "rate_distortion"

    def tap(site: str, layer: int, x: Tensor, y: Tensor) -> None:
        (inputs, outputs), x = sums[site, layer], x.detach().flatten(0, -2).float()
        inputs.addmm_(x.T, x)
        if sensitive and site != "head":
            y.register_hook(lambda g: [outputs.add_(g.flatten(0, -2).float().square().sum(0))][1:] or None)
        elif sensitive:  # the head in closed form: few tokens would draw a rare label
            bend = torch.tanh(y.detach().flatten(0, -2).float() / cap)
            chance = torch.softmax(cap * bend, -1)
            outputs.add_((chance * (1 - chance) * (1 - bend.square()).square()).sum(0))
            batch.targets.copy_(torch.multinomial(chance, 1, generator=generator).view_as(batch.targets))

    with torch.set_grad_enabled(sensitive):
        for index in run.progress("calibration", range(run.rank, count, run.world_size)):
            generator = torch.Generator(run.device).manual_seed(index)
            batch = to_device(loader.get(index // STREAMS, index % STREAMS), run)
            batch = batch._replace(targets=batch.targets.clone())  # they may share memory with the inputs
            loss = model(batch, tap).sum()
            if sensitive:
                loss.backward()
    model.zero_grad()
    return {
        key: tuple(run.sum_over_ranks(total) / (tokens * count) for total in pair)
        for key, pair in sums.items()
    }


class RoundingProblem(NamedTuple):
    """A matrix ready to be rounded."""

    weight: Tensor  # fp32 (R, C)
    order: Tensor  # of the columns, by falling diagonal of the damped inputs
    factor: Tensor  # fp32 (C, C) in that order, upper, unit diagonal: what the error of a column does to the later ones
    rows: np.ndarray  # int32 (R,) exponents of the steps
    columns: np.ndarray  # int32 (C,)


def rounding_problem(
    weight: Tensor, inputs: Tensor, outputs: Tensor, damping: float, powers: tuple[float, float, float]
) -> RoundingProblem:
    """Steps by reverse water-filling: outputs^(-1/2) times the diagonal of GPTQ's factor, to powers. The first of the
    `powers` is for the geometric means of whole matrices, the others for rows and columns within."""
    inputs, outputs = inputs.double().cpu().clone(), outputs.double().cpu()
    weight = weight.float().cpu() * (
        inputs.diagonal() > 0
    )  # a column whose input is always zero costs no bits
    inputs.diagonal().add_(damping * inputs.diagonal().mean().clamp_min(1e-30))
    order = torch.argsort(inputs.diagonal(), descending=True, stable=True)
    # inputs = R R^T with R upper, a Cholesky factor from the last column on; R^-1 is the factor that GPTQ needs.
    root = torch.linalg.cholesky(inputs[order][:, order].flip(0, 1)).flip(0, 1)
    factor = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
    row = -0.5 * torch.log2(outputs.clamp_min(0.01 * outputs.mean()).clamp_min(1e-30))
    column = torch.log2(factor.diagonal())[torch.argsort(order)]
    level, bend = row.mean() + column.mean(), lambda x, power: power * (x - x.mean())
    exponents = (powers[0] * level + bend(row, powers[1]), bend(column, powers[2]))
    rows, columns = ((STEPS_PER_OCTAVE * x).round().int().numpy() for x in exponents)
    return RoundingProblem(weight, order, (factor / factor.diagonal()[:, None]).float(), rows, columns)


def step_sizes(rows: np.ndarray, columns: np.ndarray, delta: float) -> np.ndarray:
    """The fp32 step delta 2^(row/8) 2^(column/8) of every weight (R, C), the same bits on every machine."""
    roots = np.array([2.0 ** (n / STEPS_PER_OCTAVE) for n in range(STEPS_PER_OCTAVE)], np.float32)
    scale = lambda n: np.ldexp(roots[n % STEPS_PER_OCTAVE], n // STEPS_PER_OCTAVE).astype(np.float32)
    return (np.float32(delta) * scale(rows))[:, None] * scale(columns)


def trellis(states: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, 2) state after s by the integer's second bit (its first is s & 1), (2, S) state before; of 0 states: none."""
    if states == 0:
        return np.zeros((1, 2), np.int64), np.zeros((2, 0), np.uint8)
    (h0, h1), s, bit = TRELLIS_POLYNOMIALS[states], np.arange(states)[:, None], np.arange(2)
    after = (s >> 1) ^ (h0 >> 1) * (s & 1) ^ (h1 >> 1) * bit
    return after, np.argsort(after, axis=0).T.astype(np.uint8)  # column `bit` of `after` is a permutation


@numba_jit
def viterbi(goal, price, before):
    """Integers (R,) on a trellis path from state 0 with the least sum of price (goal - integer)^2, all fp32 (R,)."""
    rows, states = len(goal), before.shape[1]
    metric, choice = np.empty(4, np.float32), np.empty((rows, states), np.uint8)
    cost, low, high = (
        np.full(states, 1e30, np.float32),
        np.empty(states, np.float32),
        np.empty(states, np.float32),
    )
    cost[0] = 0
    for r in range(rows):
        for c in range(4):  # to the nearest integer that is c modulo 4
            distance = (goal[r] - np.float32(c)) * np.float32(0.25)
            metric[c] = price[r] * np.float32(16) * (distance - np.rint(distance)) ** 2
        for s in range(states):
            low[s], high[s] = cost[s] + metric[s & 1], cost[s] + metric[2 + (s & 1)]
        for s in range(states):
            a, b = low[before[0, s]], high[before[1, s]]
            cost[s], choice[r, s] = min(a, b), b < a
    integers, s = np.empty(rows, np.int32), np.int64(np.argmin(cost))
    for r in range(rows - 1, -1, -1):
        bit = choice[r, s]
        s = np.int64(before[bit, s])
        c = np.float32(2 * bit + (s & 1))
        integers[r] = np.int32(np.rint((goal[r] - c) * np.float32(0.25)) * np.float32(4) + c)
    return integers


@numba_jit
def round_columns(w, step, factor, price, before, largest):
    """Integers (C, R) of the columns w (C, R) in turn, the error of one going to the later ones; the errors stay in w.
    No BLAS: its sums depend on the number of threads."""
    integers = np.empty(w.shape, np.int32)
    for j in range(len(w)):
        for i in range(j):
            for r in range(w.shape[1]):
                w[j, r] -= factor[i, j] * w[i, r]
        weight = (
            np.float32(1) + price * step[j] * step[j]
        )  # (x/s - m)^2 + p s^2 m^2 = g (x/sg - m)^2 + constant
        goal = w[j] / (step[j] * weight)
        if before.shape[1]:
            integers[j] = viterbi(goal, weight, before)
        else:
            integers[j] = np.minimum(np.maximum(np.rint(goal), -largest), largest)
        w[j] -= integers[j] * step[j]
    return integers


def round_matrix(
    p: RoundingProblem, step: np.ndarray, states: int, rate: float = 0.0, largest: int = 1 << 30
) -> np.ndarray:
    """Integers int32 (R, C), so that integers*step has little error under the inputs: column by column, the error of
    one goes to those not yet rounded (GPTQ). `rate` is how much of the price of its bits an integer pays: in units of
    the squared step a bit is worth 2 ln 2 of the distortion, 0.26 with a trellis and 1/12 without, and a Gaussian
    integer m has log2(e) m^2 / (2 variance) bits."""
    order, integers = p.order.numpy(), np.empty(step.T.shape, np.int32)
    w, step = (np.ascontiguousarray(x.T[order]) for x in (p.weight.numpy(), step))
    price = (
        rate * np.float32(0.26 if states else 1 / 12) / np.maximum(np.square(w).mean(0), np.float32(1e-20))
    )
    integers[order] = round_columns(w, step, p.factor.numpy(), price, trellis(states)[1], largest)
    return np.ascontiguousarray(integers.T)


class Quantized(NamedTuple):
    """What the artifact holds of one tensor: integers and steps of a matrix, or fp16 values."""

    values: Tensor  # int8 or int32 (R, C), or fp16 of any shape
    scales: Tensor | None = (
        None  # fp16 (R,) steps of the rows, or int32 (R + C,) exponents of rows and columns
    )
    delta: Tensor | None = None  # fp32 (1,), the factor of steps with exponents

    def restore(self) -> Tensor:
        """The fp32 tensor this stands for."""
        if self.delta is not None:
            rows, columns = np.split(self.scales.numpy(), [len(self.values)])
            return self.values * torch.from_numpy(step_sizes(rows, columns, self.delta.item()))
        return (
            self.values.float() if self.scales is None else self.values.float() * self.scales.float()[:, None]
        )


def round_clipped(p: RoundingProblem, sigmas: float, bits: int) -> Quantized:
    """int8 integers of at most `bits` bits and fp16 row steps: `sigmas` standard deviations of the row over the largest
    integer, what lies beyond is clipped (SDClip, #1394)."""
    largest = 2 ** (bits - 1) - 1
    scales = (sigmas * p.weight.std(dim=1) / largest).clamp_min(2.0**-24).half()  # a row of zeros: not 0 / 0
    integers = round_matrix(p, scales.float()[:, None].expand(p.weight.shape).numpy(), 0, largest=largest)
    return Quantized(torch.from_numpy(integers.astype(np.int8)), scales)


def round_matrices(
    plans: dict[str, RoundingProblem], delta: float, states: int, rate: float, threads: int = 0
) -> dict[str, Quantized]:
    """Every matrix on its trellis with steps of `delta`, the same for any number of threads."""
    integers = parallel_map(
        lambda p: round_matrix(p, step_sizes(p.rows, p.columns, delta), states, rate), plans.values(), threads
    )
    parts = lambda p, m: (
        torch.from_numpy(m),
        torch.from_numpy(np.append(p.rows, p.columns)),
        torch.tensor([delta]),
    )
    return {name: Quantized(*parts(p, m)) for (name, p), m in zip(plans.items(), integers, strict=True)}


def guess_delta(plans: dict[str, RoundingProblem], goal: float, states: int) -> float:
    """The delta that makes about `goal` bytes: a Gaussian of deviation s costs log2(s/step) + 2.05 bits."""
    bits = [
        p.weight.numel()
        * (
            2.05
            - (states > 0)
            - (p.rows.mean() + p.columns.mean()) / STEPS_PER_OCTAVE
            + float(torch.log2(p.weight.std() + 1e-9))
        )
        for p in plans.values()
    ]
    return 2.0 ** ((sum(bits) - 8 * goal) / sum(p.weight.numel() for p in plans.values()))


def fit_delta(
    delta: float, goal: float, slope: float, size_of: Callable[[float], int], log: Callable
) -> float:
    """The delta for which `size_of(delta)` bytes lie below `goal` by at most 0.05 %, or the best of 8: a secant in its
    log2 from `delta`, `slope` being about how many bytes fewer an octave makes."""
    at, tried = math.log2(delta), {}
    for _ in range(8):
        tried[at] = size = size_of(2.0**at)
        log(f"size: delta 2^{at:.5f} gives {size} bytes, {100 * (size / goal - 1):+.3f}% of the goal")
        if 0 <= goal - size <= 5e-4 * goal:
            break
        if len(tried) > 1:
            (a, before), (b, size) = list(tried.items())[-2:]
            slope = min(max((before - size) / (b - a), slope / 2), slope * 2)
        at += (size - goal * (1 - 2.5e-4)) / slope
    return 2.0 ** min((at for at in tried if tried[at] <= goal), default=max(tried))


def quantize(
    run: Run,
    table: dict[str, ParameterSpec],
    weights: dict[str, Tensor],
    goal: int,
    looped: bool,
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
) -> dict[str, Quantized]:
    """Every tensor of `weights` as the artifact holds it, by flat name in table order; rate_distortion makes a file of
    `goal` bytes. Rank 0 only: the matrices are spread over its threads."""
    c, todo = run.config, list_matrices(table)
    small = {
        name: Quantized(weights[name].half().cpu())
        for name, spec in table.items()
        if spec.quantizer == "fp16"
    }
    pick = lambda m: weights[m.parameter] if m.index is None else weights[m.parameter][m.index]
    powers = SENSITIVITY_POWERS if c.quantizer == "rate_distortion" else (0.0, 0.0, 0.0)
    try:
        made = parallel_map(
            lambda m: rounding_problem(pick(m), *moments[m.key], c.gptq_dampening, powers), todo
        )
    except torch.linalg.LinAlgError:
        raise Stop(
            f"GPTQ_DAMPENING={c.gptq_dampening}: the second moments of a matrix's inputs are not positive "
            "definite; raise it or GPTQ_CALIBRATION_BATCHES"
        ) from None
    plans = {m.name: p for m, p in zip(todo, made, strict=True)}
    if c.quantizer == "sdclip":
        rounded = parallel_map(lambda m: round_clipped(plans[m.name], *clip_and_bits(c, m.quantizer)), todo)
        return dict(zip(plans, rounded, strict=True)) | small
    count, found = sum(p.weight.numel() for p in plans.values()), {}
    goal = min(goal, count)  # 8 bits a weight: finer would be waste

    def size_of(delta: float) -> int:
        found[delta] = round_matrices(plans, delta, c.trellis_states, BIT_PRICE) | small
        return len(encode_artifact(c, found[delta], looped))

    return found[fit_delta(guess_delta(plans, goal, c.trellis_states), goal, count / 8, size_of, run.log)]


def assemble_weights(table: dict[str, ParameterSpec], tensors: dict[str, Quantized]) -> dict[str, Tensor]:
    """The fp32 parameters, banks put together again, from the tensors of an artifact."""
    weights = {name: tensors[name].restore() for name, spec in table.items() if spec.quantizer == "fp16"}
    parts: dict[str, list[Tensor]] = {}
    for m in list_matrices(table):
        parts.setdefault(m.parameter, []).append(tensors[m.name].restore())
    return weights | {
        name: torch.stack(ms) if len(table[name].shape) == 3 else ms[0] for name, ms in parts.items()
    }


# === ARTIFACT ===
# The header: magic, compressor, bytes of the manifest and of the payload, sha256 of both.
ARTIFACT_MAGIC, ARTIFACT_HEADER = b"GOLFPAK2", struct.Struct("<8s8sIQ32s")


@numba_jit
def code_symbol(symbol, counts, coder, buffer, decoding):
    """Code one symbol by its `counts`, the last of which is their sum, and count it; `coder` is low, span, position."""
    unit, start, s = coder[1] // counts[SYMBOLS], 0, 0
    while s < SYMBOLS - 1 and ((start + counts[s]) * unit <= coder[0] if decoding else s < symbol):
        start += counts[s]
        s += 1
    coder[0] += -start * unit if decoding else start * unit
    coder[1] = unit * counts[s]
    if coder[0] > INTERVAL_MASK:
        place = coder[2] - 1
        while buffer[place] == 255:  # a carry
            buffer[place] = 0
            place -= 1
        buffer[place] += 1
        coder[0] &= INTERVAL_MASK
    while coder[1] <= INTERVAL_MASK >> 8:
        if decoding:
            coder[0] = coder[0] << 8 | buffer[coder[2]]
        else:
            buffer[coder[2]] = coder[0] >> 48
            coder[0] = coder[0] << 8 & INTERVAL_MASK
        coder[1] <<= 8
        coder[2] += 1
    counts[s] += COUNT_GAIN
    counts[SYMBOLS] += COUNT_GAIN
    if counts[SYMBOLS] > COUNT_LIMIT:
        counts[:SYMBOLS] = (counts[:SYMBOLS] + 1) >> 1
        counts[SYMBOLS] = counts[:SYMBOLS].sum()
    return s


@numba_jit
def code_integers(values, shapes, after, counts, coder, buffer, decoding):
    """Encode or decode int32 matrices (R, C), one behind the other in `values`, column by column. Which of the `counts`
    (2 CLASSES + 4, SYMBOLS + 1) serve a symbol: those of its parity and of the size to expect, its row's mean times its
    column's factor, both of what came before; the last four are for the bytes of what is no symbol."""
    halving, begin = np.int64(len(after) > 1), 0
    for rows, columns in shapes:
        row_sum, row_size, weight = np.full(rows, 8 << 10), np.full(rows, 4 << 10), 2 << 10  # 1024 is 1
        for j in range(columns):
            seen, expected, state = 8 << 10, 8 << 10, 0  # of this column
            for r in range(rows):
                place, odd, context = begin + r * columns + j, state & 1, 0
                size = row_size[r] * ((seen << 10) // expected) >> 16
                while size >= 8:  # quarters of an octave
                    size >>= 1
                    context += 4
                context = min(context + max(size - 4, 0), SIZE_CLASSES - 1) + odd * SIZE_CLASSES
                k = np.int64(values[place]) >> halving
                rest = k << 1 if k >= 0 else ~k << 1 | 1  # 0, -1, 1, -2, 2 ...
                index = code_symbol(min(rest, SYMBOLS - 1), counts[context], coder, buffer, decoding)
                if index == SYMBOLS - 1:
                    index = 0
                    for i in range(0, 32, 8):
                        byte = code_symbol(
                            rest >> i & 255, counts[2 * SIZE_CLASSES + i // 8], coder, buffer, decoding
                        )
                        index |= byte << i
                k = index >> 1 ^ -(index & 1)
                values[place] = k << halving | odd
                state = after[state, k & 1]
                size = min(abs(k << halving | odd), 1 << 15) << 10
                row_sum[r], seen, expected = row_sum[r] + size, seen + size, expected + row_size[r]
            weight += (seen << 10) // expected
            if weight > 512 << 10:  # forget
                row_sum, weight = row_sum >> 1, weight >> 1
            row_size = (row_sum << 10) // weight
        begin += rows * columns


def code_matrices(matrices: list[np.ndarray], states: int, data: bytes | None = None) -> bytes:
    """The stream of int32 matrices (R, C) whose columns lie on trellis paths; with `data` they are filled from it."""
    values, shapes = np.concatenate([m.ravel() for m in matrices]), np.array([m.shape for m in matrices])
    # Counts start as 128 symbols of a geometric distribution, its mean that of the class (32 is 1): 0.2 % fewer bytes.
    mean, s = np.array([9 + 2 * (c % 4) << c // 4 for c in range(SIZE_CLASSES)]), np.arange(SYMBOLS)
    decay = itertools.accumulate(
        range(2 * SYMBOLS), lambda w, _: w * mean // (mean + 32), initial=0 * mean + (1 << 40)
    )
    weight = (
        np.stack([*decay])[np.stack(((s + 1) // 2 << (states > 0), s | 1))]
        .transpose(0, 2, 1)
        .reshape(-1, SYMBOLS)
    )
    counts = np.ones((2 * SIZE_CLASSES + 4, SYMBOLS + 1), np.int64)
    counts[: 2 * SIZE_CLASSES, :SYMBOLS] += 128 * COUNT_GAIN * weight // weight.sum(1, keepdims=True)
    counts[:, SYMBOLS] = counts[:, :SYMBOLS].sum(1)
    buffer = np.frombuffer(bytearray(8 * values.size + 64 if data is None else data + b"\xff" * 64), np.uint8)
    coder = np.array(
        [0, INTERVAL_MASK + 1, 0]
        if data is None
        else [int.from_bytes(buffer[:7].tobytes(), "big"), INTERVAL_MASK + 1, 7]
    )
    code_integers(values, shapes, trellis(states)[0], counts, coder, buffer, data is not None)
    for m, part in zip(matrices, np.split(values, np.cumsum(shapes.prod(1))[:-1]), strict=True):
        m[:] = part.reshape(m.shape)
    return buffer[: coder[2]].tobytes() + bytes([coder[0] >> 48])  # read with 255s behind it: within the span


def compress(data: bytes, compressor: str, undo: bool = False) -> bytes:
    """`data` packed as tightly as `compressor` can, or unpacked again."""
    if compressor == "lzma":
        return lzma.decompress(data) if undo else lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    import brotli

    return brotli.decompress(data) if undo else brotli.compress(data, quality=11, lgwin=24)


def code_stream(parts: list[Tensor], compressor: str, states: int, data: bytes | None = None) -> bytes:
    """One stream of the artifact; with `data`, its parts are filled from it. int32 goes through `code` (matrices lie on
    trellis paths, vectors do not), the rest through `compressor`, all low bytes before all high ones: these repeat."""
    if parts[0].dtype == torch.int32:
        return code_matrices(
            [part.view(len(part), -1).numpy() for part in parts], states * (parts[0].dim() > 1), data
        )
    planes = lambda part: part.contiguous().numpy().reshape(-1, 1).view(np.uint8).T
    if data is None:
        return compress(b"".join(planes(part).tobytes() for part in parts), compressor)
    raw = np.frombuffer(compress(data, compressor, undo=True), np.uint8)
    for part, flat in zip(parts, np.split(raw, np.cumsum([part.nbytes for part in parts])[:-1]), strict=True):
        planes(part)[:] = flat.reshape(part.itemsize, -1)
    return data


def streams_of(name: str, tensor: Quantized) -> list[tuple[str, Tensor]]:
    """Which stream each part of a tensor goes to: one per role, so that the coder sees like beside like."""
    role = "fp16" if tensor.scales is None else re.sub(r"\d+", "*", name)
    return [
        (stream, part)
        for stream, part in zip((role, "scales", "delta"), tensor, strict=True)
        if part is not None
    ]


def encode_artifact(config: Config, tensors: dict[str, Quantized], looped: bool) -> bytes:
    """The artifact: header, compressed JSON manifest (settings, tensors, streams), one compressed stream per role. It
    holds no code and no pickle; the header carries the sha256 of what follows it. `looped`: the route to use."""
    streams: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.values.float()).all():
            raise Stop(
                f"{name}: a value does not fit in fp16, nothing was packed; lower SCALAR_LR or raise ADAM_WD"
            )
        for stream, part in streams_of(name, tensor):
            streams.setdefault(stream, []).append(part)
    coder, states = config.compressor, config.trellis_states
    packed = parallel_map(
        lambda parts: code_stream(parts, coder, states), streams.values()
    )  # coders run without the lock
    what = lambda part: [str(part.dtype).removeprefix("torch."), list(part.shape)]
    manifest = {
        "format": 2,
        "looped": looped,
        "states": states,
        "model": config.chosen("Model"),
        "tensors": [[name, [what(part) for _, part in streams_of(name, t)]] for name, t in tensors.items()],
        "streams": [[name, len(data)] for name, data in zip(streams, packed, strict=True)],
    }
    head, payload = compress(json.dumps(manifest, separators=(",", ":")).encode(), coder), b"".join(packed)
    digest = hashlib.sha256(coder.encode() + head + payload).digest()
    return (
        ARTIFACT_HEADER.pack(ARTIFACT_MAGIC, coder.encode(), len(head), len(payload), digest) + head + payload
    )


def decode_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Quantized], str]:
    """(manifest, tensors by flat name, sha256 of the file) of the artifact at `path`; Stop if a byte of it is wrong."""
    remedy = "copy it again, or make it again with STAGE=quantize"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Stop(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    start = ARTIFACT_HEADER.size
    stop_if(
        len(data) < start or not data.startswith(ARTIFACT_MAGIC),
        f"{path}: not an artifact (it should start with {ARTIFACT_MAGIC.decode()}); {remedy}",
    )
    _, coder, head, payload, digest = ARTIFACT_HEADER.unpack_from(data)
    coder, size = coder.rstrip(b"\0"), start + head + payload
    stop_if(len(data) != size, f"{path}: {len(data)} bytes instead of {size}, truncated or damaged; {remedy}")
    found = hashlib.sha256(coder + data[start:]).digest()
    stop_if(found != digest, f"{path}: a byte was changed, the checksum does not fit; {remedy}")
    manifest = json.loads(compress(data[start : start + head], coder.decode(), undo=True))
    tensors, streams, jobs, end = {}, {}, [], start + head
    for name, parts in manifest["tensors"]:
        tensors[name] = Quantized(*(torch.empty(shape, dtype=getattr(torch, kind)) for kind, shape in parts))
        for stream, part in streams_of(name, tensors[name]):
            streams.setdefault(stream, []).append(part)
    for stream, size in manifest["streams"]:
        jobs.append((streams[stream], coder.decode(), manifest["states"], data[end : end + size]))
        end += size
    parallel_map(lambda job: code_stream(*job), jobs)
    return manifest, tensors, hashlib.sha256(data).hexdigest()


def seal_artifact(run: Run, tensors: dict[str, Quantized], looped: bool) -> tuple[int, str]:
    """Write the artifact, read the file again, compare every number; returns (bytes, sha256). Rank 0 only."""
    path = run.folder / "final_model.ptz"
    write_atomically(path, encode_artifact(run.config, tensors, looped))
    _, again, digest = decode_artifact(path)
    same = list(again) == list(tensors) and all(
        torch.equal(again[n].restore(), tensors[n].restore()) for n in tensors
    )
    stop_if(
        not same,
        f"{path}: reads back differently than it was written; check the disk and the "
        f"{run.config.compressor} package, nothing was scored",
    )
    return path.stat().st_size, digest


# The packed script: a decoder line around the compressed source. It registers the source with linecache because Triton
# reads the text of its kernels through inspect, which a bare exec would leave without any.
PACKED_HEAD = "import base64 as b,linecache as l,lzma as z\n"
PACKED_SCRIPT = PACKED_HEAD + (
    "s=z.decompress(b.b85decode(\"{}\"),3,None,[{{'id':33,'dict_size':1<<20}}]).decode()\n"
    "n='<train_gpt>'\nl.cache[n]=len(s),None,s.splitlines(True),n\nexec(compile(s,n,'exec'))\n"
)


@functools.lru_cache(1)
def pack_source(source: str) -> tuple[str, str]:
    """(`source` as a self-extracting script, how it was made); a script that is packed already comes back as it is."""
    if source.startswith(PACKED_HEAD):
        return source, "already packed"
    try:
        import python_minifier

        # Names stay: Triton passes arguments by name. Hoisting literals would take them out of the kernels' text.
        source, how = (
            python_minifier.minify(
                source, rename_locals=False, hoist_literals=False, remove_annotations=False
            ),
            "minified",
        )
    except ImportError:
        how = "not minified (python-minifier is not installed)"
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0, "dict_size": 1 << 20}
    ]
    packed = lzma.compress(source.encode(), lzma.FORMAT_RAW, filters=filters)
    return PACKED_SCRIPT.format(base64.b85encode(packed).decode()), how


# === EVALUATE ===
def plan_windows(length: int, context: int, stride: int, first: int = 0) -> np.ndarray:
    """(W, 3) int64 rows (first input, end of the targets, first target to score): every target 1..length-1 is scored
    once, `first` by the first window (0: as many as it sees), `stride` by each later one, with <= `context` inputs."""
    first = first or context
    ends = np.minimum(np.arange(first, max(first, length - 1) + stride, stride), length - 1)
    ends = ends[: np.searchsorted(ends, length - 1) + 1]
    scored = np.concatenate([[0], ends[:-1]])
    starts = np.maximum(0, scored + stride - context) * (scored > 0)
    return np.stack([starts, ends + 1, scored + 1], 1).astype(np.int64)


class Score(NamedTuple):
    """Sums over scored targets, and the one place where they become bits per byte."""

    nats: float
    tokens: float
    bytes: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of the original text."""
        return self.nats / math.log(2) / max(self.bytes, 1)


class Tally:
    """The loss of every validation target, written exactly once: the one place where scores are summed (fp64)."""

    def __init__(self, run: Run, validation: Validation):
        self.run, self.validation = run, validation
        self.nats = torch.zeros(len(validation.tokens), device=run.device)
        self.times = torch.zeros(len(validation.tokens), dtype=torch.int32, device=run.device)

    def add(self, losses: Tensor, places: Tensor) -> None:
        """Enter the losses (N,) of the targets at `places` (N,)."""
        self.nats[places] = losses.float()
        self.times.index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def require(self, first: int, last: int) -> None:
        """Stop unless the ranks have scored every target from `first` to `last`: nothing else may be learnt."""
        stop_if(
            (self.run.sum_over_ranks(self.times[first : last + 1].clone()) != 1).any(),
            f"targets {first} to {last}: not all scored exactly once before they are learnt: a bug",
        )

    def total(self, stage: str) -> Score:
        """The sums over all ranks; Stop if a target was left out or scored twice."""
        self.run.sum_over_ranks(self.nats), self.run.sum_over_ranks(self.times)
        wrong = int((self.times[1:] != 1).sum())
        stop_if(wrong, f"val:{stage}: {wrong} targets not scored exactly once: a bug, no score is reported")
        return Score(
            self.nats.double().sum().item(), len(self.nats) - 1, int(self.validation.bytes[1:].sum())
        )


def measure(run: Run, validation: Validation, stage: str, how: Callable[[Tally], None]) -> Score:
    """The score of all validation tokens by `how`; logs it, leaves sums by document and position in documents.npz."""
    begin, tally = run.now(), Tally(run, validation)
    how(tally)
    result, seconds = tally.total(stage), run.now() - begin
    facts = {"val_loss": result.loss, "val_bpb": result.bpb, "tokens": result.tokens, "bytes": result.bytes}
    run.metric("score", stage=stage, seconds=seconds, **facts)
    run.log(f"val:{stage} val_loss:{result.loss:.5f} val_bpb:{result.bpb:.5f} time:{seconds:.1f}s")
    if run.is_main and len(documents := find_documents(validation.tokens)):
        sizes, nats = documents[:, 1] - documents[:, 0] - 1, tally.nats[1:].double().cpu().numpy()
        octave = np.log2(np.arange(1, len(nats) + 1) - np.repeat(documents[:, 0], sizes)).astype(
            int
        )  # of the position
        sums = {"tokens": sizes, "position_start": 2 ** np.arange(octave.max() + 1)}
        for kind, values in (("nats", nats), ("bytes", validation.bytes[1:].astype(np.int64))):
            sums |= {
                kind: np.add.reduceat(values, documents[:, 0]),
                f"position_{kind}": np.bincount(octave, values),
            }
        np.savez(run.folder / "documents.npz", **sums)
    return result


def window_batch(
    tokens: np.ndarray, plan: np.ndarray, rows: int, context: int, packed: bool
) -> tuple[Batch, Tensor, Tensor]:
    """The windows `plan` as a batch of `rows` rows of `context` (packed: attention stays in documents), the mask of its
    scored targets (rows, context), and their places (N,) in `tokens`."""
    place = plan[:, :1] + np.arange(context + 1)
    inside = place < plan[:, 1:2]
    ids = np.zeros((rows, context + 1), dtype=np.int64)
    ids[: len(plan)][inside] = tokens[place[inside]]
    chosen = np.zeros((rows, context), dtype=bool)
    chosen[: len(plan)] = inside[:, 1:] & (place[:, 1:] >= plan[:, 2:3])
    batch = Batch(*(torch.from_numpy(side.copy()) for side in (ids[:, :-1], ids[:, 1:])))
    if packed:
        starts = segment_starts(ids[:, :-1].reshape(-1), context, np.arange(rows) * context)
        batch = Batch(batch.inputs.view(1, -1), batch.targets.view(1, -1), starts, context)
    return batch, torch.from_numpy(chosen), torch.from_numpy(place[:, 1:][chosen[: len(plan)]])


@torch.no_grad()
def score_windows(run: Run, forward: Callable[[Batch], Tensor], tally: Tally, plan: np.ndarray) -> None:
    """Score the targets of the windows `plan`, split over the ranks."""
    c, rows = run.config, max(1, run.config.val_batch_tokens // STREAMS // run.config.eval_seq_len)
    plan = plan[len(plan) * run.rank // run.world_size : len(plan) * (run.rank + 1) // run.world_size]
    for first in run.progress("windows", range(0, len(plan), rows)):
        batch, chosen, places = window_batch(
            tally.validation.tokens, plan[first : first + rows], rows, c.eval_seq_len, c.loader == "packed"
        )
        losses = forward(to_device(batch, run)).view(rows, -1)
        tally.add(losses[chosen.to(run.device)], places.to(run.device))


def score_sliding(run: Run, forward: Callable[[Batch], Tensor], stride: int, tally: Tally) -> None:
    """Score in windows of EVAL_SEQ_LEN, `stride` new targets each; plain evaluation if that is all of them."""
    score_windows(
        run, forward, tally, plan_windows(len(tally.validation.tokens), run.config.eval_seq_len, stride)
    )


def cosine_decay(place: int, count: int) -> float:
    """1 at place 0, falling to 0 at place count - 1 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * place / max(count - 1, 1)))


def hash_weights(model: GPT) -> str:
    """16 hex digits that change with any bit of the weights, for the ledger."""
    return hashlib.sha256(
        str([torch.hash_tensor(p).item() for p in model.parameters()]).encode()
    ).hexdigest()[:16]


class Learner:
    """Trains all weights of the model on ranges of tokens; the ranks share each step, or go alone if not `shared`."""

    def __init__(
        self,
        run: Run,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        clip: float,
        batch_seqs: int,
        freeze: int = 0,
        shared: bool = True,
        packed: bool | None = None,
    ):
        self.run, self.model, self.optimizer, self.clip = run, model.requires_grad_(True), optimizer, clip
        self.batch_seqs, self.shared = batch_seqs, shared
        self.packed = model.config.loader == "packed" if packed is None else packed
        self.parameters, layers, self.weights = (
            list(model.parameters()),
            model.config.num_layers,
            hash_weights(model),
        )
        self.frozen = [(model.embed, slice(None))] if freeze else []
        for name, spec in model.table.items():
            rows = [
                part * layers + i
                for part in range(spec.shape[0] // layers)
                for i in range(freeze)
                if spec.layered
            ]
            self.frozen += [(model.get_parameter(name), rows)] if rows else []

    def learn(self, tokens: np.ndarray, first: int, last: int, rate: float, epochs: int = 1) -> None:
        """`epochs` passes over the whole rows of EVAL_SEQ_LEN targets among tokens[first + 1:last + 1]."""
        run, length = self.run, self.run.config.eval_seq_len
        starts = np.arange(first, last - length + 1, length)
        plan = np.stack([starts, starts + length + 1, starts + 1], 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = self.batch_seqs * (STREAMS if self.shared else 1)
        for rows in [plan[i : i + size] for i in range(0, len(plan), size)] * epochs:
            mine = rows[run.rank :: run.world_size] if self.shared else rows
            if len(mine):  # else this rank only takes part in the sum
                batch = to_device(window_batch(tokens, mine, len(mine), length, self.packed)[0], run)
                (self.model(batch).sum() / (len(rows) * length)).backward()
            self.step()
        before, self.weights = self.weights, hash_weights(self.model)
        run.ledger("update", first=first + 1, last=last, rate=rate, before=before, after=self.weights)

    @torch.no_grad()
    def step(self) -> None:
        """One update: gradients summed over ranks if shared, clipped, frozen weights put back."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if self.shared:
                self.run.sum_over_ranks(parameter.grad)
        for parameter, rows in self.frozen:
            parameter.grad[rows] = 0
        nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        before = [parameter[rows].clone() for parameter, rows in self.frozen]
        self.optimizer.step()
        for (parameter, rows), kept in zip(self.frozen, before, strict=True):
            parameter[rows] = kept
        self.optimizer.zero_grad()


def chunk_sgd(run: Run, model: GPT, forward: Callable[[Batch], Tensor], tally: Tally) -> None:
    """Chunk by chunk but the last: score its targets in sliding windows, then train all weights on it (#1413, #1493). A
    window belongs to the chunk of the first target that it scores, so all of a chunk are scored before it is learnt."""
    c, tokens, size = run.config, tally.validation.tokens, run.config.ttt_chunk_tokens
    plan = plan_windows(len(tokens), c.eval_seq_len, c.eval_stride)
    chunk_of = (plan[:, 2] - 1) // size
    count = int(chunk_of[-1]) + 1
    optimizer = (
        torch.optim.AdamW(model.parameters(), weight_decay=c.ttt_adamw_wd)
        if c.ttt_optimizer == "adamw"
        else torch.optim.SGD(model.parameters(), momentum=c.ttt_momentum)
    )
    learner = Learner(run, model, optimizer, c.ttt_grad_clip, c.ttt_batch_seqs, c.ttt_freeze_blocks)
    for chunk in run.progress("val:ttt chunks", range(count)):
        score_windows(run, forward, tally, plan[chunk_of == chunk])
        run.ledger("scored", chunk=chunk, weights=learner.weights)
        if chunk + 1 < count:
            tally.require(chunk * size + 1, (chunk + 1) * size)
            learner.learn(
                tokens, chunk * size, (chunk + 1) * size, c.ttt_lr * cosine_decay(chunk, count), c.ttt_epochs
            )


def find_documents(tokens: np.ndarray) -> np.ndarray:
    """(D, 2): first token and one past the last target (the next BOS) of each document; no BOS: every 2,048 (#1670)."""
    starts = np.unique(np.append(0, np.flatnonzero(tokens == BOS)))
    if len(starts) == 1:
        starts = np.arange(0, len(tokens), 2048)
    ends = np.minimum(np.append(starts[1:], len(tokens)) + 1, len(tokens))
    return np.stack([starts, ends], 1)[ends - starts > 1]


def schedule_documents(config: Config, lengths: np.ndarray) -> list[list[np.ndarray]]:
    """Per phase, the batches of document numbers in the order of scoring, longest first (#1530, #1626). Phase p ends at
    PHASED_TTT_PREFIX_DOCS * (p+1) / phases documents, rounded up to 8 batches: the same for any number of ranks."""
    order, size = np.argsort(lengths, kind="stable"), config.ttt_batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)][::-1]
    scored, phases = np.cumsum([len(batch) for batch in batches]), config.phased_ttt_num_phases
    reached = [
        np.searchsorted(scored, config.phased_ttt_prefix_docs * (p + 1) // phases) for p in range(phases)
    ]
    cuts = [0, *(-(-(int(batch) + 1) // STREAMS) * STREAMS for batch in reached), len(batches)]
    return [batches[a:b] for a, b in itertools.pairwise(cuts) if a < len(batches)]


def adapt_documents(
    run: Run, forward: Callable[..., Tensor], tally: Tally, documents: np.ndarray, seed: int
) -> None:
    """Score the `documents` (N, 2) side by side in chunks, with an adapter step on the losses of each chunk (#1530)."""
    c, lora = run.config, LoRA(run.config, len(documents), run.device)
    lora.reset(seed)
    optimizer = torch.optim.AdamW(
        lora.parameters(),
        c.ttt_lora_lr,
        (c.ttt_beta1, c.ttt_beta2),
        1e-10,
        c.ttt_weight_decay,
        fused=run.is_cuda,
    )
    plans = [
        plan_windows(b - a, c.ttt_eval_seq_len, c.ttt_chunk_size, c.ttt_chunk_size) + a for a, b in documents
    ]
    for chunk in range(max(map(len, plans))):
        plan = np.stack([rows[chunk] if chunk < len(rows) else np.zeros(3, np.int64) for rows in plans])
        context = int((plan[:, 1] - plan[:, 0]).max()) - 1
        batch, chosen, places = window_batch(tally.validation.tokens, plan, len(plan), context, packed=False)
        batch, chosen = to_device(batch, run), chosen.to(run.device)
        later = torch.tensor([chunk + 1 < len(rows) for rows in plans], device=run.device)
        weight = (chosen * later[:, None]) / chosen.sum(1, keepdim=True).clamp_min(1)
        learning = chunk + 1 < max(map(len, plans))
        for repeat in range(c.ttt_grad_steps if learning else 1):
            with torch.set_grad_enabled(learning):
                losses = forward(batch, lora=lora)
            if repeat == 0:
                tally.add(losses.detach()[chosen], places.to(run.device))
            if learning:
                (losses * weight).sum().backward()
                optimizer.step()
                optimizer.zero_grad()


def learn_documents(run: Run, model: GPT, tokens: np.ndarray, documents: np.ndarray) -> None:
    """One phase of SGD of all weights on the joined `documents` (N, 2), all scored; the last chunk is left (#1610)."""
    c, text = run.config, np.concatenate([tokens[a:b] for a, b in documents])
    optimizer = torch.optim.SGD(model.parameters(), momentum=c.global_ttt_momentum)
    learner = Learner(
        run,
        model,
        optimizer,
        c.global_ttt_grad_clip,
        c.global_ttt_batch_seqs,
        packed=c.global_ttt_respect_doc_boundaries,
    )
    size, ramp = c.global_ttt_chunk_tokens, c.global_ttt_warmup_chunks
    count = -(-(len(text) - 1) // size)
    for chunk in range(count - 1):
        rate = (
            c.global_ttt_lr * cosine_decay(chunk - ramp, count - ramp)
            if chunk >= ramp
            else c.global_ttt_warmup_start_lr
            + (c.global_ttt_lr - c.global_ttt_warmup_start_lr) * chunk / ramp
        )
        learner.learn(text, chunk * size, (chunk + 1) * size, rate, c.global_ttt_epochs)


def doc_lora(run: Run, model: GPT, forward: Callable[..., Tensor], tally: Tally) -> None:
    """Score documents with adapters of their own; between phases all weights learn the shortest scored (#1626)."""
    c, tokens = run.config, tally.validation.tokens
    documents = find_documents(tokens)
    phases, done, number = schedule_documents(c, documents[:, 1] - documents[:, 0]), [], 0
    for phase, batches in enumerate(phases):
        model.requires_grad_(False)
        for place, batch in enumerate(run.progress(f"val:ttt phase {phase + 1}", batches)):
            turn = place % (
                2 * STREAMS
            )  # dealt back and forth, so that no stream gets the longest of every round
            if min(turn, 2 * STREAMS - 1 - turn) in run.streams:
                adapt_documents(run, forward, tally, documents[batch], seed=number + place)
            done.append(batch)
        number += len(batches)
        run.ledger("scored", phase=phase, documents=sum(map(len, done)), weights=hash_weights(model))
        if phase + 1 < len(phases):
            prefix = np.concatenate(done[::-1])[
                : c.phased_ttt_prefix_docs * (phase + 1) // c.phased_ttt_num_phases
            ]
            run.log(
                f"val:ttt phase:{phase + 1}/{len(phases) - 1} docs:{sum(map(len, done))}/{len(documents)} "
                f"learning {len(prefix)} of them"
            )
            for first, end in documents[prefix]:
                tally.require(first + 1, end - 1)
            learn_documents(run, model, tokens, documents[prefix])
    model.requires_grad_(True)


def prequant_ttt(run: Run, model: GPT, validation: Validation) -> None:
    """Train on the validation tokens before they are scored (#1735), averaging ranks after each pass. Not legal."""
    c, tokens, size = run.config, validation.tokens, run.config.prequant_ttt_chunk_tokens
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=c.prequant_ttt_wd, fused=run.is_cuda)
    freeze = c.prequant_ttt_freeze_blocks
    learner = Learner(run, model, optimizer, c.prequant_ttt_grad_clip, len(tokens), freeze, shared=False)
    average = [parameter.detach().clone() for parameter in learner.parameters]
    for epoch in run.progress("prequant_ttt", range(c.prequant_ttt_epochs)):
        rate = c.prequant_ttt_lr * (0.1 + 0.9 * cosine_decay(epoch, c.prequant_ttt_epochs + 1))
        for first in range(run.rank * size, len(tokens) - 1, run.world_size * size):
            learner.learn(tokens, first, min(first + size, len(tokens) - 1), rate)
        with torch.no_grad():
            for parameter, mean in zip(learner.parameters, average, strict=True):
                run.sum_over_ranks(parameter.data).div_(run.world_size)
                mean.lerp_(parameter, 1 - c.ttt_ema_decay if c.ttt_ema_enabled else 1.0)
    with torch.no_grad():
        torch._foreach_copy_(learner.parameters, average)


def rehearse(run: Run, stages: dict[str, Callable[[Tally], None]]) -> None:
    """Run the stages on random tokens, so that nothing is compiled on the clock; the caller loads the weights again."""
    begin, c = run.now(), run.config
    tokens = np.random.default_rng(0).integers(
        2, c.vocab_size, STREAMS * c.ttt_batch_size * 3 * c.ttt_chunk_size
    )
    tokens[:: 3 * c.ttt_chunk_size] = BOS
    for how in stages.values():
        how(Tally(run, Validation(tokens.astype("<u2"), np.zeros(len(tokens), np.int32), "random")))
    run.log(
        f"rehearsal: {', '.join(stages)} on {len(tokens)} random tokens in {run.now() - begin:.1f}s, untimed"
    )


# === TRAIN ===
class Built(NamedTuple):
    """The model with the initial weights of SEED, its possibly compiled forward, and whether it is compiled."""

    model: GPT
    forward: Callable[[Batch], Tensor]
    compiled: bool


def build(run: Run) -> Built:
    """The model of this process; one for all stages, so that it is compiled once."""
    c = run.config
    torch.manual_seed(c.seed)
    compiled = c.compile == "on" or (c.compile == "auto" and run.is_cuda)
    torch._dynamo.config.recompile_limit = 64  # one per number of 64 segment starts and loop state
    attend, fused = pick_attention(c, run), pick_kernels(c, run)
    model = GPT(c, attend, fused, run.dtype, pick_mlp(c, run, fused)).to(run.device)
    run.log(f"compile: {'on' if compiled else 'off'} (COMPILE={c.compile}, {run.device.type})")
    for looped in (False, True) if c.num_loops else (False,):
        run.log(f"route{' looped' if looped else ''}: {show_route(model.routes[looped])}")
    run.log(
        f"model_params:{sum(p.numel() for p in model.parameters())} matrices:{len(list_matrices(model.table))}"
    )
    return Built(model, torch.compile(model, dynamic=False, fullgraph=True) if compiled else model, compiled)


def train_step(
    run: Run,
    forward: Callable[[Batch], Tensor],
    optimizers: Optimizers,
    batches: list[Batch],
    progress: float,
    step: int,
) -> Tensor:
    """Forward, backward and update over this rank's micro-batches; returns their mean loss (0-d, on the device)."""
    c = run.config
    total = torch.zeros((), device=run.device)
    for batch in batches:
        loss = forward(batch).mean() / len(batches)
        loss.backward()
        total += loss.detach()
    optimizers.step(learning_rate_scale(c, progress), muon_momentum(c, step), muon_weight_decay(c, progress))
    return total


def agree_on_progress(
    run: Run, waiting: list, elapsed: float, loss: Tensor, late: bool
) -> tuple[float, bool]:
    """(most elapsed seconds, is a loss not finite) over ranks; if `late`, a GPU's of a step before, from `waiting`."""
    facts = torch.stack(
        [torch.tensor(elapsed, dtype=torch.float64, device=run.device), (~loss.isfinite()).double()]
    )
    if run.world_size > 1:
        dist.all_reduce(facts, dist.ReduceOp.MAX)
    if run.is_cuda:
        waiting.append((torch.empty(2, dtype=torch.float64, pin_memory=True), torch.cuda.Event()))
        waiting[-1][0].copy_(facts, non_blocking=True)
        waiting[-1][1].record()
        del waiting[:-2]
        facts, event = waiting[0 if late else -1]
        event.synchronize()
    seconds, bad = facts.tolist()
    return seconds, bool(bad)


def load_checkpoint(run: Run, data: Dataset) -> dict[str, Any] | None:
    """checkpoint.pt of the run folder, None if there is none; Stop if it is damaged or of other settings or data."""
    path, shards = run.folder / "checkpoint.pt", data.fingerprint["shards"]
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings, fingerprint = saved["settings"], saved["data"]
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as error:
        raise Stop(
            f"{path}: cannot be read ({type(error).__name__}); delete it or choose another RUN_ID"
        ) from None
    different = describe_differences(settings, run.config.chosen("training"))
    stop_if(
        different, f"{path}: made with other settings ({different}); set them back or choose another RUN_ID"
    )
    stop_if(
        fingerprint != shards, f"{path}: of other data ({fingerprint}, here {shards}); choose another RUN_ID"
    )
    return saved


def to_cpu(state: Any) -> Any:
    """A copy of a nested state with its tensors on the CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def warm_up(run: Run, built: Built, optimizers: Optimizers, feed: Feed) -> None:
    """Compile and allocate before the clock: WARMUP_STEPS full steps per loop state; then put all state back."""
    start, c, (model, forward, compiled), padded = time.monotonic(), run.config, built, []
    weights, fresh = to_cpu(model.state_dict()), to_cpu(optimizers.state())
    if (
        compiled and c.loader == "packed" and c.warmup_steps
    ):  # from the fewest starts to one size more than seen
        batch, seen = (
            feed.get(0)[0],
            [len(b.starts) for step in range(c.warmup_steps) for b in feed.load(step)],
        )
        total = batch.inputs.numel()
        fewest = pad_starts(np.arange(0, total, batch.longest), total)
        padded = [
            batch._replace(starts=F.pad(fewest, (0, more), value=total).to(run.device))
            for more in range(0, max(seen, default=0) + 65 - len(fewest), 64)
        ]
    for looped in (False, True) if c.num_loops else (False,):
        model.looped = looped
        for batch in padded:
            forward(batch).mean().backward()
        for step in range(c.warmup_steps):
            train_step(run, forward, optimizers, feed.get(step), 0.0, c.muon_momentum_warmup_steps)
    model.looped = False
    model.load_state_dict(weights)
    optimizers.load(fresh)
    run.log(
        f"warm-up: {c.warmup_steps} steps per loop state in {run.now() - start:.1f}s, untimed; all state restored"
    )


def train(run: Run, data: Dataset, built: Built) -> None:
    """Train from the last checkpoint, or from the start, to the end of the budget; leaves averaged weights on disk."""
    c, path = run.config, run.folder / "checkpoint.pt"
    saved = load_checkpoint(run, data)
    if saved and saved["complete"]:
        run.log(f"train: {path} holds the finished training of {saved['step']} steps; going on from there")
        return
    model, forward, compiled = built
    optimizers, feed = Optimizers(run, model, compiled), Feed(run, LOADERS[c.loader](c, data))
    warm_up(run, built, optimizers, feed)
    average = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    waiting, step, before = [], 0, 0.0
    if saved:
        model.load_state_dict(saved["model"])
        optimizers.load(saved["optimizers"])
        average = {name: weight.to(run.device) for name, weight in saved["average"].items()}
        step, before, model.looped = saved["step"], saved["train_seconds"], saved["looped"]
        run.log(f"train: resumed at step {step} after {before:.1f}s of training")
        run.metric("resume", step=step, seconds=before)  # records of later steps before this one are void
    identity = {"settings": c.chosen("training"), "data": data.fingerprint["shards"]}
    validation = load_validation(data) if c.val_loss_every else None
    budget, writing = (
        c.max_wallclock_seconds - c.gptq_reserve_seconds,
        (writer := ThreadPoolExecutor(1)).submit(int),
    )
    graphs = lambda: torch._dynamo.utils.counters["stats"][
        "unique_graphs"
    ]  # torch.compile makes one per shape
    first, elapsed, start, ready = step, before, run.now(), graphs()
    run.ledger("train_clock_start", seconds=before)
    if validation:
        run.ledger("validation_read")
    while step < c.iterations and elapsed < budget:
        progress = step / c.iterations if c.schedule == "steps" else elapsed / budget
        if not model.looped and c.num_loops and progress >= c.enable_looping_at:
            model.looped = True
            run.log(f"loops on at step {step} after {elapsed:.1f}s")
        loss = train_step(run, forward, optimizers, feed.get(step), progress, step)
        update_ema(average, model, c.ema_decay)
        step += 1
        checkpoint = c.checkpoint_every > 0 and step % c.checkpoint_every == 0 and step < c.iterations
        elapsed, broken = agree_on_progress(
            run, waiting, before + time.monotonic() - start, loss, late=not checkpoint
        )
        stop_if(
            broken,
            f"train_loss is not finite at step {step}; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR "
            f"(nothing of this step was saved in {run.folder})",
        )
        if step % c.train_log_every == 0 or step <= 10 or step == c.iterations:
            mean, here, rate = (
                run.sum_over_ranks(loss.double()).item() / run.world_size,
                run.now() - start,
                learning_rate_scale(c, progress),
            )
            seconds, each = before + here, here / (step - first)  # the average is of this process
            left, speed = (
                min(each * (c.iterations - step), max(budget - seconds, 0.0)),
                c.train_batch_tokens / each,
            )
            run.log(
                f"step:{step}/{c.iterations} train_loss:{mean:.4f} lr:{rate:.3f} train_time:{1000 * seconds:.0f}ms "
                f"step_avg:{1000 * each:.2f}ms tok/s:{speed:.0f} left:{left:.0f}s"
            )
            times = {"seconds": seconds, "step_ms": 1000 * each, "speed": speed}
            run.metric("train", step=step, train_loss=mean, rate=rate, **times)
        if validation and step % c.val_loss_every == 0:
            paused, made = run.now(), graphs()
            measure(
                run, validation, f"step{step}", functools.partial(score_sliding, run, forward, c.eval_seq_len)
            )
            start, ready = start + run.now() - paused, ready + graphs() - made
        if checkpoint:
            content = {
                **identity,
                "complete": False,
                "step": step,
                "train_seconds": elapsed,
                "looped": model.looped,
                **to_cpu({"model": model.state_dict(), "optimizers": optimizers.state(), "average": average}),
            }
            writing.result()
            save = functools.partial(torch.save, content)
            writing = writer.submit(write_atomically, path, save) if run.is_main else writing
    seconds = before + run.now() - start
    writing.result()
    kib = (
        torch.cuda.max_memory_allocated() >> 10
        if run.is_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    late = int(run.sum_over_ranks(torch.tensor(graphs() - ready, device=run.device)))
    facts = {
        "steps": step,
        "train_seconds": seconds,
        "step_ms": 1000 * seconds / max(step, 1),
        "tokens_per_second": step * c.train_batch_tokens / seconds,
        "peak_memory_mib": kib >> 10,
        "graphs_before_clock": ready,
        "graphs_inside_clock": late,
    }
    run.log(f"{'warning: ' if late else ''}compile: {ready} graphs before the clock, {late} inside it")
    run.log(
        f"train: {step} steps in {seconds:.1f}s, {facts['step_ms']:.1f}ms per step, peak memory {kib >> 10} MiB, "
        f"stopped by {'ITERATIONS' if step >= c.iterations else 'MAX_WALLCLOCK_SECONDS'}"
    )
    content = identity | {
        "complete": True,
        "step": step,
        "train_seconds": seconds,
        "looped": model.looped,
        "average": to_cpu(average),
    }
    run.on_main_rank(lambda: write_atomically(path, functools.partial(torch.save, content)))
    record_stage(run, "train", facts)


# === MAIN ===
def record_stage(run: Run, stage: str, facts: dict[str, Any]) -> None:
    """Keep the facts of a finished stage in stages.json, from which summary.json is made. Rank 0 only."""
    run.metric(stage, **facts)
    if run.is_main:
        path = run.folder / "stages.json"
        write_atomically(path, json.dumps(read_json(path) | {stage: facts}, indent=1).encode())


def quantize_stage(run: Run, data: Dataset, built: Built) -> None:
    """Calibration, rounding, packing: checkpoint.pt -> final_model.ptz and packed_train_gpt.py."""
    c, model, saved = run.config, built.model, load_checkpoint(run, data)
    if not saved or not saved["complete"]:
        raise Stop(
            f"STAGE=quantize: {run.folder / 'checkpoint.pt'} holds no finished training; run STAGE=train first"
        )
    weights = {name: weight.to(run.device) for name, weight in saved["average"].items()}
    model.load_state_dict(weights)
    model.looped = saved["looped"]
    if c.prequant_ttt_enabled:
        begin, validation = run.now(), load_validation(data)
        run.ledger("validation_read")
        plain = functools.partial(score_sliding, run, model, c.eval_seq_len)
        before = measure(run, validation, "before prequant_ttt", plain)
        prequant_ttt(run, model, validation)
        after = measure(run, validation, "prequant_ttt", plain)
        weights = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
        record_stage(
            run,
            "prequant_ttt",
            {"before_bpb": before.bpb, "after_bpb": after.bpb, "prequant_ttt_seconds": run.now() - begin},
        )
    times, moments = [run.now()], collect_moments(run, model, data)
    times.append(run.now())
    run.ledger("train_read_last")

    def seal() -> dict[str, Any]:
        packed, how = pack_source(Path(__file__).read_text())
        write_atomically(run.folder / "packed_train_gpt.py", packed.encode())
        goal = min(
            c.artifact_target_bytes or c.artifact_cap_bytes, c.artifact_cap_bytes - len(packed.encode())
        )
        tensors = quantize(run, model.table, weights, goal, model.looped, moments)
        times.append(run.now())
        size, digest = seal_artifact(run, tensors, model.looped)
        run.ledger("artifact_sealed", sha256=digest)
        hessian, rounding, packing = (b - a for a, b in itertools.pairwise([*times, run.now()]))
        code, count = len(packed.encode()), sum(t.scales is not None for t in tensors.values())
        run.log(
            f"quantised {count} matrices ({c.quantizer}), {len(tensors) - count} tensors in fp16: calibration "
            f"{hessian:.1f}s, rounding {rounding:.1f}s, sealing {packing:.1f}s; read back, all equal; code {how}"
        )
        run.log(
            f"training and calibration: {saved['train_seconds'] + hessian:.1f}s of {c.max_wallclock_seconds:g}s"
        )
        run.log(
            f"artifact bytes:{size} code:{code} total:{size + code} cap:{c.artifact_cap_bytes} "
            f"left:{c.artifact_cap_bytes - size - code}"
        )
        return {
            "artifact_bytes": size,
            "code_bytes": code,
            "artifact_sha256": digest,
            "hessian_seconds": hessian,
            "gptq_seconds": rounding,
            "pack_seconds": packing,
            "budgeted_seconds": saved["train_seconds"] + hessian,
        }

    record_stage(run, "quantize", run.on_main_rank(seal))


def evaluate_stage(run: Run, data: Dataset, built: Built) -> None:
    """Score the sealed artifact from its bytes on disk: plain, sliding, test-time training; writes summary.json."""
    c, path, (model, forward, compiled) = (
        run.config,
        Path(run.config.artifact or run.folder / "final_model.ptz"),
        built,
    )
    manifest, tensors, digest = decode_artifact(path)
    run.log(f"artifact: {path} sha256:{digest} (before the first validation token is read)")
    if different := describe_differences(manifest["model"], c.chosen("Model")):
        raise Stop(f"{path}: made with other settings ({different}); set them to those of the artifact")
    stages: dict[str, Callable[[Tally], None]] = {
        "quantized": functools.partial(score_sliding, run, forward, c.eval_seq_len)
    }
    if c.sliding_window_enabled:
        stages["sliding"] = functools.partial(score_sliding, run, forward, c.eval_stride)
    if c.ttt_enabled and c.ttt_mode == "chunk_sgd":
        stages["ttt"] = functools.partial(chunk_sgd, run, model, forward)
    elif c.ttt_enabled:
        adapted = torch.compile(model, dynamic=True, fullgraph=True) if compiled else model
        stages["ttt"] = functools.partial(doc_lora, run, model, adapted)
    model.looped = manifest["looped"]
    if compiled:
        rehearse(run, stages)
    start = run.now()
    run.ledger("eval_clock_start")
    run.ledger("validation_read")
    scores, validation = {}, load_validation(data)
    run.log(
        f"val_tokens:{len(validation.tokens) - 1} val_bytes:{validation.bytes[1:].sum()} "
        f"val_bpb:{validation.source}:enabled"
    )
    if c.eval_prequant:
        saved = None if c.artifact else load_checkpoint(run, data)
        if saved and saved["complete"]:
            model.load_state_dict(saved["average"])
            scores["prequant"] = measure(run, validation, "prequant", stages["quantized"])
        else:
            run.log("val:prequant not measured: the unquantised weights are not here")
    model.load_state_dict(assemble_weights(model.table, tensors))
    for stage, how in stages.items():
        if stage == "ttt" and c.hash_embed_enabled:
            model.hash_embed = nn.Parameter(torch.zeros(c.hash_embed_size, c.model_dim, device=run.device))
        scores[stage] = measure(run, validation, stage, how)
    run.ledger("eval_clock_end")
    final = list(scores.values())[-1]
    record_stage(
        run,
        "evaluate",
        {
            "val_bpb": final.bpb,
            "val_loss": final.loss,
            "val_tokens": final.tokens,
            "val_bytes": final.bytes,
            "bpb": {stage: result.bpb for stage, result in scores.items()},
            "eval_seconds": run.now() - start,
            "artifact_bytes": path.stat().st_size,
            "artifact_sha256": digest,
        },
    )
    run.on_main_rank(lambda: summarize(run, data))


def summarize(run: Run, data: Dataset) -> None:
    """Write summary.json from the stages' facts and log the last lines. Rank 0 only."""
    c, stages = run.config, read_json(run.folder / "stages.json")
    facts = stages.get("train", {}) | stages.get("quantize", {}) | stages["evaluate"]
    facts["eval_seconds"] += (adapted := stages.get("prequant_ttt", {})).get("prequant_ttt_seconds", 0.0)
    facts["total_bytes"] = facts["artifact_bytes"] + facts["code_bytes"] if "code_bytes" in facts else None
    limits = {
        "train": (facts.get("budgeted_seconds"), c.max_wallclock_seconds),
        "size": (facts["total_bytes"], c.artifact_cap_bytes),
        "eval": (facts["eval_seconds"], c.eval_budget_seconds),
    }
    broken = [
        f"{name}: {value} of {limit} used" if value is not None else f"{name}: not measured here"
        for name, (value, limit) in limits.items()
        if value is None or value > limit
    ]
    order = (
        "PREQUANT_TTT_ENABLED=1: trained on validation tokens before scoring them"
        if adapted
        else "every target is counted as scored before SGD learns it; adapters learn recorded losses"
    )
    broken += [order] if adapted else []
    unproven = {"holds": None, "evidence": "not probed by the run itself: python compliance.py RUN_FOLDER"}
    once = f"{facts['val_tokens']:.0f} targets counted as scored exactly once, {facts['val_bytes']:.0f} bytes"
    conditions = {
        "causal": unproven,
        "normalised": unproven,
        "score before update": {"holds": not adapted, "evidence": order},
        "single pass": {"holds": True, "evidence": once},
    }
    if stages.get("quantize", {}).get("artifact_sha256") != facts["artifact_sha256"]:
        broken.append("artifact: not the one that this run sealed")
    reason = "; ".join(broken) or "training, evaluation and size are within their limits"
    facts |= {
        "seed": c.seed,
        "world_size": run.world_size,
        "overrides": c.overrides(),
        "versions": versions(run),
        "data": data.fingerprint,
        "compliance": {"legal": not broken, "reason": reason, "limits": limits, "conditions": conditions},
    }
    write_atomically(run.folder / "summary.json", json.dumps(facts, indent=1).encode())
    for name, bpb in data.manifest.get("references", {}).items():
        run.log(f"reference {name} val_bpb:{bpb:.5f}, this model {100 * (facts['val_bpb'] / bpb - 1):+.1f}%")
    run.log(
        f"results: {run.folder}/ summary.json train.log metrics.jsonl final_model.ptz packed_train_gpt.py"
    )
    run.log(f"compliance: {'legal' if not broken else 'NOT LEGAL'} ({reason})")
    run.log(
        f"final val_loss:{facts['val_loss']:.8f} val_bpb:{facts['val_bpb']:.8f} total_bytes:{facts['total_bytes']} "
        f"train_time:{facts.get('train_seconds', math.nan):.1f}s eval_time:{facts['eval_seconds']:.1f}s"
    )


def preflight(run: Run) -> None:
    """Find in the first seconds what would otherwise fail at the end: compressor, disk, code size. Rank 0 only."""
    c, sample = run.config, bytes(range(256)) * 4
    try:
        stop_if(
            compress(compress(sample, c.compressor), c.compressor, undo=True) != sample,
            f"COMPRESSOR={c.compressor}: does not give back what it packed; set COMPRESSOR=lzma",
        )
    except ImportError:
        raise Stop(
            f"COMPRESSOR={c.compressor}: not installed; pip install it or set COMPRESSOR=lzma"
        ) from None
    counts = [(math.prod(spec.shape), spec.quantizer) for spec in parameter_table(c).values()]
    needed, free = 24 * sum(count for count, _ in counts) + 2**26, shutil.disk_usage(run.folder).free
    stop_if(
        free < needed,
        f"OUT_DIR={c.out_dir}: {free >> 20} MiB free, a run of this model needs {needed >> 20} MiB; "
        "free disk space or set OUT_DIR elsewhere",
    )
    code = len(pack_source(Path(__file__).read_text())[0])
    least = sum(count * least_bits(c, quantizer) / 8 for count, quantizer in counts)
    limit = min(c.artifact_target_bytes or c.artifact_cap_bytes, c.artifact_cap_bytes - code)
    stop_if(
        not c.artifact and least > limit,
        f"ARTIFACT_CAP_BYTES={c.artifact_cap_bytes}, ARTIFACT_TARGET_BYTES="
        f"{c.artifact_target_bytes}: {limit} left with the packed code, {least:.0f} needed; lower MODEL_DIM",
    )


def log_header(run: Run, data: Dataset) -> None:
    """What runs where on which data, and the settings that differ from the defaults."""
    c, pairs = run.config, lambda values: " ".join(f"{name}:{value}" for name, value in values.items())
    run.log(f"run: {run.folder} stage:{c.stage} world_size:{run.world_size} micro_steps:{len(run.streams)}")
    run.log(f"versions: {pairs(versions(run))}")
    run.log(f"data: {pairs(data.fingerprint)}")
    if not data.fingerprint["standard"]:
        run.log(
            f"warning: these {data.manifest.get('docs_val', '')} validation documents are not the contest's 50,000"
        )
    run.log(
        "overrides: "
        + (" ".join(f"{name}={format_value(value)}" for name, value in c.overrides().items()) or "none")
    )
    for name, spec in parameter_table(c).items():
        run.log(
            f"  {name:<24}{'x'.join(map(str, spec.shape)):<16}{spec.optimizer:<8}{spec.quantizer}",
            console=False,
        )
    if run.is_cuda:
        run.log(
            subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout, console=False
        )
    known = [f.name.upper() for f in dataclasses.fields(c)] + [*ALIASES, *FIXED]
    for name in sorted(set(os.environ) - set(known) - NOT_OURS):
        if "_" in name and sum(other.startswith(name.split("_")[0] + "_") for other in known) > 1:
            run.log(
                f"warning: {name} is set, but no setting of this program has that name; it changes nothing"
            )
    reader = {f.name.upper(): f.metadata["meaning"].split(": ")[0] for f in dataclasses.fields(c)}
    for name in c.overrides():
        if reader[name] in {"sdclip", "rate_distortion", "chunk_sgd", "doc_lora"} - {c.quantizer, c.ttt_mode}:
            run.log(f"warning: {name} is set, but only {reader[name]} reads it; it changes nothing")


def main(config: Config) -> None:
    """Run the stages of `config.stage`."""
    run = Run(config)
    data = Dataset(config, need_training=config.stage != "evaluate")
    settings = config.chosen("nothing", "training", "artifact", "score") | {
        "data": data.fingerprint["shards"]
    }
    run.folder = run.on_main_rank(lambda: run.open(find_run_folder(config, settings["data"])))
    run.ledger("start")
    run.on_main_rank(lambda: preflight(run))
    log_header(run, data)
    run.on_main_rank(
        lambda: write_atomically(run.folder / "config.json", json.dumps(settings, indent=1).encode())
    )
    built = build(run)
    for stage, work in (("train", train), ("quantize", quantize_stage), ("evaluate", evaluate_stage)):
        if config.stage in ("all", stage):
            work(run, data, built)
    run.close()


if __name__ == "__main__":
    try:
        main(CONFIG)
    except KeyboardInterrupt:
        raise Stop("interrupted; the same command goes on from the last checkpoint") from None
