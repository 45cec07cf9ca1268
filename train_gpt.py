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
class Visit(NamedTuple):
    """One visit of a layer."""

    layer: int  # whose weights
    slot: int  # how many visits came before
    push: bool  # U-Net encoder half: remember the output
    pop: int | None  # U-Net decoder half: row of the skip parameters that merges a remembered output first
    kind: Literal["serial", "gptj", "two_lane"]


def make_route(config: Config, looped: bool) -> tuple[Visit, ...]:
    """The order of layer visits: a looped layer appears again; the first half pushes skips, the second pops them."""
    once, again = range(config.num_layers), range(config.loop_start, config.loop_end + 1)
    repeats = config.num_loops if looped else 0
    order = [*once[: config.loop_end + 1], *[*again] * repeats, *once[config.loop_end + 1 :]]
    half = len(order) // 2

    def kind(place: int, layer: int) -> str:
        late = config.parallel_residual != "none" and layer >= config.parallel_start_layer
        return (
            config.parallel_residual
            if late and (config.parallel_residual == "gptj" or place >= half)
            else "serial"
        )

    return tuple(
        Visit(layer, i, i < half, i - half if half <= i < 2 * half else None, kind(i, layer))
        for i, layer in enumerate(order)
    )


def show_route(route: tuple[Visit, ...]) -> str:
    """The route as text: encoder | decoder; '=' marks a two-lane visit, '+' one with attention and MLP side by side."""
    words = [str(s.layer) + {"serial": "", "gptj": "+", "two_lane": "="}[s.kind] for s in route]
    half = sum(s.push for s in route)
    return " ".join([*words[:half], "|", *words[half:]])


class ParameterSpec(NamedTuple):
    """One row of the parameter table. A bank of matrices has as many equal groups of layers along dim 0 as `parts`."""

    shape: tuple[int, ...]
    init: Callable[[Tensor], Any]
    optimizer: Literal["muon", "embed", "scalar"]
    quantizer: Literal["attn", "mlp", "embed", "fp16"]
    parts: tuple[
        tuple[str, str], ...
    ] = ()  # (flat name with {} for the layer, calibration site) of each group
    layered: bool = True  # dim 0 counts layers


def parameter_table(config: Config) -> dict[str, ParameterSpec]:
    """name -> Spec: it creates the parameters, splits them over optimisers and quantisers, and orders the artifact."""
    c, layers, width = config, config.num_layers, config.model_dim
    kv, hidden = c.num_kv_heads * width // c.num_heads, int(c.mlp_mult * width)
    skips = len(make_route(c, c.num_loops > 0)) // 2
    zero, one, constant = nn.init.zeros_, nn.init.ones_, lambda v: lambda t: nn.init.constant_(t, v)
    orthogonal = lambda t: [nn.init.orthogonal_(matrix) for matrix in t]
    table = {
        "embed": ParameterSpec(
            (c.vocab_size, width),
            lambda t: nn.init.normal_(t, std=c.tied_embed_init_std),
            "embed",
            "embed",
            (("tok_emb.weight", "head"),),
            False,
        ),
        "qo": ParameterSpec(
            (2 * layers, width, width),
            lambda t: (orthogonal(t[:layers]), zero(t[layers:])),
            "muon",
            "attn",
            (("blocks.{}.attn.c_q.weight", "q"), ("blocks.{}.attn.proj.weight", "o")),
        ),
        "kv": ParameterSpec(
            (2 * layers, kv, width),
            orthogonal,
            "muon",
            "attn",
            (("blocks.{}.attn.c_k.weight", "k"), ("blocks.{}.attn.c_v.weight", "v")),
        ),
        "up": ParameterSpec(
            (layers, hidden, width), orthogonal, "muon", "mlp", (("blocks.{}.mlp.fc.weight", "up"),)
        ),
        "down": ParameterSpec(
            (layers, width, hidden), zero, "muon", "mlp", (("blocks.{}.mlp.proj.weight", "down"),)
        ),
        "q_gain": ParameterSpec((layers, c.num_heads), constant(c.qk_gain_init), "scalar", "fp16"),
        **dict.fromkeys(("attn_scale", "mlp_scale"), ParameterSpec((layers, width), one, "scalar", "fp16")),
        "resid_mix": ParameterSpec(
            (layers, 2, width), lambda t: (one(t[:, 0]), zero(t[:, 1])), "scalar", "fp16"
        ),
        "head_gate": ParameterSpec((layers, c.num_heads, c.gate_width or width), zero, "scalar", "fp16"),
        "skip_weights": ParameterSpec((skips, width), one, "scalar", "fp16", layered=False),
        "skip_gates": ParameterSpec((skips, width), zero, "scalar", "fp16", layered=False),
        "smear_w": ParameterSpec((1, c.gate_width or width), zero, "scalar", "fp16", layered=False),
        "smear_lambda": ParameterSpec((1,), zero, "scalar", "fp16", layered=False),
        "parallel_post_lambdas": ParameterSpec((layers, 2, 2), one, "scalar", "fp16"),
        "parallel_resid_lambdas": ParameterSpec((layers, 2), constant(1.1), "scalar", "fp16"),
    }
    lanes = any(step.kind == "two_lane" for looped in (False, True) for step in make_route(c, looped))
    used = {
        "skip_weights": skips,
        "skip_gates": skips and c.skip_gates_enabled,
        "head_gate": c.head_gate != "none",
        **dict.fromkeys(("smear_w", "smear_lambda"), c.smear_gate),
        **dict.fromkeys(("parallel_post_lambdas", "parallel_resid_lambdas"), lanes),
    }
    return {name: spec for name, spec in table.items() if used.get(name, True)}


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
    for parameter, spec in table.items():
        banked = len(spec.shape) == 3
        for part, (name, site) in enumerate(spec.parts):
            layers = spec.shape[0] // len(spec.parts) if banked else 1
            found += [
                Matrix(
                    name.format(layer),
                    parameter,
                    part * layers + layer if banked else None,
                    (site, layer),
                    spec.quantizer,
                )
                for layer in range(layers)
            ]
    return found


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", int], Tensor]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> Tensor:
    """Causal attention by PyTorch alone: q (B, T, H, D), k and v (B, T, KV, D); a packed row document by document."""
    dense = lambda *qkv: F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in qkv), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    if starts is None:
        return dense(q, k, v)
    edges = torch.unique(starts).tolist()
    return torch.cat([dense(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(edges)], 1)


def attend_flash(backend: str) -> Attend:
    """FlashAttention-3 ("fa3"), FlashAttention-2 ("fa2") or PyTorch's varlen kernel, as attend_sdpa."""
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        dense, causal = (
            attend_sdpa,
            {"window_size": (-1, 0)} if varlen_attn.__kwdefaults__ else {"is_causal": True},
        )

        def packed(q, k, v, starts, longest):
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
            return varlen_attn(q, k, v, starts, starts, longest, longest, **causal)
    else:
        module = importlib.import_module({"fa3": "flash_attn_interface", "fa2": "flash_attn"}[backend])
        first = lambda out: out[0] if isinstance(out, tuple) else out
        dense = lambda q, k, v, *_: first(module.flash_attn_func(q, k, v, causal=True))
        packed = lambda q, k, v, starts, longest: first(
            module.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)
        )
    return lambda q, k, v, starts, longest: (
        dense(q, k, v, None, longest) if starts is None else packed(q[0], k[0], v[0], starts, longest)[None]
    )


def pick_attention(config: Config, run: Run) -> Attend:
    """The attention backend: ATTENTION, or the first of fa3, fa2, varlen, sdpa that can be used; logs which and why."""

    def usable(backend: str) -> Attend | str:
        if not run.is_cuda or run.dtype != torch.bfloat16:
            return "needs a GPU and bfloat16"
        if backend == "fa3" and torch.cuda.get_device_capability(run.device)[0] != 9:
            return "needs a Hopper GPU"
        try:
            return attend_flash(backend)
        except ImportError as error:
            return f"cannot be imported: {error}"

    order = {name: functools.partial(usable, name) for name in ("fa3", "fa2", "varlen")} | {
        "sdpa": lambda: attend_sdpa
    }
    return first_usable(run, "attention", "ATTENTION", config.attention, order)


def rms_norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last dimension, without gain."""
    return F.rms_norm(x, (x.size(-1),))


Tap = Callable[[str, int, Tensor, Tensor], None]


class LoRA(nn.Module):
    """Low-rank deltas x -> x A^T B^T, one per document, site and layer visit; the head has one visit (#1530)."""

    def __init__(self, config: Config, documents: int, device: torch.device):
        super().__init__()
        c, width, visits = config, config.model_dim, len(make_route(config, config.num_loops > 0))
        kv, rank = c.num_kv_heads * width // c.num_heads, c.ttt_lora_rank
        sites = {
            "q": (visits, width, c.ttt_q_lora),
            "k": (visits, kv, c.ttt_k_lora),
            "v": (visits, kv, c.ttt_v_lora),
            "o": (visits, width, c.ttt_o_lora),
            "down": (visits, width, c.ttt_mlp_lora),
            "head": (1, c.vocab_size, True),
        }
        empty = lambda *shape: nn.Parameter(torch.empty(shape, device=device))
        self.read = nn.ParameterDict(
            {s: empty(n, documents, rank, width) for s, (n, _, on) in sites.items() if on}
        )
        self.write = nn.ParameterDict(
            {s: empty(n, documents, out, rank) for s, (n, out, on) in sites.items() if on}
        )
        self.scale = c.ttt_lora_alpha / rank if c.ttt_lora_alpha else 1.0

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Fresh adapters: A uniform in +-1/sqrt(inputs) from `seed`, B zero, so that the delta is zero."""
        generator = torch.Generator(self.read["head"].device).manual_seed(seed)
        for read, write in zip(self.read.values(), self.write.values(), strict=True):
            read.uniform_(-(read.size(-1) ** -0.5), read.size(-1) ** -0.5, generator=generator)
            write.zero_()

    def per_visit(self, dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """site -> (A, B) of each visit, (documents, rank, in) and (documents, out, rank), in `dtype`, A scaled."""
        parts = lambda t: t.to(dtype).unbind(0)
        return {
            s: list(zip(parts(self.read[s] * self.scale), parts(self.write[s]), strict=True))
            for s in self.read
        }


class Hooks(NamedTuple):
    """What hangs on the matrices besides their weights: a calibration tap on the inputs, adapters by site and visit."""

    tap: Tap | None = None
    lora: dict[str, list[tuple[Tensor, Tensor]]] | None = None

    def adapt(self, site: str, step: Visit, x: Tensor, y: Tensor) -> Tensor:
        """y plus what the site's adapter makes of x on this visit, if there is one."""
        pairs = (self.lora or {}).get(site)
        return y if pairs is None else y + x @ pairs[step.slot][0].mT @ pairs[step.slot][1].mT


HEAD_VISIT = Visit(0, 0, False, None, "serial")


class GPT(nn.Module):
    """The one network: layers as the route says, weights from the parameter table, matrices in banks (#1523)."""

    def __init__(
        self,
        config: Config,
        attend: Attend = attend_sdpa,
        fused: bool = False,
        dtype: torch.dtype = torch.float32,
        feed_forward: MLP = mlp_reference,
    ):
        super().__init__()
        self.config, self.attend, self.fused, self.dtype, self.feed_forward = (
            config,
            attend,
            fused,
            dtype,
            feed_forward,
        )
        self.table, self.looped = parameter_table(config), False
        self.routes = {looped: make_route(config, looped) for looped in (False, True)}
        for name, spec in self.table.items():
            weight = torch.empty(spec.shape)
            spec.init(weight)
            self.register_parameter(
                name, nn.Parameter(weight.to(dtype) if spec.optimizer == "embed" else weight)
            )
        self.register_parameter("hash_embed", None)  # exists during test-time training alone

    def rotation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, ROPE_DIMS/2) of every position, from fp32 angles: rounding these would cost phase."""
        c, dims, length = self.config, self.config.rope_dims, batch.inputs.size(1)
        stretch = max(1.0, length / c.train_seq_len) if c.rope_yarn and dims > 2 else 1.0
        base = c.rope_base * stretch ** (dims / max(dims - 2, 1))
        count = lambda end, step: torch.arange(0, end, step, device=batch.inputs.device, dtype=torch.float32)
        angle = torch.outer(count(length, 1), base ** -(count(dims, 2) / max(dims, 1)))[:, None]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary embedding of the first ROPE_DIMS of each head of x (B, T, H, D), in halves."""
        half, (cos, sin) = self.config.rope_dims // 2, rotation
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)

    @staticmethod
    def matmul(
        site: str, weight: Tensor, x: Tensor, step: Visit, hooks: Hooks, adapt: Tensor | None = None
    ) -> Tensor:
        """x (B, T, in) times weight (out, in), with its hooks; an adapter reads `adapt` where that is not x itself."""
        y = F.linear(x, weight)
        if hooks.tap:
            hooks.tap(site, step.layer, x, y)
        return hooks.adapt(site, step, x if adapt is None else adapt, y)

    def attention(
        self,
        x: Tensor,
        residual: Tensor,
        step: Visit,
        banks: dict[str, Any],
        batch: Batch,
        rotation: tuple[Tensor, Tensor],
        hooks: Hooks,
    ) -> Tensor:
        """Attention on x (B, T, D), `residual` normalised: QK norm, rotation and gain, XSA, head gate, projection."""
        c, layer, (B, T, _) = self.config, step.layer, x.shape
        raw = self.matmul("q", banks["qo"][layer], x, step, hooks)
        q = raw.view(B, T, c.num_heads, -1)
        k = self.matmul("k", banks["kv"][layer], x, step, hooks).view(B, T, c.num_kv_heads, -1)
        v = self.matmul("v", banks["kv"][c.num_layers + layer], x, step, hooks).view(B, T, c.num_kv_heads, -1)
        q, k = (
            self.rotate(rms_norm(q), rotation) * banks["q_gain"][layer][:, None],
            self.rotate(rms_norm(k), rotation),
        )
        y = self.attend(q, k, v, batch.starts, batch.longest)
        if layer >= c.num_layers - c.xsa_last_n:
            own = F.normalize(v, dim=-1)[:, :, :, None]
            y = y.view(B, T, c.num_kv_heads, -1, y.size(-1))
            y = y - (y * own).sum(-1, keepdim=True) * own
        y = y.reshape(B, T, c.num_heads, -1)
        if c.head_gate != "none":
            source = {"residual": residual, "proj": x, "q": raw}[c.gate_attn_src][..., : c.gate_width or None]
            opening = F.linear(source, banks["head_gate"][layer])
            inside, outside = (1, 2) if c.head_gate == "attn_out" else (c.sparse_attn_gate_scale, 1)
            y = y * (outside * torch.sigmoid(inside * opening))[..., None]
        return self.matmul("o", banks["qo"][c.num_layers + layer], y.flatten(2), step, hooks, adapt=x)

    def mlp(self, x: Tensor, step: Visit, banks: dict[str, Any], hooks: Hooks) -> Tensor:
        """LeakyReLU(x up^T, 1/2)^2 down^T, and an adapter's delta; in one unless calibration looks inside."""
        up, down = banks["up"][step.layer], banks["down"][step.layer]
        if not hooks.tap:
            return hooks.adapt("down", step, x, self.feed_forward(x, up, down))
        hidden = F.leaky_relu(self.matmul("up", up, x, step, hooks), 0.5).square()
        return self.matmul("down", down, hidden, step, hooks, adapt=x)

    def embedding(self, batch: Batch) -> Tensor:
        """The normalised token embeddings (B, T, D), with what they take from the token before."""
        c, ids = self.config, batch.inputs
        x = rms_norm(F.embedding(ids, self.embed))
        opens = torch.zeros(
            ids.size(1) + 1, dtype=torch.bool, device=ids.device
        )  # where a packed row starts a segment
        if batch.starts is not None:
            opens = opens.index_fill(0, batch.starts.long(), True)
        if (
            self.hash_embed is not None
        ):  # of (previous token, token); 0 comes before the start of a segment (#1523)
            previous = F.pad(ids[:, :-1], (1, 0)).masked_fill(opens[:-1], 0)
            x = x + F.embedding((2039 * previous + ids) % c.hash_embed_size, self.hash_embed).to(x.dtype)
        if c.smear_gate:
            opening = F.linear(x[:, 1:, : c.gate_width or None], self.smear_w.to(x.dtype))
            share = self.smear_lambda.to(x.dtype) * torch.sigmoid(opening)
            if c.smear_gate_bos_fix:
                share = share.masked_fill(((ids == BOS) | opens[:-1])[:, 1:, None], 0)
            x = torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), 1)
        return x

    def forward(self, batch: Batch, tap: Tap | None = None, lora: LoRA | None = None) -> Tensor:
        """Cross-entropy in nats of every target, (B, T) fp32: the one path of training, scores, calibration and TTT."""
        hooks = Hooks(tap, lora and lora.per_visit(self.dtype))
        logits = self.matmul("head", self.embed, self.trunk(batch, hooks), HEAD_VISIT, hooks).flatten(0, 1)
        targets, cap = batch.targets.flatten(), self.config.logit_softcap
        fused = lambda *arguments: softcapped_ce_op(*arguments)[0]
        return (fused if self.fused else softcapped_ce_reference)(logits, targets, cap).view_as(batch.targets)

    def trunk(self, batch: Batch, hooks: Hooks) -> Tensor:
        """The normalised output of the last layer, (B, T, D): the input of the head."""
        c, dtype = self.config, self.dtype
        # One cast and one unbind per bank: looped layers reuse them, the backward has a node per bank, not per visit.
        banks = {name: getattr(self, name).to(dtype).unbind(0) for name in self.table if name != "embed"}
        rotation = self.rotation(batch)
        x = x0 = self.embedding(batch)
        lane, skips = None, []  # lane: the residual stream of the MLP once it has split off
        for step in self.routes[self.looped]:
            layer, depth = step.layer, (step.layer + 1) ** -0.5 if c.ln_scale else 1.0
            splits, before = step.kind == "two_lane" and lane is None, x
            if step.pop is not None:
                skip = banks["skip_weights"][step.pop] * skips.pop()
                gate = torch.sigmoid(banks["skip_gates"][step.pop]) if c.skip_gates_enabled else None
                x = x + skip if gate is None else torch.lerp(skip, x, gate)
            if splits:
                lane = before if c.parallel_first_skip == "lane0" else x
            keep, mix = banks["resid_mix"][layer]
            read = keep * x + mix * x0
            normed = rms_norm(read) * depth
            attended = banks["attn_scale"][layer] * self.attention(
                normed, read, step, banks, batch, rotation, hooks
            )
            # The three kinds of residual differ in what the MLP reads and where the two outputs go.
            if step.kind == "serial":
                read = read + attended
                normed = rms_norm(read) * depth
            elif step.kind == "two_lane":
                normed = rms_norm(lane) * depth
            transformed = banks["mlp_scale"][layer] * self.mlp(normed, step, banks, hooks)
            if step.kind == "serial":
                x = read + transformed
            elif step.kind == "gptj":
                x = read + attended + transformed
            else:  # post[branch, lane] is how much of a branch each lane receives (#1529)
                resid, post = banks["parallel_resid_lambdas"][layer], banks["parallel_post_lambdas"][layer]
                x, lane = (
                    resid[0] * x + post[0, 0] * attended + post[1, 0] * transformed,
                    resid[1] * lane + post[0, 1] * attended + post[1, 1] * transformed,
                )
            if step.push:
                skips.append(x)
        return rms_norm(x if lane is None else 0.5 * (x + lane))


# === OPTIMIZERS ===
# Per iteration (a, b, c) of X <- aX + (bA + cA^2)X with A = XX^T: Muon's own quintic, and Polar Express as in #1787.
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
    """The matrices (N, R, C) of `update` with all singular values moved close to 1, in their dtype (Newton-Schulz)."""
    wide = update.size(-2) <= update.size(-1)
    x = update if wide else update.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = symmetric_product_op(x, 0.0, 1.0) if fused else x @ x.mT
        x = a * x + (symmetric_product_op(gram, b, c) if fused else b * gram + c * gram @ gram) @ x
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
    """Nesterov momentum (updating `buffer`), row normalisation in fp32, Newton-Schulz in `dtype`, compiled as one."""
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

    def __init__(self, run: Run, banks: dict[str, nn.Parameter], compiled: bool, fused: bool = False):
        self.run, self.fused, c = run, fused, run.config
        table = NEWTON_SCHULZ[c.muon_coefficients]
        self.coefficients = tuple(table[min(i, len(table) - 1)] for i in range(c.muon_backend_steps))
        self.update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update
        # Large banks first: their communication hides the most work.
        self.banks = dict(sorted(banks.items(), key=lambda item: -item[1].numel()))
        self.dtype, self.shards, self.momenta, self.pending = run.dtype, {}, {}, {}
        for name, bank in self.banks.items():
            count = -(-len(bank) // run.world_size)
            self.momenta[name] = torch.zeros((count, *bank.shape[1:]), dtype=self.dtype, device=bank.device)

    def reduce(self) -> None:
        """Start averaging the gradients; afterwards `shards` (once waited for) hold this rank's part of each bank."""
        for name, bank in self.banks.items():
            self.shards[name] = gradient = bank.grad.to(self.dtype)
            if self.run.world_size > 1:
                padded = gradient.new_zeros((len(self.momenta[name]) * self.run.world_size, *bank.shape[1:]))
                padded[: len(bank)] = gradient / self.run.world_size
                self.shards[name] = torch.empty_like(self.momenta[name])
                self.pending[name] = reduce_scatter(self.shards[name], padded, async_op=True), padded

    def step(self, rate: float, momentum: float, decay: float, scale: Tensor | None) -> None:
        """p <- p (1 - rate*decay) - rate sqrt(max(1, R/C)) X for every bank; `scale` multiplies the gradients first."""
        mu, rows = (
            torch.tensor(momentum, dtype=self.dtype, device=self.run.device),
            self.run.config.muon_row_normalize,
        )
        applied = None
        for name, bank in self.banks.items():
            if name in self.pending:
                self.pending.pop(name)[0].wait()
            shard = self.shards.pop(name)
            if scale is not None:
                shard.mul_(scale)
            update = self.update(
                shard, self.momenta[name], mu, rows, self.dtype, self.coefficients, self.fused
            )
            gathered = self.gather(update)
            if applied:
                self.apply(*applied, rate, decay)
            applied = bank, *gathered
        self.apply(*applied, rate, decay)

    def gather(self, shard: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """The shards of all ranks as one tensor, and how to wait for it."""
        if self.run.world_size == 1:
            return shard, lambda: None
        whole = shard.new_empty((len(shard) * self.run.world_size, *shard.shape[1:]))
        return whole, all_gather(whole, shard.contiguous(), async_op=True).wait

    @staticmethod
    def apply(
        bank: nn.Parameter, gathered: Tensor, wait: Callable[[], Any], rate: float, decay: float
    ) -> None:
        """Move one bank by its gathered update."""
        wait()
        scale = math.sqrt(max(1.0, bank.size(1) / bank.size(2)))
        bank.data.mul_(1 - rate * decay).add_(gathered[: len(bank)].to(bank.dtype), alpha=-rate * scale)

    def state(self) -> dict[str, Tensor]:
        """The whole momentum of each bank, whatever the number of ranks."""
        pairs = {name: self.gather(shard) for name, shard in self.momenta.items()}
        for _, wait in pairs.values():
            wait()
        return {name: whole[: len(self.banks[name])].clone() for name, (whole, _) in pairs.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take this rank's part of a `state`."""
        for name, shard in self.momenta.items():
            part = state[name][self.run.rank * len(shard) : (self.run.rank + 1) * len(shard)]
            shard.zero_()[: len(part)] = part.to(shard)


class Optimizers:
    """Muon for the banks, AdamW for the embedding and for everything small, one gradient clip for all of it."""

    def __init__(self, run: Run, model: GPT, compiled: bool):
        self.run, c = run, run.config
        group = lambda kind: {n: p for n, p in model.named_parameters() if model.table[n].optimizer == kind}
        self.muon = Muon(run, group("muon"), compiled, model.fused)
        self.replicated = [*group("embed").values(), *group("scalar").values()]
        self.parameters = [*self.muon.banks.values(), *self.replicated]
        groups = [
            {"params": list(group(kind).values()), "lr": rate, "weight_decay": decay}
            for kind, rate, decay in (
                ("embed", c.tied_embed_lr, c.embed_wd),
                ("scalar", c.scalar_lr, c.adam_wd),
            )
        ]
        self.adam = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=run.is_cuda)
        self.rates = [g["lr"] for g in self.adam.param_groups]

    def step(self, rate_scale: float, momentum: float, decay: float) -> None:
        """One update of all parameters from their gradients, which are freed; `decay`: that of the matrices."""
        c, world = self.run.config, self.run.world_size
        for parameter in self.parameters:
            if parameter.grad is None:  # the route of this step visits no layer that uses it
                parameter.grad = torch.zeros_like(parameter)
        if c.grad_clip_norm and c.grad_clip_scope == "local":
            nn.utils.clip_grad_norm_(self.parameters, c.grad_clip_norm, foreach=True)
        self.muon.reduce()
        for dtype in {p.dtype for p in self.replicated} if world > 1 else ():  # one flat all-reduce each
            gradients = [p.grad for p in self.replicated if p.dtype == dtype]
            flat = self.run.sum_over_ranks(torch.cat([g.flatten() for g in gradients]) / world)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        scale = None
        if c.grad_clip_norm and c.grad_clip_scope == "global":
            for handle, _ in self.muon.pending.values():
                handle.wait()
            self.muon.pending.clear()
            norms = lambda tensors: sum(tensor.float().square().sum() for tensor in tensors)
            square = self.run.sum_over_ranks(norms(self.muon.shards.values())) + norms(
                p.grad for p in self.replicated
            )
            scale = (c.grad_clip_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([p.grad for p in self.replicated], scale)
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_scale
        self.adam.step()
        self.muon.step(c.matrix_lr * rate_scale, momentum, decay, scale)
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """Everything `load` needs, as tensors and numbers."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a `state`."""
        self.adam.load_state_dict(state["adam"])
        self.muon.load(state["muon"])


@torch.no_grad()
def update_ema(average: dict[str, Tensor], model: GPT, decay: float) -> None:
    """Move the fp32 `average` of all parameters towards the live ones by 1 - decay, in two fused calls (#1585)."""
    torch._foreach_mul_(list(average.values()), decay)
    live = [model.get_parameter(name).detach().float() for name in average]
    torch._foreach_add_(list(average.values()), live, alpha=1 - decay)


def learning_rate_scale(config: Config, progress: float) -> float:
    """Learning-rate multiplier at `progress` (0 to 1): 1, then linear over the last WARMDOWN_FRAC, at least MIN_LR."""
    warmdown = config.warmdown_frac
    return 1.0 if progress < 1 - warmdown or warmdown == 0 else max((1 - progress) / warmdown, config.min_lr)


def muon_weight_decay(config: Config, progress: float) -> float:
    """Muon weight decay at `progress`: constant, then linear to WD_TAPER_FINAL_MULT of it at the end (#1729)."""
    taper = max(0.0, progress - config.wd_taper_start_frac) / max(1 - config.wd_taper_start_frac, 1e-9)
    return config.muon_wd * (1 - taper * (1 - config.wd_taper_final_mult))


def muon_momentum(config: Config, step: int) -> float:
    """Muon momentum at `step`: a linear ramp, then constant."""
    ramp = min(1.0, step / config.muon_momentum_warmup_steps) if config.muon_momentum_warmup_steps else 1.0
    return (1 - ramp) * config.muon_momentum_warmup_start + ramp * config.muon_momentum


# === QUANTIZE ===
# In: the averaged weights and calibration windows. Out: every tensor as the artifact holds it (`Quantized`),
# small ones in fp16, matrices (R, C) as integers times step sizes. QUANTIZER=sdclip: one step size per row,
# integers clipped. rate_distortion: delta 2^(row/8) 2^(column/8), which follows how much the outputs and
# inputs of the matrix matter, with the one delta that fills the file. Going down a column, the state of a
# trellis gives the parity of each integer: only integer >> 1 is coded. SENSITIVITY_POWERS and BIT_PRICE are
# free to change; the trellis and STEPS_PER_OCTAVE are part of the artifact's format.

# Parity polynomials (h0, h1) of Ungerboeck's codes by number of states.
TRELLIS_POLYNOMIALS = {8: (0o13, 0o4), 64: (0o103, 0o24), 256: (0o515, 0o362)}
STEPS_PER_OCTAVE = 8  # step sizes of rows and columns are 2^(exponent / STEPS_PER_OCTAVE)
SENSITIVITY_POWERS = (1.0, 1.0, 1.0)  # of the sensitivities between matrices, of rows, of columns
BIT_PRICE = 0.5  # how much of the price of its bits an integer pays when it is rounded, see round_matrix
GAUSSIAN_BITS = 2.05  # log2(2 pi e) / 2: a Gaussian of deviation s costs log2(s / step size) + this


def parallel_map(work: Callable, jobs: Iterable, threads: int | None = None) -> list:
    """[work(job)] on as many threads as there are cores, or on `threads`."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return list(pool.map(work, jobs))


# Compiled code is cached beside the file that a function comes from; in the packed script there is none.
HAS_FILE = os.path.exists(parallel_map.__code__.co_filename)
numba_jit = numba.njit(nogil=True, cache=HAS_FILE)
numba_inline = numba.njit(cache=HAS_FILE, forceinline=True)  # in a hot loop: calls would cost a fifth more


def clip_and_bits(config: Config, quantizer: str) -> tuple[float, int]:
    """(standard deviations covered by the integer range, integer width) of a quantiser class."""
    return {
        "attn": (config.attn_clip_sigmas, config.attn_bits or config.matrix_bits),
        "mlp": (config.mlp_clip_sigmas, config.mlp_bits or config.matrix_bits),
        "embed": (config.embed_clip_sigmas, config.embed_bits),
    }[quantizer]


def least_bits(config: Config, quantizer: str) -> float:
    """Least bits of a weight: 16 in fp16, 1.5 in rate_distortion, 95 % of a Gaussian's entropy in SDClip."""
    if quantizer == "fp16":
        return 16
    if config.quantizer == "rate_distortion":
        return 1.5
    sigmas, bits = clip_and_bits(config, quantizer)
    return 0.95 * (math.log2((2 ** (bits - 1) - 1) / sigmas) + GAUSSIAN_BITS)


def head_sensitivity(y: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(E[g^2] of the loss gradients at the head's outputs `y`, label probabilities), both (N, V) like `y`.

    With z = cap tanh(y / cap), p = softmax(z) and a label drawn from p: g_v = (p_v - [v is the label])
    dz_v/dy_v, hence E[g_v^2] = p_v (1 - p_v) (1 - tanh^2(y_v / cap))^2. The closed form, because few tokens
    would draw a rare label.
    """
    bend = torch.tanh(y / cap)
    probabilities = torch.softmax(cap * bend, -1)
    return probabilities * (1 - probabilities) * (1 - bend.square()).square(), probabilities


@dataclass(frozen=True)
class MomentTap:
    """The tap of one calibration forward; it adds its tokens to the `sums` of every matrix.

    These are x x^T of the inputs (C, C) and g^2 of the loss gradients at the outputs (R,), by (site, layer);
    the gradients arrive in the backward. `labels` are replaced by draws from the model once its head is
    reached, which makes g^2 the Fisher diagonal. Without `sensitive` the gradients and the labels stay alone.
    """

    sums: dict[tuple[str, int], tuple[Tensor, Tensor]]
    labels: Tensor
    generator: torch.Generator
    cap: float
    sensitive: bool

    def __call__(self, site: str, layer: int, x: Tensor, y: Tensor) -> None:
        inputs, outputs = self.sums[site, layer]
        x = x.detach().flatten(0, -2).float()
        inputs.addmm_(x.T, x)
        if not self.sensitive:
            return
        if site == "head":
            squares, probabilities = head_sensitivity(y.detach().flatten(0, -2).float(), self.cap)
            outputs.add_(squares.sum(0))
            drawn = torch.multinomial(probabilities, 1, generator=self.generator)
            self.labels.copy_(drawn.view_as(self.labels))
            return

        def add_squares(gradient: Tensor) -> None:
            outputs.add_(gradient.flatten(0, -2).float().square().sum(0))

        y.register_hook(add_squares)


def collect_moments(run: Run, model: GPT, data: Dataset) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(E[x x^T] of the inputs, E[g^2] of the loss gradients at the outputs) by (site, layer) of the matrix.

    GPTQ_CALIBRATION_BATCHES micro-batches of shuffled training windows are dealt to the ranks, whose number
    changes nothing. A looped layer counts every visit. Labels are drawn from the model, for the Fisher
    diagonal (SDClip needs none: E[g^2] is 0).
    """
    config = run.config
    windows = max(1, config.train_batch_tokens // STREAMS // config.train_seq_len)  # of a micro-batch
    part = max(1, min(windows, 2**14 // config.train_seq_len))  # of a forward: the backward keeps it all
    forwards = config.gptq_calibration_batches * windows // part
    tokens = part * config.train_seq_len
    changes = {"loader": "shuffled", "train_batch_tokens": STREAMS * tokens}
    loader = ShuffledLoader(dataclasses.replace(config, **changes), data)
    sensitive = config.quantizer == "rate_distortion"
    parameters = {matrix.key: matrix.parameter for matrix in list_matrices(model.table)}
    sums = {}
    for key in sorted(parameters):
        rows, columns = model.get_parameter(parameters[key]).shape[-2:]
        inputs = torch.zeros(columns, columns, device=run.device)
        sums[key] = inputs, torch.zeros(rows, device=run.device)

    with torch.set_grad_enabled(sensitive):
        for index in run.progress("calibration", range(run.rank, forwards, run.world_size)):
            batch = to_device(loader.get(index // STREAMS, index % STREAMS), run)
            batch = batch._replace(targets=batch.targets.clone())  # they may share memory with the inputs
            generator = torch.Generator(run.device).manual_seed(index)
            tap = MomentTap(sums, batch.targets, generator, config.logit_softcap, sensitive)
            loss = model(batch, tap).sum()
            if sensitive:
                loss.backward()
    model.zero_grad()

    def mean(total: Tensor) -> Tensor:
        return run.sum_over_ranks(total) / (tokens * forwards)

    return {key: (mean(inputs), mean(outputs)) for key, (inputs, outputs) in sums.items()}


class RoundingProblem(NamedTuple):
    """A matrix (R, C) ready to be rounded."""

    weight: Tensor  # fp32 (R, C)
    column_order: Tensor  # int64 (C,), in which columns are rounded: by falling diagonal of `inputs`
    feedback: Tensor  # fp32 (C, C) in that order, upper, unit diagonal: what a column's error does to others
    row_exponents: np.ndarray  # int32 (R,) of the step sizes
    column_exponents: np.ndarray  # int32 (C,), in the order of `weight`


def rounding_problem(
    weight: Tensor, inputs: Tensor, outputs: Tensor, damping: float, powers: tuple[float, float, float]
) -> RoundingProblem:
    """The problem of rounding `weight` (R, C) with E[x x^T] of `inputs` (C, C) and E[g^2] of `outputs` (R,).

    An error E of the weights costs sum_r outputs_r E_r H E_r^T, where H is `inputs` with `damping` times its
    mean diagonal added. With H = R R^T, R upper, and U = R^-1, an error e of column j costs (e / U_jj)^2 once
    the later columns have made up for it: GPTQ adds -e U_jk / U_jj to column k. Reverse water-filling wants
    the same distortion everywhere, so step sizes follow outputs_r^(-1/2) U_jj, to the `powers`: the first is
    for the geometric means of whole matrices, the others for rows and for columns within.
    torch.linalg.LinAlgError: H is not positive definite.
    """
    inputs = inputs.double().cpu().clone()
    outputs = outputs.double().cpu()
    weight = weight.float().cpu() * (inputs.diagonal() > 0)  # a column whose input is always 0 costs no bits
    inputs.diagonal().add_(damping * inputs.diagonal().mean().clamp_min(1e-30))
    order = torch.argsort(inputs.diagonal(), descending=True, stable=True)

    # R is a Cholesky factor from the last column on: that of the matrix turned by 180 degrees, turned back.
    root = torch.linalg.cholesky(inputs[order][:, order].flip(0, 1)).flip(0, 1)
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
    feedback = (inverse / inverse.diagonal()[:, None]).float()

    row = -0.5 * torch.log2(outputs.clamp_min(0.01 * outputs.mean()).clamp_min(1e-30))
    column = torch.log2(inverse.diagonal())[torch.argsort(order)]
    level = powers[0] * (row.mean() + column.mean())
    row_exponents = level + powers[1] * (row - row.mean())
    column_exponents = powers[2] * (column - column.mean())
    return RoundingProblem(
        weight,
        order,
        feedback,
        (STEPS_PER_OCTAVE * row_exponents).round().int().numpy(),
        (STEPS_PER_OCTAVE * column_exponents).round().int().numpy(),
    )


def step_sizes(row_exponents: np.ndarray, column_exponents: np.ndarray, delta: float) -> np.ndarray:
    """The fp32 step sizes delta 2^(row/8) 2^(column/8) of weights (R, C): the same bits on every machine."""
    roots = np.array([2.0 ** (n / STEPS_PER_OCTAVE) for n in range(STEPS_PER_OCTAVE)], np.float32)

    def power(n: np.ndarray) -> np.ndarray:
        return np.ldexp(roots[n % STEPS_PER_OCTAVE], n // STEPS_PER_OCTAVE).astype(np.float32)

    return (np.float32(delta) * power(row_exponents))[:, None] * power(column_exponents)


def trellis(states: int) -> tuple[np.ndarray, np.ndarray]:
    """(after (S, 2), before (2, S)): the states that follow and precede a state, by the integer's second bit.

    The lowest two bits of an integer coded in state s are s & 1 and then a free bit b; the next state is
    s >> 1 ^ (s & 1) (h0 >> 1) ^ b (h1 >> 1). No states: every integer is free, and `before` is empty.
    """
    if states == 0:
        return np.zeros((1, 2), np.int64), np.zeros((2, 0), np.uint8)
    h0, h1 = TRELLIS_POLYNOMIALS[states]
    state = np.arange(states)[:, None]
    bit = np.arange(2)
    after = (state >> 1) ^ (h0 >> 1) * (state & 1) ^ (h1 >> 1) * bit
    return after, np.argsort(after, axis=0).T.astype(np.uint8)  # either column of `after` is a permutation


@numba_jit
def viterbi(goals, prices, before):
    """Integers m (R,) on a trellis path from state 0 with least sum of price (goal - m)^2, both fp32 (R,).

    A branch fixes m modulo 4 (2 bit + parity of the state), and the nearest such integer is the best. Into
    every state lead two branches, one with each bit: the cheaper one is kept, and at the end the choices are
    followed back.
    """
    rows = len(goals)
    states = before.shape[1]
    choices = np.empty((rows, states), np.uint8)
    branch = np.empty(4, np.float32)  # cost of a branch by m modulo 4
    cost = np.full(states, 1e30, np.float32)  # of the best path that ends in a state
    cost[0] = 0
    with_0 = np.empty(states, np.float32)  # of that path, continued with bit 0
    with_1 = np.empty(states, np.float32)
    for row in range(rows):
        for residue in range(4):
            distance = (goals[row] - np.float32(residue)) * np.float32(0.25)
            branch[residue] = prices[row] * np.float32(16) * (distance - np.rint(distance)) ** 2
        for state in range(states):
            cost_0 = cost[state] + branch[state & 1]
            cost_1 = cost[state] + branch[2 + (state & 1)]
            with_0[state] = cost_0
            with_1[state] = cost_1
        for state in range(states):
            cost_0 = with_0[before[0, state]]
            cost_1 = with_1[before[1, state]]
            cost[state] = min(cost_0, cost_1)
            choices[row, state] = cost_1 < cost_0

    integers = np.empty(rows, np.int32)
    state = np.int64(np.argmin(cost))
    for row in range(rows - 1, -1, -1):
        bit = choices[row, state]
        state = np.int64(before[bit, state])
        residue = np.float32(2 * bit + (state & 1))
        integers[row] = np.int32(np.rint((goals[row] - residue) * np.float32(0.25)) * np.float32(4) + residue)
    return integers


@numba_jit
def round_columns(w, step_size, feedback, bit_prices, before, largest):
    """Integers (C, R) of the columns w (C, R) in turn; the error of each goes to later ones and stays in w.

    With s the step size and p the price of an integer's square (R,), a column minimises (w/s - m)^2 + p s^2
    m^2, which is g (w/(s g) - m)^2 and a constant for g = 1 + p s^2. No BLAS: its sums depend on the number
    of threads.
    """
    columns, rows = w.shape
    integers = np.empty(w.shape, np.int32)
    for j in range(columns):
        for i in range(j):
            for row in range(rows):
                w[j, row] -= feedback[i, j] * w[i, row]
        g = np.float32(1) + bit_prices * step_size[j] * step_size[j]
        goals = w[j] / (step_size[j] * g)
        if before.shape[1]:
            integers[j] = viterbi(goals, g, before)
        else:
            integers[j] = np.minimum(np.maximum(np.rint(goals), -largest), largest)
        w[j] -= integers[j] * step_size[j]
    return integers


def round_matrix(
    problem: RoundingProblem,
    step_size: np.ndarray,
    states: int,
    bit_price: float = 0.0,
    largest: int = 1 << 30,
) -> np.ndarray:
    """Integers int32 (R, C) so that integers * step_size, fp32 (R, C), has little error under the inputs.

    Column by column, the error of one goes to those not yet rounded (GPTQ). `bit_price` is how much of the
    price of its bits an integer pays: a bit is worth 2 ln 2 of the distortion D, and a Gaussian integer m has
    log2(e) m^2 / (2 variance) bits, together D m^2 / variance. In units of the squared step size D is 0.26
    with a trellis and 1/12 without. `largest` clips the integers, but only without a trellis.
    """
    order = problem.column_order.numpy()
    weight = problem.weight.numpy()
    w = np.ascontiguousarray(weight.T[order])
    step_size = np.ascontiguousarray(step_size.T[order])
    distortion = np.float32(0.26 if states else 1 / 12)
    bit_prices = bit_price * distortion / np.maximum(np.square(w).mean(0), np.float32(1e-20))
    integers = np.empty(w.shape, np.int32)
    integers[order] = round_columns(
        w, step_size, problem.feedback.numpy(), bit_prices, trellis(states)[1], largest
    )
    return np.ascontiguousarray(integers.T)


class Quantized(NamedTuple):
    """What the artifact holds of one tensor: integers and step sizes of a matrix, or fp16 values."""

    values: Tensor  # int8 or int32 (R, C), or fp16 of any shape
    scales: Tensor | None = None  # fp16 (R,) step sizes, or int32 (R + C,) exponents of rows and columns
    delta: Tensor | None = None  # fp32 (1,), the factor of step sizes with exponents

    def restore(self) -> Tensor:
        """The fp32 tensor this stands for."""
        if self.scales is None:
            return self.values.float()
        if self.delta is None:
            return self.values.float() * self.scales.float()[:, None]
        row_exponents, column_exponents = np.split(self.scales.numpy(), [len(self.values)])
        return self.values * torch.from_numpy(step_sizes(row_exponents, column_exponents, self.delta.item()))


def round_clipped(problem: RoundingProblem, sigmas: float, bits: int) -> Quantized:
    """int8 integers of at most `bits` bits and fp16 step sizes of rows (SDClip, #1394).

    A step size is `sigmas` standard deviations of its row over the largest integer; beyond it all is clipped.
    """
    weight = problem.weight
    largest = 2 ** (bits - 1) - 1
    scales = (sigmas * weight.std(dim=1) / largest).clamp_min(2.0**-24).half()  # a row of zeros: not 0 / 0
    step_size = scales.float()[:, None].expand(weight.shape).numpy()
    integers = round_matrix(problem, step_size, 0, largest=largest)
    return Quantized(torch.from_numpy(integers.astype(np.int8)), scales)


def round_matrices(
    problems: dict[str, RoundingProblem], delta: float, states: int, bit_price: float, threads: int = 0
) -> dict[str, Quantized]:
    """Every matrix on its trellis with step sizes of `delta`, the same for any number of threads."""

    def round_one(problem: RoundingProblem) -> Quantized:
        rows, columns = problem.row_exponents, problem.column_exponents
        integers = round_matrix(problem, step_sizes(rows, columns, delta), states, bit_price)
        scales = torch.from_numpy(np.append(rows, columns))
        return Quantized(torch.from_numpy(integers), scales, torch.tensor([delta]))

    rounded = parallel_map(round_one, problems.values(), threads)
    return dict(zip(problems, rounded, strict=True))


def guess_delta(problems: dict[str, RoundingProblem], goal: float, states: int) -> float:
    """The delta that makes about `goal` bytes.

    A matrix of N weights with deviation s and mean exponents r and c costs about N (log2(s) - r/8 - c/8 -
    log2(delta) + GAUSSIAN_BITS) bits, N less with a trellis; the sum over matrices is solved for log2(delta).
    """
    count = 0
    bits = 0  # at delta = 1
    for problem in problems.values():
        weights = problem.weight.numel()
        exponent = (problem.row_exponents.mean() + problem.column_exponents.mean()) / STEPS_PER_OCTAVE
        deviation = float(torch.log2(problem.weight.std() + 1e-9))
        bits += weights * (GAUSSIAN_BITS - (states > 0) - exponent + deviation)
        count += weights
    return 2.0 ** ((bits - 8 * goal) / count)


def fit_delta(
    delta: float, goal: float, slope: float, size_of: Callable[[float], int], log: Callable
) -> float:
    """The delta for which `size_of(delta)` bytes lie below `goal` by at most 0.05 %, or the best of 8.

    A secant in x = log2(delta) from `delta` on, aimed at the middle of the tolerance. `slope` is about how
    many bytes fewer an octave makes; a secant may halve or double it at most. Every trial goes to `log`.
    """
    x = math.log2(delta)
    sizes: dict[float, int] = {}
    for _ in range(8):
        sizes[x] = size_of(2.0**x)
        log(f"size: delta 2^{x:.5f} gives {sizes[x]} bytes, {100 * (sizes[x] / goal - 1):+.3f}% of the goal")
        if 0 <= goal - sizes[x] <= 5e-4 * goal:
            break
        if len(sizes) > 1:
            before = list(sizes)[-2]
            secant = (sizes[before] - sizes[x]) / (x - before)
            slope = min(max(secant, slope / 2), slope * 2)
        x += (sizes[x] - goal * (1 - 2.5e-4)) / slope
    fitting = [exponent for exponent, size in sizes.items() if size <= goal]
    return 2.0 ** min(fitting, default=max(sizes))


def matrix_weight(weights: dict[str, Tensor], matrix: Matrix) -> Tensor:
    """The weight (R, C) of `matrix`, a view of its bank or the parameter itself."""
    weight = weights[matrix.parameter]
    return weight if matrix.index is None else weight[matrix.index]


def quantize(
    run: Run,
    table: dict[str, ParameterSpec],
    weights: dict[str, Tensor],
    goal: int,
    looped: bool,
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
) -> dict[str, Quantized]:
    """All `weights` as the artifact holds them, by flat name: matrices in table order, then fp16 tensors.

    rate_distortion makes a file of `goal` bytes. Rank 0 only: the matrices are spread over its threads. Stop
    if the `moments` of a matrix's inputs are not positive definite.
    """
    config = run.config
    matrices = list_matrices(table)
    small = {
        name: Quantized(weights[name].half().cpu())
        for name, spec in table.items()
        if spec.quantizer == "fp16"
    }
    powers = SENSITIVITY_POWERS if config.quantizer == "rate_distortion" else (0.0, 0.0, 0.0)

    def pose(matrix: Matrix) -> RoundingProblem:
        weight = matrix_weight(weights, matrix)
        return rounding_problem(weight, *moments[matrix.key], config.gptq_dampening, powers)

    def clip(matrix: Matrix) -> Quantized:
        return round_clipped(problems[matrix.name], *clip_and_bits(config, matrix.quantizer))

    try:
        posed = parallel_map(pose, matrices)
    except torch.linalg.LinAlgError:
        raise Stop(
            f"GPTQ_DAMPENING={config.gptq_dampening}: the second moments of a matrix's inputs are not "
            "positive definite; raise it or GPTQ_CALIBRATION_BATCHES"
        ) from None
    problems = {matrix.name: problem for matrix, problem in zip(matrices, posed, strict=True)}
    if config.quantizer == "sdclip":
        return dict(zip(problems, parallel_map(clip, matrices), strict=True)) | small

    trials: dict[float, dict[str, Quantized]] = {}

    def size_of(delta: float) -> int:
        trials[delta] = round_matrices(problems, delta, config.trellis_states, BIT_PRICE) | small
        return len(encode_artifact(config, trials[delta], looped))

    count = sum(problem.weight.numel() for problem in problems.values())
    goal = min(goal, count)  # 8 bits a weight: finer would be waste
    guess = guess_delta(problems, goal, config.trellis_states)
    return trials[fit_delta(guess, goal, count / 8, size_of, run.log)]


def assemble_weights(table: dict[str, ParameterSpec], tensors: dict[str, Quantized]) -> dict[str, Tensor]:
    """The fp32 parameters, banks put together again, from the tensors of an artifact."""
    weights = {name: tensors[name].restore() for name, spec in table.items() if spec.quantizer == "fp16"}
    parts: dict[str, list[Tensor]] = {}
    for matrix in list_matrices(table):
        parts.setdefault(matrix.parameter, []).append(tensors[matrix.name].restore())
    for name, matrices in parts.items():
        banked = len(table[name].shape) == 3
        weights[name] = torch.stack(matrices) if banked else matrices[0]
    return weights


# === ARTIFACT ===
# In: every tensor as `Quantized`. Out: the bytes on disk, and from these the same tensors again; and the
# script that is shipped. Integers go through an adaptive range coder in integer arithmetic (the same bytes on
# every machine), everything else through `compressor`. The constants of the coder are free to change and move
# a few bytes; ARTIFACT_MAGIC has to change with them, because no file written before can be read after that.
#
# The container, little-endian; it holds no code and no pickle:
#
#     offset  bytes  what
#          0      8  ARTIFACT_MAGIC
#          8      8  name of the compressor, filled up with zeros
#         16      4  M, bytes of the manifest
#         20      8  P, bytes of the payload
#         28     32  sha256 of the compressor's name, manifest and payload
#         60      M  manifest: compressed JSON, see build_manifest
#     60 + M      P  payload: the streams one behind the other, see streams_of; the manifest has their lengths
ARTIFACT_MAGIC = b"GOLFPAK2"
ARTIFACT_HEADER = struct.Struct("<8s8sIQ32s")

# The range coder. A stream is one long number, and every symbol narrows the interval in which it lies. The
# state `coder` is an int64 array with these places:
LOW = 0  # encoder: the interval's lower end, 56 bits behind the bytes written; decoder: the number minus that
SPAN = 1  # width of the interval, more than 2^48 before each symbol and at most 2^56
POSITION = 2  # bytes that were written to the buffer, or read from it
INTERVAL_MASK = (1 << 56) - 1

SYMBOLS = 256  # of an alphabet
ESCAPE = SYMBOLS - 1  # the symbol that four bytes follow
SIZE_CLASSES = 40  # contexts by the size to expect, for each parity
COUNT_GAIN = 32  # what a symbol's count grows by
COUNT_LIMIT = 1 << 18  # of the sum of a context's counts: beyond it they are halved


@numba_inline
def add_carry(buffer, position):
    """Add 1 to the number that ends before `position`: bytes of 255 become 0, the one before them grows."""
    position -= 1
    while buffer[position] == 255:
        buffer[position] = 0
        position -= 1
    buffer[position] += 1


@numba_jit
def code_symbol(symbol, context, counts, coder, buffer, decoding):
    """Encode `symbol`, or decode one, with the counts of `context`, the last of which is their sum; count it.

    The interval shrinks to the symbol's part: its count's share of the span, behind those of smaller symbols.
    An encoder whose LOW outgrows its 56 bits carries into the buffer. Then, while the span has at most 48
    bits, the next byte moves from LOW to the buffer, or back when decoding.
    """
    low = coder[LOW]
    unit = coder[SPAN] // counts[context, SYMBOLS]
    if decoding:
        symbol = 0
        while symbol < SYMBOLS - 1 and unit * counts[context, symbol] <= low:
            low -= unit * counts[context, symbol]
            symbol += 1
    else:
        for smaller in range(symbol):
            low += unit * counts[context, smaller]
        if low > INTERVAL_MASK:
            add_carry(buffer, coder[POSITION])
            low &= INTERVAL_MASK

    span = unit * counts[context, symbol]
    while span <= INTERVAL_MASK >> 8:
        if decoding:
            low = low << 8 | buffer[coder[POSITION]]
        else:
            buffer[coder[POSITION]] = low >> 48
            low = low << 8 & INTERVAL_MASK
        span <<= 8
        coder[POSITION] += 1
    coder[LOW] = low
    coder[SPAN] = span

    counts[context, symbol] += COUNT_GAIN
    counts[context, SYMBOLS] += COUNT_GAIN
    if counts[context, SYMBOLS] > COUNT_LIMIT:
        counts[context, :SYMBOLS] = (counts[context, :SYMBOLS] + 1) >> 1
        counts[context, SYMBOLS] = counts[context, :SYMBOLS].sum()
    return symbol


@numba_inline
def code_integer(integer, context, counts, coder, buffer, decoding):
    """Encode `integer`, or decode one; 0, -1, 1, -2, 2 ... have the indices 0, 1, 2, 3, 4 ...

    An index below ESCAPE is a symbol of `context`. Any other is ESCAPE and then its four bytes, low one
    first, each of which has a context of its own.
    """
    index = integer << 1 if integer >= 0 else ~integer << 1 | 1
    found = code_symbol(min(index, ESCAPE), context, counts, coder, buffer, decoding)
    if found == ESCAPE:
        found = 0
        for byte in range(4):
            part = index >> 8 * byte & 255
            found |= code_symbol(part, 2 * SIZE_CLASSES + byte, counts, coder, buffer, decoding) << 8 * byte
    return found >> 1 ^ -(found & 1)


@numba_inline
def size_class(size):
    """The class of an expected size in sixteenths: four to the octave, the first is everything below 5/16."""
    octave = 0
    while size >= 8:
        size >>= 1
        octave += 4
    return min(octave + max(size - 4, 0), SIZE_CLASSES - 1)


@numba_jit
def code_matrix(matrix, after, counts, coder, buffer, decoding):
    """Encode or decode an int32 matrix (R, C) in place, column by column.

    The context of an integer is its parity, known from the trellis, and its expected size: the mean of its
    row times the factor of its column, both from what came before. A column's factor is the sum of the sizes
    |m| in it over the sum of its rows' means; a row's mean is the sum of its sizes over the sum of the
    columns' factors, and both of these are halved when the latter passes 512, to forget. 1024 stands for 1.
    """
    rows, columns = matrix.shape
    halving = np.int64(len(after) > 1)  # with a trellis the lowest bit is known
    row_sum = np.full(rows, 8 << 10)  # as if two columns of size 4 had come before
    row_mean = np.full(rows, 4 << 10)
    factors = 2 << 10
    for column in range(columns):
        seen = 8 << 10  # as if two integers as large as expected had come before
        expected = 8 << 10
        state = 0
        for row in range(rows):
            parity = state & 1
            sixteenths = row_mean[row] * ((seen << 10) // expected) >> 16
            context = parity * SIZE_CLASSES + size_class(sixteenths)
            half = np.int64(matrix[row, column]) >> halving
            half = code_integer(half, context, counts, coder, buffer, decoding)
            integer = half << halving | parity
            matrix[row, column] = integer
            state = after[state, half & 1]
            size = min(abs(integer), 1 << 15) << 10
            row_sum[row] += size
            seen += size
            expected += row_mean[row]
        factors += (seen << 10) // expected
        if factors > 512 << 10:
            row_sum >>= 1
            factors >>= 1
        row_mean = (row_sum << 10) // factors


@numba_jit
def code_integers(values, shapes, after, counts, coder, buffer, decoding):
    """Encode or decode int32 matrices of these `shapes`, one behind the other in `values`, see code_matrix.

    `counts` (2 SIZE_CLASSES + 4, SYMBOLS + 1): contexts of even, then of odd integers by size class, and of
    the bytes behind an ESCAPE.
    """
    begin = 0
    for rows, columns in shapes:
        end = begin + rows * columns
        matrix = values[begin:end].reshape(rows, columns)
        code_matrix(matrix, after, counts, coder, buffer, decoding)
        begin = end


def initial_counts(states: int) -> np.ndarray:
    """The counts (2 SIZE_CLASSES + 4, SYMBOLS + 1) that both sides start from; they save 0.2 % of the bytes.

    One of every symbol, and in a size class around mu the expectation of 128 integers of geometric size,
    chances proportional to (mu / (mu + 1))^|m|; in whole numbers, which come out the same on every machine.
    """
    classes = np.arange(SIZE_CLASSES)
    mean = 9 + 2 * (classes % 4) << classes // 4  # middle of the class, 32 is 1
    powers = np.full((SYMBOLS + 1, SIZE_CLASSES), 1 << 40)
    for size in range(SYMBOLS):
        powers[size + 1] = powers[size] * mean // (mean + 32)
    symbols = np.arange(SYMBOLS)
    even = (symbols + 1) // 2 << (states > 0)  # sizes |m| of the symbols; without a trellis of all integers
    odd = symbols | 1
    sizes = np.stack((even, odd))
    shares = powers[sizes].transpose(0, 2, 1).reshape(-1, SYMBOLS)
    counts = np.ones((2 * SIZE_CLASSES + 4, SYMBOLS + 1), np.int64)
    counts[: 2 * SIZE_CLASSES, :SYMBOLS] += 128 * COUNT_GAIN * shares // shares.sum(1, keepdims=True)
    counts[:, SYMBOLS] = counts[:, :SYMBOLS].sum(1)
    return counts


def code_matrices(matrices: list[np.ndarray], states: int, data: bytes | None = None) -> bytes:
    """The stream of int32 matrices (R, C), columns on trellis paths; with `data` they are filled from it."""
    values = np.concatenate([matrix.ravel() for matrix in matrices])
    shapes = np.array([matrix.shape for matrix in matrices])
    if data is None:
        buffer = np.zeros(8 * values.size + 64, np.uint8)
        coder = np.array([0, INTERVAL_MASK + 1, 0])
    else:
        buffer = np.frombuffer(bytearray(data + b"\xff" * 64), np.uint8)
        coder = np.array([int.from_bytes(buffer[:7].tobytes(), "big"), INTERVAL_MASK + 1, 7])
    code_integers(values, shapes, trellis(states)[0], initial_counts(states), coder, buffer, data is not None)
    parts = np.split(values, np.cumsum(shapes.prod(1))[:-1])
    for matrix, part in zip(matrices, parts, strict=True):
        matrix[:] = part.reshape(matrix.shape)
    return buffer[: coder[POSITION]].tobytes() + bytes([coder[LOW] >> 48])  # 255s behind it: within the span


def compress(data: bytes, compressor: str, undo: bool = False) -> bytes:
    """`data` packed as tightly as `compressor` can, or unpacked again."""
    if compressor == "lzma":
        return lzma.decompress(data) if undo else lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    import brotli

    return brotli.decompress(data) if undo else brotli.compress(data, quality=11, lgwin=24)


def byte_planes(part: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor as a view, uint8 (bytes of an element, elements), low ones first."""
    return part.contiguous().numpy().reshape(-1, 1).view(np.uint8).T


def code_stream(parts: list[Tensor], compressor: str, states: int, data: bytes | None = None) -> bytes:
    """One stream of the artifact; with `data`, its parts are filled from it.

    int32 goes through code_matrices (matrices lie on trellis paths of so many `states`, vectors do not), the
    rest through `compressor`, all low bytes of a part before all high ones: these repeat.
    """
    if parts[0].dtype == torch.int32:
        matrices = [part.view(len(part), -1).numpy() for part in parts]
        return code_matrices(matrices, states if parts[0].dim() > 1 else 0, data)
    if data is None:
        return compress(b"".join(byte_planes(part).tobytes() for part in parts), compressor)
    raw = np.frombuffer(compress(data, compressor, undo=True), np.uint8)
    ends = np.cumsum([part.nbytes for part in parts])
    for part, flat in zip(parts, np.split(raw, ends[:-1]), strict=True):
        byte_planes(part)[:] = flat.reshape(part.itemsize, -1)
    return data


def streams_of(name: str, tensor: Quantized) -> list[tuple[str, Tensor]]:
    """Which stream each part of a tensor goes to: one per role, so that the coder sees like beside like."""
    role = "fp16" if tensor.scales is None else re.sub(r"\d+", "*", name)
    parts = zip((role, "scales", "delta"), tensor, strict=True)
    return [(stream, part) for stream, part in parts if part is not None]


def collect_streams(tensors: dict[str, Quantized]) -> dict[str, list[Tensor]]:
    """The parts of all tensors by stream, both in the order of the artifact."""
    streams: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        for stream, part in streams_of(name, tensor):
            streams.setdefault(stream, []).append(part)
    return streams


def build_manifest(
    config: Config, tensors: dict[str, Quantized], looped: bool, sizes: dict[str, int]
) -> dict[str, Any]:
    """What a reader needs besides the payload; `sizes` are the bytes of the streams."""

    def describe(name: str, tensor: Quantized) -> list:
        parts = [part for _, part in streams_of(name, tensor)]
        return [name, [[str(part.dtype).removeprefix("torch."), list(part.shape)] for part in parts]]

    return {
        "format": 2,
        "looped": looped,
        "states": config.trellis_states,
        "model": config.chosen("Model"),
        "tensors": [describe(name, tensor) for name, tensor in tensors.items()],
        "streams": [[name, size] for name, size in sizes.items()],
    }


def encode_artifact(config: Config, tensors: dict[str, Quantized], looped: bool) -> bytes:
    """The artifact: header, compressed manifest, one stream per role; `looped` is the route to evaluate on.

    Stop if a value does not fit in fp16.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.values.float()).all():
            raise Stop(
                f"{name}: a value does not fit in fp16, nothing was packed; lower SCALAR_LR or raise ADAM_WD"
            )

    def encode(parts: list[Tensor]) -> bytes:
        return code_stream(parts, config.compressor, config.trellis_states)

    streams = collect_streams(tensors)
    coded = parallel_map(encode, streams.values())  # coders run without the interpreter's lock
    sizes = {name: len(data) for name, data in zip(streams, coded, strict=True)}
    manifest = json.dumps(build_manifest(config, tensors, looped, sizes), separators=(",", ":"))
    head = compress(manifest.encode(), config.compressor)
    payload = b"".join(coded)
    coder = config.compressor.encode()
    digest = hashlib.sha256(coder + head + payload).digest()
    return ARTIFACT_HEADER.pack(ARTIFACT_MAGIC, coder, len(head), len(payload), digest) + head + payload


def read_container(path: Path) -> tuple[str, bytes, bytes, str]:
    """(compressor, compressed manifest, payload, sha256 of the file); Stop if a byte of `path` is wrong."""
    remedy = "copy it again, or make it again with STAGE=quantize"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Stop(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    start = ARTIFACT_HEADER.size
    if len(data) < start or not data.startswith(ARTIFACT_MAGIC):
        raise Stop(f"{path}: not an artifact (it should start with {ARTIFACT_MAGIC.decode()}); {remedy}")
    _, coder, head, payload, digest = ARTIFACT_HEADER.unpack_from(data)
    size = start + head + payload
    if len(data) != size:
        raise Stop(f"{path}: {len(data)} bytes instead of {size}, truncated or damaged; {remedy}")
    coder = coder.rstrip(b"\0")
    if hashlib.sha256(coder + data[start:]).digest() != digest:
        raise Stop(f"{path}: a byte was changed, the checksum does not fit; {remedy}")
    return coder.decode(), data[start : start + head], data[start + head :], hashlib.sha256(data).hexdigest()


def decode_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Quantized], str]:
    """(manifest, tensors by flat name, sha256) of the artifact at `path`; Stop if a byte of it is wrong."""
    compressor, head, payload, digest = read_container(path)
    manifest = json.loads(compress(head, compressor, undo=True))
    tensors = {}
    for name, parts in manifest["tensors"]:
        tensors[name] = Quantized(*(torch.empty(shape, dtype=getattr(torch, kind)) for kind, shape in parts))
    streams = collect_streams(tensors)
    begin = 0
    pieces = {}
    for name, size in manifest["streams"]:
        pieces[name] = payload[begin : begin + size]
        begin += size

    def fill(name: str) -> None:
        code_stream(streams[name], compressor, manifest["states"], pieces[name])

    parallel_map(fill, pieces)
    return manifest, tensors, digest


def seal_artifact(run: Run, tensors: dict[str, Quantized], looped: bool) -> tuple[int, str]:
    """Write the artifact, read the file again, compare every number; returns (bytes, sha256). Rank 0 only."""
    path = run.folder / "final_model.ptz"
    write_atomically(path, encode_artifact(run.config, tensors, looped))
    _, again, digest = decode_artifact(path)
    same = list(again) == list(tensors) and all(
        torch.equal(again[name].restore(), tensors[name].restore()) for name in tensors
    )
    if not same:
        raise Stop(
            f"{path}: reads back differently than it was written; check the disk and the "
            f"{run.config.compressor} package, nothing was scored"
        )
    return path.stat().st_size, digest


# The packed script: a decoder line around the compressed source. It registers the source with linecache
# because Triton reads the text of its kernels through inspect, which a bare exec would leave without any.
PACKED_HEAD = "import base64 as b,linecache as l,lzma as z\n"
PACKED_SCRIPT = PACKED_HEAD + (
    "s=z.decompress(b.b85decode(\"{}\"),3,None,[{{'id':33,'dict_size':1<<20}}]).decode()\n"
    "n='<train_gpt>'\nl.cache[n]=len(s),None,s.splitlines(True),n\nexec(compile(s,n,'exec'))\n"
)


@functools.lru_cache(1)
def pack_source(source: str) -> tuple[str, str]:
    """(`source` as a self-extracting script, how it was made); one that is packed already stays as it is."""
    if source.startswith(PACKED_HEAD):
        return source, "already packed"
    import ast

    try:
        import python_minifier
    except ImportError:
        how = "not minified (python-minifier is not installed)"
    else:
        how = "minified"
        # Names stay: Triton passes arguments by name. Hoisting literals would take them out of the kernels'
        # text. Docstrings go, but for the head of the file, which --help prints.
        head = ast.get_docstring(ast.parse(source), clean=False) or ""
        minified = python_minifier.minify(
            source,
            rename_locals=False,
            hoist_literals=False,
            remove_annotations=False,
            remove_literal_statements=True,
        )
        source = f"{head!r}\n{minified}"
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
