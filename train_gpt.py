"""Train, quantise, pack and score the best language model that fits in 16,000,000 bytes, in one file.

    python train_gpt.py                                      one GPU or the CPU; settings from the environment
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs: same batches, same losses
    python train_gpt.py --help                               every setting, its default and its meaning
    python train_gpt.py --preflight                          what this machine will give, and what to mend

This is the game of Parameter Golf. A run is train -> quantise -> pack -> evaluate, each also alone
(STAGE=train|quantize|evaluate) from what the one before left in runs/$RUN_ID/. The score is computed from the
bytes of the artifact on disk and nothing else.

Contents, in the order of execution (every section starts with a line `# === NAME ===`):
    CONFIG       every setting, declared once: type, default, range, meaning
    ENVIRONMENT  rules between settings, other names of settings, the command line
    RUN          rank, device, run folder, log, metrics, errors
    DATA         shards, tokenizer, manifest, validation tokens and their bytes
    LOADERS      micro-batches of training, packed by document or shuffled
    KERNELS      fused GPU kernels, each beside its plain reference; first those of the MLP and Muon
    LOSS         those of the head and its cross-entropy
    HEADS        those that norm, scale and rotate queries and keys
    PROJECTION   the product that makes queries, keys and values, which does the same
    GATES        those that finish the heads of attention
    RESIDUAL     those that join the residual stream from visit to visit
    LANES        those that join two such streams
    TOPOLOGY     the route (the order of layer visits), the parameter table, the matrices that are quantised
    ATTENTION    its backends, and the trial that chooses one
    ADAPTERS     what calibration and adapters may see of a forward, and add to it
    MODEL        the one forward
    OPTIMIZERS   Muon on parameter banks, Adam, EMA, schedule
    QUANTIZE     calibration, GPTQ with SDClip or with rate-distortion steps on a trellis
    TUNING       what stays in fp16 learns from the unquantised model, once the matrices are rounded
    ARTIFACT     entropy coder, the container on disk, the packed script
    EVALUATE     windows, scores, plain and sliding evaluation
    ADAPTATION   test-time training, adapters by document, the rehearsal
    PAIRS        which tokens can be neighbours in what a tokenizer writes
    CANONICAL    what can come at every place of a text: the mask of what the tokenizer cannot write
    SLOTS        documents side by side in slots that never wait: turns, cached keys, the step of the adapters
    MIXTURE      a mixture of causal experts over cached keys and values
    BUILD        the model of a run, what is compiled or captured, one training step
    TRAIN        warm-up, the training loop, checkpoints
    PREFLIGHT    what cannot work is refused in the first seconds; what the machine will give
    STAGES       train, quantise, evaluate; the summary of a run
    MAIN         what a run says of itself, how it starts and how it ends

Shapes: B batch, T positions, D model width, H heads, V vocabulary."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import decimal
import difflib
import errno
import fcntl
import functools
import hashlib
import heapq
import importlib.util
import itertools
import json
import lzma
import math
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import time
import traceback
import typing
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

# === CONFIG ===
# Every setting is one row of Config, under the Section whose result it shapes: type, default, meaning, range.
# Its name in capitals is its environment variable. Nothing after Config changes a setting.
#
# Only the standard library is loaded before the section RUN: a wrong setting stops the run before the seconds
# that loading torch takes.


class Stop(SystemExit):
    """A one-line error for the user: the variable or file, its value and the remedy. Exit status 1."""


class Check(NamedTuple):
    """What a value must satisfy, and the same in words."""

    holds: Callable[[Any], bool]
    rule: str


finite = Check(lambda value: not isinstance(value, float) or math.isfinite(value), "must be finite")
positive = Check(lambda value: value > 0, "must be greater than 0")
not_negative = Check(lambda value: value >= 0, "must not be negative")
above_one = Check(lambda value: value > 1, "must be greater than 1")
below_one = Check(lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
fraction = Check(lambda value: 0 <= value <= 1, "must lie between 0 and 1")
vocabulary_size = Check(lambda value: 5 <= value <= 65_536, "must be 5 to 65536")
trellis_size = Check(lambda value: value in (0, 8, 64, 256), "must be 0, 8, 64 or 256")
not_negative_or_measured = Check(lambda value: value == -1 or value >= 0, "must not be negative (or -1)")
bit_width = Check(lambda value: value in (5, 6, 7, 8), "must be 5, 6, 7 or 8")
bit_width_or_default = Check(
    lambda value: value in (0, 5, 6, 7, 8), "must be 5, 6, 7 or 8 (or 0: MATRIX_BITS)"
)
decay_list = Check(
    lambda value: re.fullmatch(r"(0?\.\d+:\d*\.?\d+(,(?!$)|$))*", value, re.ASCII) is not None,
    "must be pairs decay:weight separated by commas, as in 0.85:0.4385,0.98:0.5615",
)
length_list = Check(
    lambda value: re.fullmatch(r"([1-9]\d*@(0?\.\d+|[01])(,(?!$)|$))*", value, re.ASCII) is not None,
    "must be pairs length@progress separated by commas, as in 512@0.1,1024@0.7",
)
rate_list = Check(
    lambda value: re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?)*", value, re.ASCII) is not None,
    "must be numbers separated by commas",
)
file_name = Check(
    lambda value: re.fullmatch(r"(?!\.*$)[\w.-]+|", value, re.ASCII) is not None,
    "may hold letters, digits and ._- only",
)


def knob(default: Any, meaning: str, check: Check = finite) -> Any:
    """One setting: default, meaning in one line, and what its value must satisfy besides being finite."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "check": check})


class Section(NamedTuple):
    """A heading of the settings table; `shapes` says which stage's result the settings below it decide."""

    title: str
    shapes: Literal["nothing", "training", "artifact", "score"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting; read, as in #1585, #1738, #1755 and #1693, from the variable of its name in capitals."""

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
    attention: Literal["auto", "fa3", "fa3_hub", "fa4", "fa2", "varlen", "sdpa"] = knob(
        "auto", "attention; auto: the first that passes a trial, forward and backward"
    )
    kernels: Literal["auto", "triton", "reference"] = knob(
        "auto", "fused kernels; auto: triton if there is a GPU"
    )
    mlp_kernel: Literal["auto", "cutlass", "triton", "reference"] = knob(
        "auto", "MLP; auto: the first usable"
    )
    compile: Literal["auto", "on", "off"] = knob("auto", "torch.compile; auto: if there is a GPU")
    cuda_graphs: bool = knob(
        False, "replay a step as CUDA graphs: one per micro-batch, one for the update (not measured)"
    )
    compile_cache: str = knob("", "folder that keeps compiled code for the next start; empty: torch's own")
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
    train_seq_schedule: str = knob(
        "", "length@progress,...: packed segments are no longer until then (#2014); empty: none", length_list
    )
    _model = Section("Model", "training")
    vocab_size: int = knob(8192, "entries of the tokenizer", vocabulary_size)
    num_layers: int = knob(11, "layers with weights of their own", positive)
    model_dim: int = knob(512, "width of the residual stream", positive)
    num_heads: int = knob(8, "query heads", positive)
    num_kv_heads: int = knob(4, "key and value heads (grouped-query attention)", positive)
    mlp_mult: float = knob(4.0, "hidden width of the MLP over MODEL_DIM", positive)
    rope_dims: int = knob(16, "leading dimensions of each head that are rotated", not_negative)
    rope_base: float = knob(10_000.0, "base of the rotation frequencies", above_one)
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
    smear_gate_order: Literal["before_norm", "after_norm"] = knob(
        "before_norm", "where it acts: on the embedding as stored (#1667, #1855) or normalised (#1693)"
    )
    smear_gate_bos_fix: bool = knob(True, "smear nothing into the first token of a document (#1851)")
    smear_gate_segment_fix: bool = knob(
        True, "nor, with that, into a cut document's later segments or a joined row (published: 0)"
    )
    bigram_rows: int = knob(
        0,
        "rows of a table of hashed token pairs that is added to the embedding (#1716); 0: none",
        not_negative,
    )
    bigram_width: int = knob(32, "entries of such a row, before its projection to MODEL_DIM", positive)
    mudd_last_n: int = knob(
        0,
        "last visits whose stream takes of four earlier ones, token by token (MUDD, 2502.12170)",
        not_negative,
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
    schedule: Literal["time", "steps", "operations"] = knob(
        "time", "rates and loops follow the clock or (repeatable) the steps or TRAIN_OPERATIONS"
    )
    train_operations: float = knob(
        0.0, "SCHEDULE=operations: floating-point operations of all steps, forward and backward", not_negative
    )
    iterations: int = knob(20_000, "most training steps; the schedule's length with SCHEDULE=steps", positive)
    max_wallclock_seconds: float = knob(600.0, "training budget, calibration included", positive)
    gptq_reserve_seconds: float = knob(
        -1.0, "part of the budget kept for calibration; -1: what warm-up measures", not_negative_or_measured
    )
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
    wd_follows_rate: bool = knob(False, "MUON_WD falls with the learning rate: the decay by its square")
    muon_mixture: str = knob(
        "", "decay:weight,... of averages that replace Muon's one momentum; empty: none", decay_list
    )
    muon_mixture_start: float = knob(0.3, "progress from which MUON_MIXTURE moves the matrices", fraction)
    tied_embed_lr: float = knob(0.03, "Adam step of the embedding", positive)
    embed_master_fp32: bool = knob(
        False, "keep the embedding in fp32, cast at use; else in COMPUTE_DTYPE as published (#1585)"
    )
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
    output_feedback: bool = knob(
        False, "rate_distortion: errors go to later rows too, as the outputs' gradients correlate"
    )
    artifact_target_bytes: int = knob(0, "rate_distortion: fill this, 0: the cap less the code", not_negative)
    ema_share: float = knob(
        1.0, "part of the average in the weights that are quantised; the rest is the last step's", fraction
    )
    gptq_calibration_batches: int = knob(
        32, "training micro-batches for calibration, over all ranks", positive
    )
    gptq_dampening: float = knob(
        0.01, "added to the inputs' second moments, as a fraction of their mean", positive
    )
    output_dampening: float = knob(
        0.0,
        "rate_distortion: the same for outputs; 0: a floor of 1 % (OUTPUT_FEEDBACK needs more)",
        not_negative,
    )
    correct_levels: bool = knob(
        False, "rate_distortion: attention in coarser steps and the head in finer ones than moments say"
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
    tune_steps: int = knob(
        0, "steps that train the fp16 tensors after rounding, by KL to the unquantised model", not_negative
    )
    tune_lr: float = knob(0.001, "Adam step of that training; falls linearly to 0", not_negative)
    tune_tokens: int = knob(
        16_384,
        "training tokens of such a step, over all ranks; fewer than TRAIN_SEQ_LEN are one shorter window",
        positive,
    )
    tune_loss_weight: float = knob(0.0, "weight of the training loss beside the KL", not_negative)
    tune_matrices: bool = knob(
        False, "round the matrices in three groups, and train those still to come, too, after each"
    )
    tune_matrix_lr: float = knob(
        0.0015, "their Adam step, as part of the standard deviation of a matrix", not_negative
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
    canonical_mask: bool = knob(
        False, "refuse in every score what the tokenizer cannot write after the tokens before"
    )
    eval_budget_passes: float = knob(
        0.0, "limit of evaluation in forwards and backwards per validation token; 0: none", not_negative
    )
    _ttt = Section("Test-time training: score, then learn", "score")
    ttt_enabled: bool = knob(True, "adapt to the validation text already scored; the run's final score")
    ttt_mode: Literal["doc_lora", "mixture", "chunk_sgd"] = knob(
        "doc_lora", "adapters per document with phases of SGD, a mixture of such and other experts, or SGD"
    )
    ttt_optimizer: Literal["auto", "sgd", "adam", "adamw"] = knob(
        "auto", "auto: sgd for chunk_sgd, else adamw"
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
        144.0, "doc_lora, mixture: adapters are scaled by this over their rank; 0: by 1", not_negative
    )
    ttt_lora_lr: float = knob(1e-4, "doc_lora, mixture: AdamW step of the adapters", not_negative)
    ttt_chunk_size: int = knob(48, "doc_lora: targets scored, then learnt, per document", positive)
    ttt_eval_seq_len: int = knob(2048, "doc_lora, mixture: most tokens of context", positive)
    ttt_batch_size: int = knob(64, "doc_lora, mixture: documents adapted side by side", positive)
    ttt_grad_steps: int = knob(1, "doc_lora: AdamW steps per chunk", positive)
    ttt_warm_start_a: bool = knob(
        False, "doc_lora: a stream's next batch starts from the A of its last (on by default in #1787, #1855)"
    )
    ttt_weight_decay: float = knob(0.5, "doc_lora, mixture: weight decay of the adapters", not_negative)
    ttt_beta1: float = knob(0.0, "doc_lora, mixture: AdamW, first moment", below_one)
    ttt_beta2: float = knob(0.99, "doc_lora, mixture: AdamW, second moment", below_one)
    ttt_q_lora: bool = knob(True, "doc_lora, mixture: adapt the queries")
    ttt_k_lora: bool = knob(True, "doc_lora, mixture: adapt the keys")
    ttt_v_lora: bool = knob(True, "doc_lora, mixture: adapt the values")
    ttt_o_lora: bool = knob(
        True, "doc_lora, mixture: adapt the attention output, reading the block's normalised input"
    )
    ttt_mlp_lora: bool = knob(True, "doc_lora, mixture: adapt the MLP's output, reading its normalised input")
    phased_ttt_num_phases: int = knob(
        1, "doc_lora, mixture: passes of SGD over documents scored so far", not_negative
    )
    phased_ttt_prefix_docs: int = knob(
        2500, "doc_lora, mixture: documents of the last of these passes", positive
    )
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
    ttt_mixture_rates: str = knob(
        "2,16", "mixture: an adapter for each of these multiples of TTT_LORA_LR; 0: none", rate_list
    )
    ttt_mixture_rank: int = knob(16, "mixture: rank of the adapters", positive)
    ttt_mixture_chunk: int = knob(24, "mixture: targets scored, then learnt, per document", positive)
    ttt_mixture_share: float = knob(
        0.01, "mixture: part of an expert's weight that goes back to its prior after a chunk", fraction
    )
    ttt_mixture_copies: Literal["none", "document", "all"] = knob(
        "all", "mixture: tokens that followed the longest match, in the document or in all scored before"
    )
    ttt_mixture_carry: float = knob(
        0.1, "mixture: part of the prior that is replaced by the weights at the end of a document", fraction
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for check in (finite, field.metadata["check"]):
                if not check.holds(value):
                    meaning = field.metadata["meaning"]
                    raise Stop(f"{field.name.upper()}={value}: {check.rule} ({meaning})")
        for holds, message in model_rules(self) + packing_rules(self) + run_rules(self):
            if not holds:
                raise Stop(message)

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> Config:
        """The settings in `environment`; Stop if one is misspelt, of the wrong type or out of range."""
        types = typing.get_type_hints(cls)
        known = cls.variables()
        values: dict[str, Any] = {}
        for name, text in environment.items():
            if name not in known and name not in ALIASES:
                refuse_variable(name, text, known)
                continue
            targets, meanings = ALIASES.get(name, (name, {}))
            for target in targets.split():
                setting = target.lower()
                value = parse_value(target, meanings.get(text, text), types[setting])
                if setting in values and values[setting] != value:
                    raise Stop(f"{name}={text}: another variable sets {target} to another value; unset one")
                values[setting] = value
        config = cls(**values)
        refuse_other_values(environment, config)
        return config

    @classmethod
    def variables(cls) -> list[str]:
        """The environment variables of the settings, in order of declaration."""
        return [field.name.upper() for field in dataclasses.fields(cls)]

    def overrides(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by variable name."""
        settings = {field: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {field.name.upper(): value for field, value in settings.items() if value != field.default}

    def chosen(self, *which: str) -> dict[str, Any]:
        """The settings of the sections with these titles, or that shape these results, by variable name."""
        return {
            field.name.upper(): getattr(self, field.name)
            for section, fields in self.sections()
            for field in fields
            if section.title in which or section.shapes in which
        }

    @classmethod
    def sections(cls) -> list[tuple[Section, list[dataclasses.Field]]]:
        """The settings under their headings, in order of declaration."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        table: list[tuple[Section, list[dataclasses.Field]]] = []
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
            for field in fields:
                options = ", ".join(typing.get_args(types[field.name]))
                suffix = f" [{options}]" if options else ""
                default = format_value(field.default) or "(empty)"
                meaning = field.metadata["meaning"]
                yield f"  {field.name.upper():<32} {default:<14} {meaning}{suffix}"


# === ENVIRONMENT ===
# In: environment variables and the command line. Out: one frozen Config, or Stop with one line that says what
# to do. A rule between settings is one row of `model_rules`, `packing_rules` or `run_rules`; what the four
# published scripts call otherwise, fix or never read is a row of ALIASES, FIXED or REFUSED.


# Streams of data: 8 ranks have one each, fewer ranks take several in turn, more ranks share each one. The
# batch stays the same.
STREAMS = 8
TTT_OPTIMIZERS = {
    "chunk_sgd": ("auto", "sgd", "adamw"),
    "doc_lora": ("auto", "adam", "adamw"),
    "mixture": ("auto", "adam", "adamw"),
}  # by TTT_MODE


# With TUNE_MATRICES, the parameters that are rounded together. The head, tied to the embedding, last: nothing
# else can make up for the errors of the layers as well (first, it took 10 % more KL).
ROUNDING_GROUPS = (("up", "down"), ("qo", "kv", "bigram_out", "mudd_read"), ("embed", "bigram_rows"))


def read_schedule(schedule: str) -> list[tuple[int, float]]:
    """(length, progress until which it holds) of TRAIN_SEQ_SCHEDULE."""
    pairs = [pair.split("@") for pair in schedule.split(",") if pair]
    return [(int(number), float(until)) for number, until in pairs]


def model_rules(config: Config) -> list[tuple[bool, str]]:
    """(holds, what to say if not) of every rule between settings of the model."""
    head_dim = config.model_dim // config.num_heads
    hidden = config.mlp_mult * config.model_dim
    return [
        (
            config.model_dim % config.num_heads == 0,
            f"NUM_HEADS={config.num_heads}: must divide MODEL_DIM={config.model_dim}",
        ),
        (
            config.num_heads % config.num_kv_heads == 0,
            f"NUM_KV_HEADS={config.num_kv_heads}: must divide NUM_HEADS={config.num_heads}",
        ),
        (
            config.rope_dims % 2 == 0 and config.rope_dims <= head_dim,
            f"ROPE_DIMS={config.rope_dims}: must be even and at most MODEL_DIM/NUM_HEADS={head_dim}",
        ),
        (
            hidden.is_integer(),
            f"MLP_MULT={config.mlp_mult}: MLP_MULT*MODEL_DIM={hidden} must be a whole number",
        ),
        (
            config.num_loops == 0 or config.loop_start <= config.loop_end < config.num_layers,
            f"LOOP_START={config.loop_start}, LOOP_END={config.loop_end}: "
            f"need LOOP_START <= LOOP_END < NUM_LAYERS={config.num_layers} (or NUM_LOOPS=0)",
        ),
        (
            config.mudd_last_n < config.num_layers,
            f"MUDD_LAST_N={config.mudd_last_n}: must be less than NUM_LAYERS={config.num_layers}, "
            "whose outputs the last visits read",
        ),
        (
            config.gate_width <= config.model_dim,
            f"GATE_WIDTH={config.gate_width}: must not exceed MODEL_DIM={config.model_dim}",
        ),
    ]


def packing_rules(config: Config) -> list[tuple[bool, str]]:
    """(holds, what to say if not) of every rule between settings of the packer."""
    return [
        (
            not config.output_feedback or config.output_dampening > 0,
            f"OUTPUT_FEEDBACK=1: needs OUTPUT_DAMPENING={config.output_dampening} to be greater than 0; "
            "set it to 0.25",
        ),
        (
            not config.correct_levels or config.quantizer == "rate_distortion",
            f"CORRECT_LEVELS=1: needs QUANTIZER=rate_distortion, not {config.quantizer}, which clips instead",
        ),
        (
            not config.tune_matrices or config.quantizer == "rate_distortion",
            f"TUNE_MATRICES=1: needs QUANTIZER=rate_distortion, not {config.quantizer}, which fits no size",
        ),
        (
            not config.tune_matrices or config.tune_steps >= len(ROUNDING_GROUPS),
            f"TUNE_MATRICES=1: TUNE_STEPS={config.tune_steps} leaves a group without a step; set it to 60",
        ),
    ]


def run_rules(config: Config) -> list[tuple[bool, str]]:
    """(holds, what to say if not) of every other rule between settings."""
    windows = STREAMS * config.train_seq_len
    return [
        (
            config.train_batch_tokens % (STREAMS if config.loader == "packed" else windows) == 0,
            f"TRAIN_BATCH_TOKENS={config.train_batch_tokens}: must be a multiple of {STREAMS}, "
            f"with LOADER=shuffled of {STREAMS} x TRAIN_SEQ_LEN = {windows}",
        ),
        (
            config.eval_stride <= config.eval_seq_len,
            f"EVAL_STRIDE={config.eval_stride}: must not exceed EVAL_SEQ_LEN={config.eval_seq_len}, "
            "tokens would be skipped",
        ),
        (
            config.ttt_chunk_size <= config.ttt_eval_seq_len,
            f"TTT_CHUNK_SIZE={config.ttt_chunk_size}: must not exceed "
            f"TTT_EVAL_SEQ_LEN={config.ttt_eval_seq_len}, tokens would be skipped",
        ),
        (
            config.ttt_mode != "mixture" or config.ttt_mixture_chunk < config.ttt_eval_seq_len,
            f"TTT_MIXTURE_CHUNK={config.ttt_mixture_chunk}: must be less than "
            f"TTT_EVAL_SEQ_LEN={config.ttt_eval_seq_len}, there would be no cache",
        ),
        (
            config.gptq_reserve_seconds < config.max_wallclock_seconds,
            f"GPTQ_RESERVE_SECONDS={config.gptq_reserve_seconds}: "
            f"must be less than MAX_WALLCLOCK_SECONDS={config.max_wallclock_seconds}",
        ),
        (
            not config.train_seq_schedule or config.loader == "packed",
            f"TRAIN_SEQ_SCHEDULE={config.train_seq_schedule}: needs LOADER=packed, whose segments it cuts",
        ),
        (
            (config.schedule == "operations") == (config.train_operations > 0),
            f"SCHEDULE={config.schedule}, TRAIN_OPERATIONS={config.train_operations:g}: "
            "SCHEDULE=operations needs TRAIN_OPERATIONS, and no other schedule reads it",
        ),
        (
            config.ttt_optimizer in TTT_OPTIMIZERS[config.ttt_mode],
            f"TTT_OPTIMIZER={config.ttt_optimizer}: not an optimiser of TTT_MODE={config.ttt_mode}; "
            "set TTT_OPTIMIZER=auto",
        ),
        (
            not config.hash_embed_enabled
            or config.ttt_mode == "chunk_sgd"
            or config.phased_ttt_num_phases > 0,
            f"HASH_EMBED_ENABLED=1: nothing would train it with TTT_MODE={config.ttt_mode} and "
            "PHASED_TTT_NUM_PHASES=0",
        ),
        (
            not config.artifact or config.stage == "evaluate",
            f"ARTIFACT={config.artifact}: only STAGE=evaluate reads it",
        ),
    ]


# The four submissions have variables that this program has not.
#
# Other names of settings: the settings (one or two), and what values mean here, if not the same.
ALIASES: dict[str, tuple[str, dict[str, str]]] = {
    "PARALLEL_RESIDUAL": ("PARALLEL_RESIDUAL", {"0": "none", "1": "two_lane"}),
    "PARALLEL_RESIDUAL_START": ("PARALLEL_START_LAYER", {}),
    "ATTN_OUT_GATE": ("HEAD_GATE", {"0": "none", "1": "attn_out"}),
    "ARTIFACT_DIR": ("OUT_DIR", {"": "runs"}),
    "MATRIX_CLIP_SIGMAS": ("ATTN_CLIP_SIGMAS MLP_CLIP_SIGMAS", {}),
}
# One value in every published run, and nothing else is implemented: that value, or the setting that has it.
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
# Variables that would be ignored or must not be used, and why.
UNREAD = "declared in the published scripts, read by no code"
SLOT = "SLOT fits a correction to the tokens it scores, which is not legal"
UNTIED = "only untied embeddings would need it (TIED_EMBED_LR is the rate in use)"
REFUSED = {
    "ROPE_TRAIN_SEQ_LEN": UNREAD,
    "MUON_BETA2": UNREAD,
    "GPTQ_ENABLED": UNREAD,
    "SWA_ENABLED": UNREAD,
    "SWA_EVERY": UNREAD,
    "LAWA_ENABLED": UNREAD,
    "LAWA_K": UNREAD,
    "LAWA_FREQ": UNREAD,
    "QAT_ENABLED": UNREAD,
    "LATE_QAT_THRESHOLD": UNREAD,
    "MTP_NUM_HEADS": UNREAD,
    "MTP_LOSS_WEIGHT": UNREAD,
    "BIGRAM_DIM": UNREAD,
    "BIGRAM_VOCAB_SIZE": UNREAD,
    "DTG_ENABLED": UNREAD,
    "VE_ENABLED": UNREAD,
    "VE_DIM": UNREAD,
    "VE_LAYERS": UNREAD,
    "GATED_ATTENTION": UNREAD,
    "VALUE_RESIDUAL": UNREAD,
    "ETLB_ENABLED": UNREAD,
    "ETLB_LR": UNREAD,
    "ETLB_STEPS": UNREAD,
    "ETLB_CLIP": UNREAD,
    "LBFGS_SLOT_ENABLED": SLOT,
    "LBFGS_SLOT_ITERS": SLOT,
    "LBFGS_SLOT_HISTORY": SLOT,
    "LBFGS_SLOT_FOCAL": SLOT,
    "LBFGS_SLOT_CLAMP": SLOT,
    "LBFGS_SLOT_LR": SLOT,
    "EMBED_LR": UNTIED,
    "HEAD_LR": UNTIED,
    "CONTROL_TENSOR_NAME_PATTERNS": "the parameter table decides what stays in fp16",
}
NOT_OURS = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"}  # torchrun's
SWITCHES = {
    "0": False,
    "1": True,
    "false": False,
    "true": True,
    "no": False,
    "yes": True,
    "off": False,
    "on": True,
}


def find_near_miss(name: str, known: Sequence[str]) -> tuple[str, bool]:
    """The one of the `known` settings that `name` nearly is (empty: none), and whether it must be meant.

    It must where the two share a word that several settings have (NUM_HEAD, MATRX_LR): MODEL_DIR, COMPILER or
    DATA_DIRS may as well belong to another program.
    """
    near = difflib.get_close_matches(name, known, 1, 0.85)
    if not near:
        return "", False
    words = [set(setting.split("_")) for setting in known]
    shared = set(name.split("_")) & set(near[0].split("_"))
    return near[0], any(sum(word in others for others in words) > 1 for word in shared)


def refuse_variable(name: str, text: str, known: Sequence[str]) -> None:
    """Stop if `name`, which sets nothing, is a refused variable or one of the `known` misspelt."""
    if name in REFUSED:
        raise Stop(f"{name}={text}: {REFUSED[name]}; unset {name}")
    if name in NOT_OURS or name in FIXED:
        return
    near, certain = find_near_miss(name, known)
    if certain:
        raise Stop(f"{name}={text}: not a setting; did you mean {near}? (or unset {name})")


def refuse_other_values(environment: Mapping[str, str], config: Config) -> None:
    """Stop if a variable of FIXED has another value."""
    for name, fixed in FIXED.items():
        if name not in environment:
            continue
        only = format_value(getattr(config, fixed.lower(), fixed))
        if environment[name] not in (only, only + ".0"):
            raise Stop(
                f"{name}={environment[name]}: every published run has {only}; nothing else is implemented"
            )


def format_value(value: Any) -> str:
    """A setting's value in the form that `parse_value` reads back."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def parse_value(name: str, text: str, kind: Any) -> Any:
    """`text` as the type `kind` of the setting `name`; integers may be written 1e4 or 524_288."""
    options = typing.get_args(kind)
    if options and text not in options:
        raise Stop(f"{name}={text}: must be one of " + ", ".join(options))
    if options or kind is str:
        return text
    if kind is bool:
        if text.lower() not in SWITCHES:
            raise Stop(f"{name}={text}: must be 0 or 1")
        return SWITCHES[text.lower()]
    if kind is int:
        return parse_integer(name, text)
    try:
        return float(text)
    except ValueError:
        raise Stop(f"{name}={text}: must be a number") from None


def parse_integer(name: str, text: str) -> int:
    """The whole number in `text`, exactly: PyTorch's seeds and sizes are int64."""
    try:
        number = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise Stop(f"{name}={text}: must be a whole number") from None
    if not number.is_finite():
        raise Stop(f"{name}={text}: must be a whole number")
    if not -(2**63) < number < 2**63:
        raise Stop(f"{name}={text}: must be less than 2^63 = {2**63} in size")
    if number != int(number):
        raise Stop(f"{name}={text}: must be a whole number")
    return int(number)


class Place(NamedTuple):
    """Which of the processes this one is, of all and on this machine."""

    rank: int
    world_size: int
    local_rank: int


def find_place(environment: Mapping[str, str]) -> Place:
    """What torchrun says in the `environment`; one process without it. Stop if that cannot be true."""
    remedy = "torchrun sets it; unset it for one process"
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = environment.get(name, "0")
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise Stop(f"{name}={text}: not a number of processes; {remedy}")
        if name in environment:
            numbers[name] = int(text)
    if "WORLD_SIZE" not in numbers:
        for name, number in numbers.items():
            raise Stop(f"{name}={number} without WORLD_SIZE: {remedy}")
        return Place(0, 1, 0)

    count = numbers["WORLD_SIZE"]
    if count == 0 or (STREAMS % count != 0 and count % STREAMS != 0):
        raise Stop(f"WORLD_SIZE={count}: must be 1, 2, 4, 8 or a multiple of 8; {remedy}")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if count > 1 and not environment.get(name):
            raise Stop(f"WORLD_SIZE={count} without {name}: {remedy}")
    port = environment.get("MASTER_PORT", "0")
    if count > 1 and not (re.fullmatch(r"[0-9]{1,5}", port) and int(port) < 2**16):
        raise Stop(f"MASTER_PORT={port}: not a port; {remedy}")
    place = Place(numbers.get("RANK", 0), count, numbers.get("LOCAL_RANK", 0))
    for name, number in (("RANK", place.rank), ("LOCAL_RANK", place.local_rank)):
        if number >= count:
            raise Stop(f"{name}={number}: must be less than WORLD_SIZE={count}; {remedy}")
    return place


def command_line(arguments: list[str]) -> Config:
    """The settings of this process; ends it after --help or --print-config, Stop for an unknown argument."""
    if arguments in ([], ["--preflight"]):
        return Config.from_env(os.environ)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the output may be cut by `| head`
    if arguments == ["--help"]:
        summary = (__doc__ or "").split("\n\nContents")[0]
        print(summary, "\nSettings (environment)", *Config.describe(), sep="\n")
    elif arguments == ["--print-config"]:
        config = Config.from_env(os.environ)
        for name in config.variables():
            print(f"{name}={format_value(getattr(config, name.lower()))}")
    else:
        given = " ".join(arguments)
        raise Stop(
            f"{given}: settings are environment variables, as in `SEED=2 python train_gpt.py`; "
            "the only arguments are --help, --print-config and --preflight"
        )
    raise SystemExit(0)


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second: before torch 2.9


def choose_allocator(environment: MutableMapping[str, str]) -> None:
    """Let CUDA's memory grow in segments, unless the user chose: rows of many lengths fragment fixed blocks.

    PyTorch reads the variable when it first allocates on a GPU, so this comes before. Not measured.
    """
    if not environment.keys() & set(ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def describe_allocator(environment: Mapping[str, str]) -> str:
    """What choose_allocator or the user set, for the log."""
    chosen = [f"{name}={environment[name]}" for name in ALLOCATOR_VARIABLES if name in environment]
    return " ".join(chosen) or "PyTorch's default"


# The folders under COMPILE_CACHE, by the variable that the compiler reads when it is loaded.
COMPILE_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "NUMBA_CACHE_DIR": "numba",
}


def use_compile_cache(folder: str) -> None:
    """Let torch.compile, Triton and numba keep their results under `folder`, if it is not empty.

    Works only before they are loaded. The folder may be carried to another machine with the same GPU and the
    same versions; what does not fit is compiled anew. Stop if it cannot be written.
    """
    if not folder:
        return
    try:
        path = Path(folder).expanduser().resolve()
        for variable, name in COMPILE_CACHES.items():
            (path / name).mkdir(parents=True, exist_ok=True)
            if not os.access(path / name, os.W_OK | os.X_OK):  # it may be there on a disk mounted to be read
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            os.environ[variable] = str(path / name)
    except (OSError, RuntimeError) as error:  # the second: ~NAME of a user without a home
        reason = error.strerror if isinstance(error, OSError) else error
        raise Stop(
            f"COMPILE_CACHE={folder}: cannot be written ({reason}); choose another folder or unset it"
        ) from None


if __name__ == "__main__":
    CONFIG = command_line(sys.argv[1:])
    find_place(os.environ)
    use_compile_cache(CONFIG.compile_cache)
    if importlib.util.find_spec("torch") is None:
        raise Stop(
            f"{sys.executable}: torch is not installed there; "
            "use ./run.sh, or pip install -r requirements.txt"
        )
    # Threads that spin while idle starve a busy machine 20-fold.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    choose_allocator(os.environ)

import numba
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    triton_jit = triton.jit
except ImportError:  # there is no triton for macOS and Windows; pick_kernels says so where it is asked for
    triton = None
    tl = None

    def triton_jit(function: Callable | None = None, **options: Any) -> Callable:
        return triton_jit if function is None else function


# === RUN ===
# In: the settings, and what torchrun says of the ranks. Out: a Run, which knows where this process is and
# speaks for it, and the run folder, which one launch at a time may write. Only rank 0 writes: `log` for
# people, `metric` for programs, `ledger` for compliance.py, whole files through `write_atomically`. A reader
# may send the metrics elsewhere as well (to a dashboard): all of them pass through `metric`.


# How long a rank waits for another through the host: rounding and packing on rank 0 may take many minutes. A
# rank that dies ends the others through torchrun, sooner. NCCL keeps its ten minutes for what hangs.
HOST_PATIENCE = timedelta(hours=24)


class Run:
    """Where this process is (rank, device, folder) and how it speaks (log, metrics, sums over ranks)."""

    def __init__(self, config: Config):
        self.config = config
        self.rank, self.world_size, local_rank = find_place(os.environ)
        check_batch_share(config, self.world_size)
        self.is_main = self.rank == 0  # the rank that logs and writes
        # The streams that this rank is the first to have: none if its rank is 8 or more.
        self.streams = range(self.rank, STREAMS, self.world_size)

        self.is_cuda = finds_cuda()
        if self.is_cuda and local_rank >= torch.cuda.device_count():
            raise Stop(
                f"LOCAL_RANK={local_rank}: this machine shows {torch.cuda.device_count()} GPUs; "
                "give torchrun at most that --nproc_per_node, or set CUDA_VISIBLE_DEVICES"
            )
        self.device = torch.device("cuda", local_rank) if self.is_cuda else torch.device("cpu")
        self.dtype = choose_dtype(config, self.is_cuda)

        # Set by `open`, on the main rank alone.
        self.folder = Path()
        self.lock: typing.TextIO | None = None
        self.sink: typing.BinaryIO | None = None
        self.metrics: typing.BinaryIO | None = None
        # The last stage that the run folder holds complete: what stops a later one costs no training.
        self.complete: Literal["", "train", "quantize"] = ""
        self.canonical: Canonical | None = None  # what every score refuses, see open_canonical
        self.token_thirds = 0  # see count_tokens

        self.host_group: dist.ProcessGroup | None = None  # what ranks say to each other without their GPUs
        tune_process(self.is_cuda)
        if self.is_cuda:
            open_gpu(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1:
            self.host_group = join_ranks(self)

    def open(self, folder: Path) -> Path:
        """Make `folder` the run folder, locked against a second run; Stop if it is in use or not writable."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")  # noqa: SIM115 -- open as long as the run
            locked = lock_file(self.lock)
            self.sink = open_lines(folder / "train.log")
            self.metrics = open_lines(folder / "metrics.jsonl")
        except BlockingIOError:
            raise Stop(
                f"{folder}: another process is writing this run; wait for it or choose another RUN_ID"
            ) from None
        except OSError as error:
            raise Stop(
                f"{folder}: cannot be written ({error.strerror}); set OUT_DIR to a writable folder"
            ) from None
        if not locked:
            self.log(f"warning: {folder}: its file system has no locks; see that no other process writes it")
        return folder

    def log(self, line: str, console: bool = True) -> None:
        """One line to train.log, and to the terminal unless `console` is false. Rank 0 only."""
        if self.is_main and console:
            show_line(line)
        if self.sink:
            write_line(self.sink, line)

    def metric(self, kind: str, **values: Any) -> None:
        """One record of full-precision values to metrics.jsonl. Rank 0 only."""
        if self.metrics:
            write_line(self.metrics, json.dumps({"kind": kind, "time": time.time(), **values}))

    def ledger(self, event: str, **values: Any) -> None:
        """One record for compliance.py: when data were read, clocks ran and the artifact was sealed.

        `clock` cannot be set, as `time` can (by NTP, or when a virtual machine goes on): durations are its.
        """
        self.metric("ledger", event=event, clock=time.monotonic(), **values)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_over_ranks(self, *values: float) -> list[float]:
        """Each of the `values` of the host at its largest over ranks; no GPU has a part in it."""
        facts = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(facts, dist.ReduceOp.MAX, group=self.host_group)
        return facts.tolist()

    def sum_on_hosts(self, value: float) -> float:
        """A number of the host summed over ranks; no GPU has a part in it."""
        total = torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        return total.item()

    def count_tokens(self, tokens: int, learns: bool) -> None:
        """Enter a forward of `tokens`, empty rows too, in this rank's account; with its backward it is three.

        A backward has two products for each of the forward.
        """
        self.token_thirds += tokens * (3 if learns else 1)

    def on_main_rank(self, action: Callable[[], Any]) -> Any:
        """`action` on rank 0 alone; the others get its value or its Stop, and wait for it as hosts."""
        message = ""  # of a Stop
        value = None
        if self.is_main:
            try:
                value = action()
            except Stop as stop:
                message = str(stop)
        if self.world_size > 1:
            outcome = [message, value]
            dist.broadcast_object_list(outcome, group=self.host_group)
            message, value = outcome
        if message:
            raise Stop(message if self.is_main else 1)  # one rank prints it, all exit with status 1
        return value

    def progress(self, what: str, items: Sequence) -> Iterator:
        """The items one by one; rank 0 shows a bar on a terminal, otherwise a line at most every 10 s."""
        has_bar = self.is_main and sys.stdout.isatty()
        start = time.monotonic()
        last = start
        for done, item in enumerate(tqdm(items, what, leave=False, file=sys.stdout, disable=not has_bar)):
            now = time.monotonic()
            if not has_bar and now - last >= 10:
                last = now
                left = (now - start) * (len(items) - done) / max(done, 1)
                self.log(f"{what}: {100 * done / len(items):.0f}% left:{left:.0f}s")
            yield item

    def now(self) -> float:
        """Seconds of a monotonic clock after the device has finished its work."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.monotonic()

    def close(self) -> None:
        """Release the log files and the lock of the run folder; with several ranks, end this process."""
        for file in (self.sink, self.metrics, self.lock):
            if file:
                file.close()
        if self.world_size > 1:
            dist.barrier(group=self.host_group)
            sys.stdout.flush()
            # gloo's threads outlive destroy_process_group and may abort an interpreter that ends (2 of 8).
            os._exit(0)


def finds_cuda() -> bool:
    """Whether torch can use a GPU. PyTorch's warning is left out: `find_driver` says what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def open_gpu(device: torch.device) -> None:
    """Make `device` the one of this process; Stop if it cannot be used: taken by another, or broken."""
    try:
        torch.cuda.set_device(device)
        torch.zeros((), device=device)
    except RuntimeError as error:
        raise Stop(
            f"{device}: cannot be used ({describe_error(error)}); nvidia-smi shows its state: end what holds "
            "it, or leave it out by CUDA_VISIBLE_DEVICES"
        ) from None


def join_ranks(run: Run) -> dist.ProcessGroup:
    """Meet the other ranks; the group through which their hosts talk. Stop if they do not come together."""
    backend = "nccl" if run.is_cuda else "gloo"
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # else half an hour is spent on asking for it
        dist.init_process_group(backend, device_id=run.device if run.is_cuda else None)
        return dist.new_group(backend="gloo", timeout=HOST_PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        place = " ".join(f"{name}={os.environ[name]}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        memory = ", and give the container shared memory: --shm-size=8g or --ipc=host" if run.is_cuda else ""
        raise Stop(
            f"{place}: rank {run.rank} of {run.world_size} does not meet the others "
            f"({describe_error(error)}); start all at once by torchrun, with a port that is free{memory}"
        ) from None


def within_memory(work: Callable[[], Any]) -> Any:
    """The value of `work`; Stop if the GPU has too little memory for it."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        raise Stop(
            f"{describe_error(error)}; lower TRAIN_BATCH_TOKENS or MODEL_DIM if it trains, VAL_BATCH_TOKENS "
            "or TTT_BATCH_SIZE if it scores; or free the GPU: nvidia-smi shows what holds it"
        ) from None


def open_lines(path: Path) -> typing.BinaryIO:
    """`path`, to add lines to; one that a full disk or a kill has cut is ended first."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 -- open as long as the run
    if file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def write_line(file: typing.BinaryIO, line: str) -> None:
    """Add one line; Stop if the disk does not take all of it."""
    rest = line.encode() + b"\n"
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise Stop(describe_unwritten(Path(file.name), error)) from None


def show_line(line: str) -> None:
    """Print one line; Stop if standard output does not take it (a file on a full disk, a closed pipe)."""
    try:
        print(line, flush=True)
    except OSError as error:
        # What is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Stop(f"standard output: cannot be written ({error}); free disk space") from None


def describe_unwritten(path: Path, error: Exception) -> str:
    """The error message for a file that could not be written."""
    return f"{path}: cannot be written ({error}); free disk space or set OUT_DIR elsewhere"


def check_batch_share(config: Config, world_size: int) -> None:
    """Stop unless a micro-batch can be shared equally where there are more ranks than streams."""
    unit = config.train_seq_len if config.loader == "shuffled" else 1
    share = max(STREAMS, world_size) * unit
    if config.train_batch_tokens % share:
        raise Stop(
            f"TRAIN_BATCH_TOKENS={config.train_batch_tokens}: must be a multiple of {share} for "
            f"WORLD_SIZE={world_size} with LOADER={config.loader}; change it or the number of processes"
        )


def choose_dtype(config: Config, is_cuda: bool) -> torch.dtype:
    """The data type of products; auto: bfloat16 if it is native."""
    if config.compute_dtype != "auto":
        return getattr(torch, config.compute_dtype)
    return torch.bfloat16 if is_cuda or torch.cpu._is_avx512_bf16_supported() else torch.float32


# Without a GPU: glibc keeps freed blocks instead of returning them, which saves half of a step's time.
MALLOC_OPTIONS = (
    (-3, 2**30),  # M_MMAP_THRESHOLD
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
    (-2, 2**26),  # M_TOP_PAD
)


CGROUP_QUOTAS = (  # of a container: microseconds of processor time in a period, and that period
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def usable_cores() -> int:
    """The cores that this process may use: a container or a job often has fewer than the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in CGROUP_QUOTAS:
        try:
            words = " ".join(Path(name).read_text() for name in names).split()
            quota, period = map(int, words)
        except (OSError, ValueError):  # no such file, or no limit: "max 100000"
            continue
        if quota > 0 and period > 0:
            return max(1, min(cores, -(-quota // period)))
    return cores


def tune_process(is_cuda: bool) -> None:
    """Let this process die with torchrun, use the cores it has, and keep memory that it will need again."""
    if "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan is left
    if not is_cuda and platform.libc_ver()[0] == "glibc":
        for option, value in MALLOC_OPTIONS:
            ctypes.CDLL(None).mallopt(option, value)


def find_run_folder(config: Config, training_data: str) -> Path:
    """The folder of this run: RUN_ID, else the newest to go on from (of `training_data`), else a new one."""
    root = Path(config.out_dir)
    trains = config.stage in ("all", "train")
    if config.run_id:
        folder = root / config.run_id
        if trains and (folder / "summary.json").exists():
            raise Stop(
                f"RUN_ID={config.run_id}: {folder} holds a finished run; choose another RUN_ID, "
                "or STAGE=evaluate to score it again"
            )
        return folder

    needed = "final_model.ptz" if config.stage == "evaluate" else "checkpoint.pt"
    for folder in matching_folders(config, training_data, needed):
        # Training goes on in a run that is neither being written nor finished; later stages may be repeated.
        if not trains or not (is_locked(folder) or (folder / "summary.json").exists()):
            return folder
    if not trains and not config.artifact:
        raise Stop(
            f"STAGE={config.stage}: no run under {root}/ with these settings has a {needed}; set RUN_ID"
            + (" or ARTIFACT" if config.stage == "evaluate" else ", or train one first")
        )

    digest = hashlib.sha256(json.dumps(config.chosen("training", "artifact")).encode()).hexdigest()
    return root / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{digest[:6]}-seed{config.seed}"


def matching_folders(config: Config, training_data: str, needed: str) -> Iterator[Path]:
    """The run folders, newest first, with a file `needed` from the same training data and settings."""
    # STAGE=quantize starts from the trained model, so the settings of the quantiser may be others.
    kinds = ("training",) if config.stage == "quantize" else ("training", "artifact")
    ours = config.chosen(*kinds) | {"training_data": training_data}
    folders = [path.parent for path in Path(config.out_dir).glob("*/config.json")]
    for folder in sorted(folders, key=lambda folder: folder.name, reverse=True):
        differences = describe_differences(read_json(folder / "config.json"), ours)
        if not differences and (folder / needed).exists():
            yield folder


def describe_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first settings in which `theirs` differ from `ours`, for an error message; empty if none does."""
    found = [
        f"{name}={theirs.get(name)} there, {value} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    return "; ".join(found[:3]) + ("; ..." if len(found) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file; Stop if it holds anything else."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise Stop(f"{path}: cannot be read ({error}); delete it or make it again") from None
    if not isinstance(content, dict):
        raise Stop(f"{path}: not a JSON object; delete it or make it again")
    return content


# What flock says on file systems without locks: Lustre mounted without them, some NFS.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock_file(file: typing.TextIO) -> bool:
    """Lock an open file; False where files cannot be locked. BlockingIOError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def is_locked(folder: Path) -> bool:
    """Whether a living process writes to the run `folder`; False where that cannot be known."""
    try:
        with open(folder / ".lock") as lock:
            lock_file(lock)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def write_atomically(path: Path, write: bytes | Callable[[typing.BinaryIO], Any]) -> None:
    """Replace `path` by bytes, or by what `write` writes; a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(write, bytes):
                file.write(write)
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise Stop(describe_unwritten(path, error)) from None


def describe_commit(folder: Path) -> str:
    """The git commit of `folder`, marked -dirty if files differ from it; none without one."""
    if not shutil.which("git"):
        return "none"
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "none"


def versions(run: Run) -> dict[str, str]:
    """Versions, hardware and source of this run, for the log and summary.json."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": getattr(triton, "__version__", "none"),
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(run.device) if run.is_cuda else f"{os.cpu_count()}-core CPU",
        "dtype": str(run.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "commit": describe_commit(Path(__file__).resolve().parent),
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }


# === DATA ===
# From a dataset folder to what training and evaluation read. In: shards of tokens (fineweb_train_*.bin and
# fineweb_val_*.bin), a SentencePiece tokenizer and, if there are any, the bytes of each validation token
# (fineweb_val_bytes_*.bin) and a manifest. Out: a `Dataset`, whose training tokens the loaders take, and the
# `Validation` tokens with the bytes they stand for. Whatever can be wrong with these files is said in the
# first seconds, from headers and sizes alone; no validation token is read before the artifact is sealed.

# A shard is a header of 256 int32 (magic, version, number of values, zeros) and then that many uint16 values,
# all little-endian.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
BOS = 1  # the token that begins every document
WORD_START = "\u2581"  # SentencePiece's character for the space before a word
AGAIN = "prepare or download the data again"
MANIFEST_TYPES = {
    **dict.fromkeys(("docs_train", "docs_val", "val_tokens"), int),
    **dict.fromkeys(("val_bytes", "val_lut_bytes", "val_sidecar_bytes"), int),
    **{"name": str, "validation": dict, "references": dict},
}
# What the tools leave in a folder until its manifest is written.
UNFINISHED_MARKS = {"prepare.journal.json": "data/prepare.py", "download.unfinished": "data/download.py"}


def read_shard(path: Path) -> np.ndarray:
    """Map the values (N,) uint16 of one shard; Stop if magic, version or size are not as the format says."""
    remedy = f"delete it and {AGAIN}"
    try:
        size = path.stat().st_size
        words = np.fromfile(path, dtype="<i4", count=3)
    except OSError as error:
        raise Stop(f"{path}: cannot be read ({error.strerror}); {remedy}") from None

    # A file shorter than a header is called truncated, not one of another kind.
    has_header = size >= SHARD_HEADER_BYTES
    magic, version, count = words.tolist() if has_header else (SHARD_MAGIC, SHARD_VERSION, 0)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise Stop(
            f"{path}: starts with {magic}, {version} instead of "
            f"magic {SHARD_MAGIC}, version {SHARD_VERSION}: not a token shard; {remedy}"
        )
    expected = SHARD_HEADER_BYTES + 2 * count
    if count < 1 or size != expected:
        raise Stop(
            f"{path}: {size} bytes, but a shard of {count} values has {expected}: "
            f"truncated or empty; {remedy}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """The SentencePieceProcessor of a model file; Stop if it is none, or has not `vocab_size` entries."""
    import sentencepiece  # not at the top: who makes tokens without it (bench/gpu.py) need not install it

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        reason = "not a SentencePiece model" if path.exists() else "no such file"
        raise Stop(f"TOKENIZER_PATH={path}: {reason}; set it to that of the dataset") from None
    size = pieces.vocab_size()
    if size != vocab_size:
        raise Stop(
            f"VOCAB_SIZE={vocab_size}: {path} has {size} entries; "
            f"set VOCAB_SIZE={size} or another TOKENIZER_PATH"
        )
    return pieces


def short_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Dataset:
    """The shards, tokenizer and manifest of a dataset folder, checked against the settings."""

    def __init__(self, config: Config, need_training: bool = True):
        self.vocab_size = config.vocab_size
        if config.datasets_dir:
            self.folder = Path(config.datasets_dir)
        else:
            self.folder = Path(f"{config.data_dir}/datasets/fineweb10B_sp{config.vocab_size}")
        self.tokenizer = self.find_tokenizer(config)

        self.val_files = self.find_shards("val")
        self.train_files = self.find_shards("train", required=need_training)
        self.sidecar_files = self.find_shards("val_bytes", required=False)
        self.train = [read_shard(path) for path in self.train_files]

        self.manifest = self.read_manifest()
        self.pieces = load_tokenizer(self.tokenizer, self.vocab_size)
        self.check_finished()
        self.check_validation()

    def find_tokenizer(self, config: Config) -> Path:
        """TOKENIZER_PATH, else the tokenizer beside the shards, else the shared one of VOCAB_SIZE."""
        if config.tokenizer_path:
            return Path(config.tokenizer_path)
        beside = self.folder / "tokenizer.model"
        if beside.exists():
            return beside
        return Path(config.data_dir, "tokenizers", f"fineweb_{config.vocab_size}_bpe.model")

    def find_shards(self, kind: str, required: bool = True) -> list[Path]:
        """The files of one kind in order; Stop if they are required and there are none.

        Also for a name that is almost one: fineweb_val_000000 (1).bin, a copy, would be read as more data.
        """
        found = sorted(self.folder.glob(f"fineweb_{kind}_[0-9]*.bin"))
        for path in found:
            if not re.fullmatch(rf"fineweb_{kind}_[0-9]{{6}}", path.stem):
                raise Stop(
                    f"{path}: a shard is called fineweb_{kind}_ and six digits; rename it or move it away"
                )
        if required and not found:
            raise Stop(
                f"DATASETS_DIR={self.folder}: no fineweb_{kind}_*.bin there; set it, "
                "or make data with data/demo.py, data/prepare.py or data/download.py"
            )
        return found

    def read_manifest(self) -> dict[str, Any]:
        """What manifest.json says, without what it leaves open (null); Stop if that cannot be used."""
        path = self.folder / "manifest.json"
        manifest = {name: value for name, value in read_json(path).items() if value is not None}
        for name, kind in MANIFEST_TYPES.items():
            if name in manifest and type(manifest[name]) is not kind:
                raise Stop(
                    f"{path}: {name} is {str(manifest[name])[:40]}, not of type {kind.__name__}; {AGAIN}"
                )
        for name, bpb in manifest.get("references", {}).items():
            if not isinstance(bpb, int | float) or not bpb > 0:
                raise Stop(f"{path}: the reference {name} is {str(bpb)[:40]}, not a score; {AGAIN}")
        return manifest

    def check_finished(self) -> None:
        """Stop if prepare.py or download.py has begun this folder and not finished it."""
        for name, tool in UNFINISHED_MARKS.items():
            if not self.manifest and (self.folder / name).exists():
                raise Stop(
                    f"{self.folder / name}: the dataset is not finished; give its command ({tool}) again"
                )

    def check_validation(self) -> None:
        """Stop for what headers, pieces and manifest say against the validation set: no token is read."""
        count = sum(len(read_shard(path)) for path in self.val_files)
        if count < 2:
            raise Stop(f"{self.val_files[0]}: the validation set is one token, nothing to score; {AGAIN}")
        promised = self.manifest.get("val_tokens", count)
        if count != promised:
            raise Stop(
                f"{self.val_files[-1]}: the validation shards have {count} tokens, the manifest says "
                f"{promised}; {AGAIN}"
            )
        if self.sidecar_files:
            sizes = sum(len(read_shard(path)) for path in self.sidecar_files)
            if sizes < count:
                raise Stop(
                    f"{self.sidecar_files[-1]}: the byte sidecar has {sizes} values for "
                    f"{count} validation tokens; {AGAIN}"
                )
            return
        byte_tables(self)
        if self.manifest.get("val_sidecar"):
            raise Stop(f"{self.folder}/fineweb_val_bytes_*.bin: the manifest promises this sidecar; {AGAIN}")
        true = self.manifest.get("val_bytes", math.inf)
        credited = self.manifest.get("val_lut_bytes", 0)
        if credited > true:
            raise Stop(
                f"{self.folder}/manifest.json: the tokenizer's pieces count {credited} bytes where the "
                f"validation text has {true}, the score would be too good; prepare it with --sidecar"
            )

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What data this is, for the log, summary.json and compliance.py.

        Hashes of shards, manifest and tokenizer, whether the validation set is the contest's, and the counts
        of the manifest and of the shard headers.
        """
        manifest_path = self.folder / "manifest.json"
        counted = ("name", "docs_train", "docs_val", "val_tokens", "val_bytes")
        counts = {key: self.manifest[key] for key in counted if key in self.manifest}
        # The contest's validation set is the first 50,000 documents of FineWeb.
        contest_size = counts.get("docs_val") == 50_000
        return {
            "shards": self.digest([*self.train_files, *self.val_files, *self.sidecar_files]),
            "manifest": short_digest(manifest_path) if manifest_path.exists() else None,
            "standard": self.manifest.get("validation", {}).get("standard", contest_size),
            "tokenizer": short_digest(self.tokenizer),
            "train_shards": len(self.train_files),
            "train_tokens": sum(map(len, self.train)),
            **counts,
        }

    @functools.cached_property
    def training_digest(self) -> str:
        """What training depends on, for checkpoints: a mended validation file needs no training again."""
        return self.digest(self.train_files)

    def digest(self, files: list[Path]) -> str:
        """A hash of the names and sizes of `files` and of the first 64 KiB of those for training."""
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
        for path in self.train_files:  # only these: no validation token is read before the artifact is sealed
            with open(path, "rb") as file:
                digest.update(file.read(1 << 16))
        return digest.hexdigest()[:16]

    def check_ids(self, tokens: np.ndarray, where: object) -> np.ndarray:
        """`tokens`, or Stop naming `where` they are from if one of them is not in the vocabulary."""
        largest = tokens.max(initial=0)
        if largest >= self.vocab_size:
            raise Stop(
                f"{where}: holds token {largest}, but VOCAB_SIZE={self.vocab_size}: "
                "the shards belong to another tokenizer; set DATASETS_DIR or VOCAB_SIZE"
            )
        return tokens


class Validation(NamedTuple):
    """All validation tokens (N,) uint16, the original bytes of each (N,) int32, and where those are from."""

    tokens: np.ndarray
    bytes: np.ndarray
    source: str


def load_validation(data: Dataset) -> Validation:
    """The whole validation set; Stop rather than count a byte that is not in the text.

    The bytes are those of the sidecar if there is one, else what the tokenizer's pieces stand for; their sum
    is that of the manifest if it has one.
    """
    tokens = np.concatenate([read_shard(path) for path in data.val_files])
    data.check_ids(tokens, data.val_files[0])
    if data.sidecar_files:
        source = "byte_sidecar"
        sizes = read_sidecar(data, len(tokens))
    else:
        source = "lut"
        sizes = count_bytes(data, tokens)
    total = int(sizes.sum(dtype=np.int64))
    if sizes[1:].max(initial=0) == 0:
        raise Stop(f"{data.val_files[0]}: {len(tokens)} validation tokens of no bytes of text; {AGAIN}")
    # SentencePiece may normalise the text: prepare.py has then counted both, its raw bytes and the pieces'.
    counted = "val_sidecar_bytes" if data.sidecar_files else "val_lut_bytes"
    name = counted if counted in data.manifest else "val_bytes"
    promised = data.manifest.get(name, total)
    if promised != total:
        raise Stop(f"{data.folder}/manifest.json: {name} is {promised}, the {source} counts {total}; {AGAIN}")
    return Validation(tokens, sizes, source)


def read_sidecar(data: Dataset, count: int) -> np.ndarray:
    """The bytes (count,) int32 of the validation tokens from the sidecar, which has as many (checked)."""
    sizes = np.concatenate([read_shard(path) for path in data.sidecar_files])
    return sizes[:count].astype(np.int32)


class ByteTables(NamedTuple):
    """By token id: bytes of the piece, whether it begins with a space, whether it stands for no text."""

    lengths: np.ndarray
    spaced: np.ndarray
    special: np.ndarray


def byte_tables(data: Dataset) -> ByteTables:
    """What the tokenizer's pieces say of bytes; Stop if they cannot say it, as then the sidecar must.

    Case operators (private-use code points) are no bytes of the text. Where a lone space is no piece, it
    becomes the three bytes of its stand-in U+2581, which are not in the text either: a space inside a piece
    is one byte.
    """
    pieces = data.pieces
    ids = range(data.vocab_size)
    texts = [pieces.id_to_piece(i) for i in ids]
    is_byte = np.array([pieces.is_byte(i) for i in ids])
    operators = [i for i, text in enumerate(texts) if re.search("[\ue000-\uf8ff]", text)]
    wrong = ""
    if operators:
        wrong = f"has case operators (ids {operators[:4]}...), which are no bytes of the text"
    elif is_byte.any() and WORD_START not in texts:
        wrong = "has byte pieces but no piece for a lone space (U+2581), whose three bytes would be counted"
    if wrong:
        raise Stop(
            f"DATASETS_DIR={data.folder}: the tokenizer {wrong}, and there is no fineweb_val_bytes_*.bin; "
            "prepare or download this sidecar"
        )

    special = np.array([pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) for i in ids])
    spaced = np.array([text.startswith(WORD_START) for text in texts]) & ~special
    inner = [text.removeprefix(WORD_START).replace(WORD_START, " ") for text in texts]
    lengths = np.array([len(text.encode()) for text in inner])
    lengths[is_byte] = 1
    lengths[special] = 0
    return ByteTables(lengths, spaced, special)


def count_bytes(data: Dataset, tokens: np.ndarray) -> np.ndarray:
    """The bytes (N,) int32 of the text that `tokens` (N,) stand for.

    The UTF-8 length of the piece, and one for the space before it unless the token before is a control token.
    """
    lengths, spaced, special = byte_tables(data)
    counts = lengths[tokens].astype(np.int32)
    counts[1:] += spaced[tokens[1:]] & ~special[tokens[:-1]]
    return counts


# === LOADERS ===
# In: a Dataset and the settings. Out: the micro-batches of this rank for any step, on its device. Eight
# streams of data make up a batch whatever the number of ranks, so the same step sees the same tokens
# everywhere, and a resumed run goes on where it stopped. A new order of the tokens is a class with `get(step,
# stream)` and a row of LOADERS.


class Past(NamedTuple):
    """What the rows of a Batch go on from (L places of a cache that is kept by visit) and leave behind.

    Of the `position` (B,) int64 tokens before in each row, place p % L holds token p: keys and values
    (B, L, KV, D) of the last L. `previous` (B, 2) int64 are the last two of them, 0 where there are none. The
    forward writes the keys and values of its own tokens to the last two, (B, T, KV, D).
    """

    position: Tensor
    previous: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    fresh_keys: tuple[Tensor, ...]
    fresh_values: tuple[Tensor, ...]


class TokenMask(NamedTuple):
    """Which tokens can come after each input: the `rows` (B, T) int32 of `table` (see Canonical)."""

    rows: Tensor
    table: Tensor


class Batch(NamedTuple):
    """Rows of tokens (B, T), or with `starts` one row of documents (B = 1) that attention keeps apart.

    `inputs` and `targets` are int64 ids, a target being the token after its input; `starts` are the int32
    places where attention segments start, padded with T (see pad_starts); none is longer than `longest`. With
    `past` the rows are the next tokens of documents whose earlier ones are in a cache. `guesses` (G, B, T)
    are ids whose losses are wanted besides those of the targets, `mask` says which ids can be targets.
    """

    inputs: Tensor
    targets: Tensor
    starts: Tensor | None = None
    longest: int = 0
    past: Past | None = None
    guesses: Tensor | None = None
    mask: TokenMask | None = None


def segment_starts(tokens: np.ndarray, longest: int, breaks: np.ndarray | None = None) -> Tensor:
    """The segments that attention keeps apart in a packed row (T,), as pad_starts gives them.

    One starts at 0, at every BOS and at every place in `breaks`; none is longer than `longest`.
    """
    borders = [[0], np.flatnonzero(tokens == BOS)]
    if breaks is not None:
        borders.append(breaks)
    starts = np.unique(np.concatenate(borders))
    lengths = np.diff(np.append(starts, len(tokens)))

    # A segment longer than `longest` is cut into pieces; `within` numbers the pieces of each segment from 0.
    pieces = -(-lengths // longest)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return pad_starts(np.repeat(starts, pieces) + within * longest, len(tokens))


# Segment starts are padded to a multiple of this, for few CUDA graphs; a compiled graph holds any number (see
# open_starts). The empty segments at the end are not free: of 512 instead of 192 for 105 documents of 98,304
# tokens, PyTorch's varlen kernel takes a tenth longer (H200, records/gpu_checks.md).
STARTS_BLOCK = 64


def pad_starts(starts: np.ndarray, total: int) -> Tensor:
    """`starts` in int32, padded with `total` (at least once) to STARTS_BLOCK (#1530)."""
    padded = np.full(-(-(len(starts) + 1) // STARTS_BLOCK) * STARTS_BLOCK, total, dtype=np.int32)
    padded[: len(starts)] = starts
    return torch.from_numpy(padded)


class ShuffledLoader:
    """Windows of TRAIN_SEQ_LEN tokens in random order, ignoring documents (#1394).

    Stream s draws from files s, s+8, ...; with fewer than 8 files, it has its share of one. The order follows
    from the epoch alone: a resumed run has the same data.
    """

    def __init__(self, config: Config, data: Dataset):
        self.data = data
        self.length = config.train_seq_len
        self.rows = config.train_batch_tokens // STREAMS // self.length
        self.orders: dict[tuple[int, int], np.ndarray] = {}
        # Windows of each stream, as many in every epoch.
        self.windows = [len(self.window_order(stream, 0)) for stream in range(STREAMS)]
        if min(self.windows) == 0:
            raise Stop(
                f"DATASETS_DIR={data.folder}: the training shards hold fewer than {STREAMS} windows of "
                f"TRAIN_SEQ_LEN={self.length} tokens per file; use more data or a shorter TRAIN_SEQ_LEN"
            )

    def window_order(self, stream: int, epoch: int) -> np.ndarray:
        """(windows, 2): file index and first token of each window, in the order they are used.

        Kept for two epochs, as a micro-batch may hold the last windows of one and the first of the next.
        """
        if (stream, epoch) not in self.orders:
            outdated = [key for key in self.orders if key[0] == stream and key[1] < epoch - 1]
            for key in outdated:
                del self.orders[key]
            self.orders[stream, epoch] = self.shuffle_windows(stream, epoch)
        return self.orders[stream, epoch]

    def shuffle_windows(self, stream: int, epoch: int) -> np.ndarray:
        """What window_order gives: files cut into windows from a random token on, and these shuffled."""
        files = len(self.data.train)
        parts = []
        for file in range(stream % files, files, STREAMS):
            windows = max(0, len(self.data.train[file]) // self.length - 1)
            phase = seeded_generator(epoch, file).integers(self.length)
            sharers = max(1, len(range(file, STREAMS, files)))  # streams that deal the windows of this file
            share = np.arange(stream // files, windows, sharers)
            parts.append(np.stack([np.full(len(share), file), phase + share * self.length], 1))
        dealt = np.concatenate(parts)
        return dealt[seeded_generator(epoch, stream, 1).permutation(len(dealt))]

    def get(self, step: int, stream: int) -> Batch:
        """The micro-batch of `stream` at `step`: (TRAIN_BATCH_TOKENS / 8 / TRAIN_SEQ_LEN, TRAIN_SEQ_LEN)."""
        tokens = np.empty((self.rows, self.length + 1), dtype=np.int64)
        for row in range(self.rows):
            epoch, place = divmod(step * self.rows + row, self.windows[stream])
            file, start = self.window_order(stream, epoch)[place]
            tokens[row] = self.data.train[file][start : start + self.length + 1]
        rows = torch.from_numpy(self.data.check_ids(tokens, self.data.folder))
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def seeded_generator(*seed: int) -> np.random.Generator:
    """A random generator that is the same on every machine for the same numbers."""
    return np.random.Generator(np.random.PCG64(seed))


class PackedLoader:
    """Consecutive tokens of the shards, 8 adjacent slices a step, with attention by document (#1530).

    What is left at the end of a shard, less than a step, is not used.
    """

    def __init__(self, config: Config, data: Dataset):
        self.data = data
        self.longest = config.train_seq_len
        self.slice_size = config.train_batch_tokens // STREAMS + 1  # with the target of the last input
        # A shard is read from its first document on; without a BOS in the first million tokens, from its
        # first token.
        self.firsts = [int(np.argmax(shard[: 1 << 20] == BOS)) for shard in data.train]
        sizes = [len(shard) - first for shard, first in zip(data.train, self.firsts, strict=True)]
        # Shard s holds the steps from ends[s - 1] up to ends[s].
        self.ends = np.cumsum([size // (STREAMS * self.slice_size) for size in sizes])
        if self.ends[-1] == 0:
            raise Stop(
                f"TRAIN_BATCH_TOKENS={config.train_batch_tokens}: the largest training shard in "
                f"{data.folder} has {max(sizes)} tokens; use a smaller batch or more data"
            )

    def get(self, step: int, stream: int) -> Batch:
        """The micro-batch of `stream` at `step`: (1, TRAIN_BATCH_TOKENS / 8)."""
        step %= int(self.ends[-1])
        shard = int(np.searchsorted(self.ends, step, side="right"))
        step_in_shard = step - (int(self.ends[shard - 1]) if shard else 0)
        start = self.firsts[shard] + (step_in_shard * STREAMS + stream) * self.slice_size
        tokens = self.data.train[shard][start : start + self.slice_size]
        self.data.check_ids(tokens, self.data.train_files[shard])
        row = torch.from_numpy(tokens.astype(np.int64))
        return Batch(row[None, :-1], row[None, 1:], segment_starts(tokens[:-1], self.longest), self.longest)


LOADERS = {"shuffled": ShuffledLoader, "packed": PackedLoader}


def join_batches(batches: list[Batch]) -> Batch:
    """Several micro-batches as one: rows below each other, or packed rows one behind the other."""
    first = batches[0]
    if len(batches) == 1:
        return first
    packed = first.starts is not None
    inputs = torch.cat([batch.inputs for batch in batches], int(packed))
    targets = torch.cat([batch.targets for batch in batches], int(packed))
    if not packed:
        return Batch(inputs, targets)
    starts = []
    for place, batch in enumerate(batches):
        unpadded = np.unique(batch.starts.numpy())[:-1]
        starts.append(unpadded + place * first.inputs.size(1))
    return Batch(inputs, targets, pad_starts(np.concatenate(starts), inputs.numel()), first.longest)


def share_batch(batch: Batch, part: int, parts: int) -> Batch:
    """Part number `part` of `parts` equal ones: rows of the micro-batch, or a stretch of its packed row.

    A packed document that crosses the border of a stretch is cut there, as it is between slices.
    """
    if parts == 1:
        return batch
    if batch.starts is None:
        rows = len(batch.inputs) // parts
        here = slice(part * rows, (part + 1) * rows)
        return Batch(batch.inputs[here], batch.targets[here])
    size = batch.inputs.size(1) // parts
    first = part * size
    starts = batch.starts.numpy() - first
    inside = starts[(starts > 0) & (starts < size)]
    inputs = batch.inputs[:, first : first + size]
    targets = batch.targets[:, first : first + size]
    return Batch(inputs, targets, pad_starts(np.append(0, inside), size), batch.longest)


def attention_pairs(batch: Batch) -> int:
    """Pairs of a query and a key in the attention segments of a batch in host memory.

    Pairs that causality excludes count, as in torch's FlopCounterMode.
    """
    if batch.starts is None:
        return batch.inputs.numel() * batch.inputs.size(1)
    return int(np.square(np.diff(batch.starts.numpy().astype(np.int64))).sum())


def longest_segment(config: Config, progress: float) -> int:
    """The longest document segment of packed rows at `progress`, by TRAIN_SEQ_SCHEDULE and TRAIN_SEQ_LEN."""
    for length, until in read_schedule(config.train_seq_schedule):
        if progress < until:
            return min(length, config.train_seq_len)
    return config.train_seq_len


def shorten_segments(batch: Batch, longest: int) -> Batch:
    """A packed batch in host memory whose segments are cut where they are longer than `longest`."""
    if batch.starts is None or longest >= batch.longest:
        return batch
    edges = np.unique(batch.starts.numpy())
    cuts = [np.arange(first, end, longest) for first, end in itertools.pairwise(edges)]
    return batch._replace(starts=pad_starts(np.concatenate(cuts), int(edges[-1])), longest=longest)


class Feed:
    """The micro-batches of this rank, step by step.

    A thread prepares the next step while the present one computes. `pairs` are the attention_pairs of the
    step that `get` gave last.
    """

    def __init__(self, run: Run, loader: ShuffledLoader | PackedLoader):
        self.run = run
        self.loader = loader
        self.worker = ThreadPoolExecutor(1)
        self.next_step: int | None = None
        self.next_batches = None  # a Future of those of next_step
        self.pairs = 0

    def get(self, step: int, longest: int = sys.maxsize) -> list[Batch]:
        """The micro-batches of `step` on the device; packed segments are cut to `longest` tokens."""
        if step == self.next_step:
            batches = self.next_batches
        else:
            batches = self.worker.submit(self.load, step)
        self.next_step = step + 1
        self.next_batches = self.worker.submit(self.load, self.next_step)
        loaded = [shorten_segments(batch, longest) for batch in batches.result()]
        self.pairs = sum(map(attention_pairs, loaded))
        return [to_device(batch, self.run) for batch in loaded]

    def load(self, step: int) -> list[Batch]:
        """The micro-batches of `step` in host memory.

        Those of this rank's streams, joined in equal groups of at most MICRO_BATCH_TOKENS (or one stream). Of
        16, 24, ... ranks, those of the same remainder modulo 8 share a stream: the step has the same tokens.
        """
        config = self.run.config
        if self.run.world_size <= STREAMS:
            batches = [self.loader.get(step, stream) for stream in self.run.streams]
        else:
            part, stream = divmod(self.run.rank, STREAMS)
            whole = self.loader.get(step, stream)
            batches = [share_batch(whole, part, self.run.world_size // STREAMS)]
        count = len(batches)
        most = max(1, config.micro_batch_tokens * STREAMS // config.train_batch_tokens)
        group = max(size for size in range(1, count + 1) if count % size == 0 and size <= most)
        joined = [join_batches(batches[first : first + group]) for first in range(0, count, group)]
        if self.run.is_cuda:
            return tree_map_only(Tensor, Tensor.pin_memory, joined)
        return joined


def to_device(batch: Any, run: Run) -> Any:
    """A Batch, or tensors in any nest, on the device of `run`, without waiting for the copy."""

    def send(tensor: Tensor) -> Tensor:
        if run.is_cuda and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # from other memory the copy would wait for the device
        return tensor.to(run.device, non_blocking=True)

    return tree_map_only(Tensor, send, batch)


# === KERNELS ===
# Fused GPU kernels, from here to LANES; first a matrix product with several epilogues that serves the MLP and
# Muon. For each, in this order: the plain PyTorch reference, the Triton code, and the operators that launch
# it, with their fakes (the shapes, for tracing) and gradients beside them. Fakes take a size as x.size(0):
# len(x) would fix it, and each number of rows would be compiled anew. At the end, the functions that choose.
# Kernels take their dtype from the data and compute in fp32. The CPU tests run them in Triton's interpreter
# (TRITON_INTERPRET=1 KERNELS=triton) against the reference.

# The namespace of the operators; a second copy of this file in the process must not free those of the first.
OPERATORS = "golf_" + __name__.strip("_")


MLP = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, up, down) -> the output, as mlp_reference


def mlp_reference(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """LeakyReLU(x up^T, 1/2)^2 down^T."""
    return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)


@triton_jit
def tile_place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of this program's tile.

    Bands of GROUP tiles in height are walked down column by column: programs near in time share rows of a and
    of b, so that L2 serves them.
    """
    tile = tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_N)
    band = tile // (GROUP * across) * GROUP
    within = tile % (GROUP * across)
    height = min(tl.cdiv(rows, BLOCK_M) - band, GROUP)
    return (band + within % height) * BLOCK_M, within // height * BLOCK_N


@triton_jit
def multiply_tile(
    a,
    b,
    matrix,
    row,
    column,
    depth,
    STRAIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of a b or, unless STRAIGHT, of a b^T, in fp32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = a.load([matrix, row, k]).reshape(BLOCK_M, BLOCK_K)
        if STRAIGHT:
            right = b.load([matrix, k, column]).reshape(BLOCK_K, BLOCK_N)
        else:
            right = b.load([matrix, column, k]).reshape(BLOCK_N, BLOCK_K).T
        total = tl.dot(left, right, total)
    return total


# Whether a number of tokens is 1 or a multiple of 16 is no part of a kernel's key here and below: evaluation
# meets all kinds of lengths, and would build a kernel again for each on its clock.
@triton_jit(do_not_specialize=["rows"])
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
    """One tile (BLOCK_M, BLOCK_N) of one product per program, with the epilogue of MODE: see gemm."""
    BACKWARD: tl.constexpr = MODE == "times_slope" or MODE == "times_input"
    SYMMETRIC: tl.constexpr = MODE == "gram" or MODE == "polynomial"

    matrix = tl.program_id(1)
    row, column = tile_place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    if not SYMMETRIC or row <= column:
        total = multiply_tile(a, b, matrix, row, column, depth, BACKWARD, BLOCK_M, BLOCK_N, BLOCK_K)
        if BACKWARD or MODE == "polynomial":
            other = aux.load([matrix, row, column]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
            if MODE == "polynomial":
                total = linear * other + square * total
            elif MODE == "times_slope":
                total *= other
            else:
                total *= tl.where(other > 0, 2.0, 0.5) * other
        elif not SYMMETRIC:
            # Two expressions without a common part: more than one tile alive would spill registers.
            kept = tl.where(total > 0, 2.0, 0.5) * total if MODE == "act_and_slope" else total
            aux.store([matrix, row, column], kept.to(aux.dtype).reshape(1, BLOCK_M, BLOCK_N))
            total = tl.where(total > 0, 1.0, 0.25) * total * total

        out.store([matrix, row, column], total.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))
        if SYMMETRIC and row < column:
            out.store([matrix, column, row], total.to(out.dtype).T.reshape(1, BLOCK_N, BLOCK_M))


def is_large(device: torch.device) -> bool:
    """Whether the shared memory is an H100's or larger (or interpreted)."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 200_000


def gemm_tile(mode: str, dtype: torch.dtype, large: bool = True) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K) of gemm_kernel, head_kernel (head) and attention_inputs_kernel (inputs).

    The tiles of the MLP fill the shared memory of an H100, those of the last two if it is `large`; compiled
    for sm_89 they would spill registers otherwise. Those of the symmetric modes are square, as each is stored
    again as its mirror image.
    """
    if dtype == torch.float32 or (mode in ("head", "inputs") and not large):
        return 128, 128, 32
    return 128, 128 if mode in ("gram", "polynomial") else 256, 64


def tile_options(a: Tensor) -> dict[str, int]:
    """How a kernel with multiply_tile is launched."""
    return {"GROUP": 8, "num_warps": 8, "num_stages": 4 if is_large(a.device) else 2}


def describe_tiles(matrices: Tensor, height: int, width: int) -> Any:
    """A TMA descriptor of `matrices` (N, M, C) by tiles; rows are padded to the whole 16 bytes it needs."""
    missing = -matrices.size(2) % (16 // matrices.element_size())
    padded = F.pad(matrices, (0, missing)) if missing else matrices.contiguous()
    return TensorDescriptor.from_tensor(padded, [1, height, width])


def gemm(
    mode: str, a: Tensor, b: Tensor, aux: Tensor | None = None, linear: float = 0.0, square: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(out, aux), both (N, M, C): N matrix products z and what follows elementwise, in one kernel.

    mode           a          b          z      out                        aux
    act_and_slope  (N, M, K)  (N, C, K)  a b^T  LeakyReLU(z, 1/2)^2        stored: its derivative
    act_and_input  (N, M, K)  (N, C, K)  a b^T  LeakyReLU(z, 1/2)^2        stored: z
    times_slope    (N, M, K)  (N, K, C)  a b    z * aux                    read: the derivative
    times_input    (N, M, K)  (N, K, C)  a b    z * derivative at aux      read: the input
    gram           (N, M, K)  as a       a b^T  z                          not touched
    polynomial     (N, M, M)  as a       a b^T  linear * aux + square * z  read: symmetric

    An aux is given unless the mode stores it. The last two modes want b = a; they compute the tiles on and
    above the diagonal and store each twice, so polynomial needs a symmetric aux.
    """
    if a.dtype == torch.bfloat16 and not a.is_cuda:  # Triton's interpreter would multiply the bits
        wide_aux = None if aux is None else aux.float()
        out, kept = gemm(mode, a.float(), b.float(), wide_aux, linear, square)
        return out.bfloat16(), kept.bfloat16()

    backward = mode.startswith("times")
    matrices, rows, depth = a.shape
    columns = b.size(2 if backward else 1)
    height, width, inner = gemm_tile(mode, a.dtype)
    align = 16 // a.element_size()
    out = torch.empty((matrices, rows, -(-columns // align) * align), dtype=a.dtype, device=a.device)
    kept = torch.empty_like(out) if aux is None else aux
    gemm_kernel[-(-rows // height) * -(-columns // width), matrices](
        describe_tiles(a, height, inner),
        describe_tiles(b, inner, width) if backward else describe_tiles(b, width, inner),
        describe_tiles(kept, height, width),
        describe_tiles(out, height, width),
        rows,
        columns,
        depth,
        linear,
        square,
        mode,
        height,
        width,
        inner,
        **tile_options(a),
    )
    out = out[..., :columns].contiguous()
    return out, kept[..., :columns].contiguous() if aux is None else aux


@torch.library.custom_op(f"{OPERATORS}::mlp", mutates_args=())
def mlp_op(x: Tensor, up: Tensor, down: Tensor, keep_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mlp_reference of x (M, D), up (H, D), down (D, H), and two (M, H) that its backward needs.

    These are the activation and its derivative (#1523) or, with `keep_input`, its input (#1530).
    """
    act, aux = gemm("act_and_input" if keep_input else "act_and_slope", x[None], up[None])
    return act[0] @ down.T, act[0], aux[0]


@mlp_op.register_fake
def _mlp_fake(x, up, down, keep_input):
    rows = x.size(0)
    hidden = up.size(0)
    return x.new_empty(rows, down.size(0)), x.new_empty(rows, hidden), x.new_empty(rows, hidden)


@torch.library.custom_op(f"{OPERATORS}::mlp_backward", mutates_args=())
def mlp_backward_op(upstream: Tensor, down: Tensor, aux: Tensor, keep_input: bool) -> Tensor:
    """The gradient (M, H) at the activation's input: upstream (M, D) @ down (D, H), times the derivative."""
    return gemm("times_input" if keep_input else "times_slope", upstream[None], down[None], aux[None])[0][0]


@mlp_backward_op.register_fake
def _mlp_backward_fake(upstream, down, aux, keep_input):
    return upstream.new_empty(upstream.size(0), down.size(1))


def _mlp_save(ctx, inputs, output):
    x, up, down, keep_input = inputs
    _, act, aux = output
    ctx.keep_input = keep_input
    ctx.mark_non_differentiable(act, aux)
    ctx.set_materialize_grads(False)  # else the backward would fill two (M, H) blocks with zeros
    ctx.save_for_backward(x, up, down, act, aux)


def _mlp_gradients(ctx, upstream, *_):
    x, up, down, act, aux = ctx.saved_tensors
    _, needs_up, needs_down, _ = ctx.needs_input_grad  # false where adapters train on frozen weights
    hidden = mlp_backward_op(upstream.contiguous(), down, aux, ctx.keep_input)
    x_gradient = hidden @ up
    up_gradient = hidden.T @ x if needs_up else None
    down_gradient = upstream.T @ act if needs_down else None
    return x_gradient, up_gradient, down_gradient, None


mlp_op.register_autograd(_mlp_gradients, setup_context=_mlp_save)


def mlp_triton(x: Tensor, up: Tensor, down: Tensor, keep_input: bool = False) -> Tensor:
    """mlp_reference with all that is elementwise in the epilogues of two products, x (..., D)."""
    out, _, _ = mlp_op(x.flatten(0, -2).contiguous(), up, down, keep_input)
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op(f"{OPERATORS}::symmetric_product", mutates_args=())
def symmetric_product_op(x: Tensor, linear: float, square: float) -> Tensor:
    """linear x + square x x^T of the matrices of x (N, R, C), from half of the tiles; without a gradient.

    With linear other than 0, x must be symmetric. The plain form stands in orthogonalize, which uses it.
    """
    return gemm("polynomial" if linear else "gram", x, x, x, linear, square)[0]


@symmetric_product_op.register_fake
def _symmetric_product_fake(x, linear, square):
    return x.new_empty(x.size(0), x.size(1), x.size(1))


def missing_triton(run: Run) -> str:
    """Why no Triton kernel can run here; empty if one can."""
    if triton is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not run.is_cuda:
        return "there is no GPU"
    try:
        triton.runtime.driver.active.get_current_target()  # compiles what launches kernels, in C
    except Exception as error:  # whatever compiler and driver raise
        return describe_error(error)
    return ""


def pick_kernels(config: Config, run: Run) -> bool:
    """Whether the Triton kernels are used; logs the reason, Stop if KERNELS=triton cannot be had."""
    missing = missing_triton(run)
    wanted = config.kernels
    if wanted == "triton" and missing:
        raise Stop(
            f"KERNELS=triton: {missing}; set KERNELS=reference (or TRITON_INTERPRET=1 to run them on the CPU)"
        )
    chosen = wanted == "triton" or (wanted == "auto" and run.is_cuda and not missing)
    if missing:
        reason = missing
    elif chosen and not run.is_cuda:
        reason = "interpreted"
    else:
        reason = f"KERNELS={wanted}, {run.device.type}"
    kernels = "triton" if chosen else "reference"
    run.log(f"kernels: {kernels} ({reason})")
    return chosen


def first_usable(run: Run, what: str, variable: str, wanted: str, order: dict[str, Callable[[], Any]]) -> Any:
    """The wanted backend, or with auto the first of `order` that can be used; Stop if there is none.

    A function of `order` gives its backend, or as a string why it cannot be used. The choice is logged with
    the reasons against the backends before it. All ranks call this together and choose alike: what fails on
    one is used on none.
    """
    refused = []
    for name in order if wanted == "auto" else [wanted]:
        found = order[name]()
        if run.world_size > 1:
            failed = torch.tensor(float(isinstance(found, str)), device=run.device)
            count = int(run.sum_over_ranks(failed))
            if count and not isinstance(found, str):
                found = f"cannot be used on {count} other ranks"
        if not isinstance(found, str):
            others = "; not ".join(refused)
            reasons = f" (not {others})" if refused else ""
            run.log(f"{what}: {name}{reasons}")
            return found
        refused.append(f"{name}: {found}")
    raise Stop(f"{variable}={wanted}: {found}; install it (requirements-gpu.txt) or set {variable}=auto")


def pick_mlp(config: Config, run: Run, fused: bool) -> MLP:
    """The MLP of all layers: MLP_KERNEL, or with auto the first that can be used; logs which and why.

    `fused`: whether KERNELS are the Triton ones.
    """

    def cutlass() -> MLP | str:
        if not (Path(__file__).resolve().parent / "cutlass_evt_fusion").is_dir():
            return "there is no folder cutlass_evt_fusion beside the script"
        if config.model_dim % 8 or config.mlp_mult * config.model_dim % 8:
            return "MODEL_DIM and MLP_MULT*MODEL_DIM must be multiples of 8"
        library = importlib.import_module("cutlass_evt_fusion")
        reason = library.available(run.dtype, run.device)
        return reason if reason else library.leaky_relu_squared_mlp

    def fused_triton() -> MLP | str:
        missing = missing_triton(run)
        if missing:
            return missing
        if not fused and config.mlp_kernel != "triton":
            return f"KERNELS={config.kernels} chose the reference"
        if config.mlp_kernel == "auto" and run.is_cuda:
            # Compiled for sm_80 and sm_89 the tiles spill 3.8 to 13 kB of registers; for sm_90 none.
            major, minor = torch.cuda.get_device_capability(run.device)
            if major < 9:
                return f"its tiles are made for compute capability 9.0, this GPU has {major}.{minor}"
        return mlp_triton

    def reference() -> MLP:
        return mlp_reference

    # Assumed until bench/gpu.py measures it: what is more specialised is faster (#1420: CUTLASS by 1 %,
    # others: not).
    order = {"cutlass": cutlass, "triton": fused_triton, "reference": reference}
    return first_usable(run, "mlp", "MLP_KERNEL", config.mlp_kernel, order)


# === LOSS ===
# The cross-entropy under the logit softcap, and the same with the product of the head before it; in the order
# of KERNELS. The plain form of the second is the product and softcapped_ce_reference.


def softcapped_ce_reference(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Cross-entropy of raw `logits` (N, V) under cap * tanh(logits / cap), for `targets` (N,).

    In nats, (N,) fp32.
    """
    return F.cross_entropy(cap * torch.tanh(logits.float() / cap), targets, reduction="none")


@triton_jit
def softcap(raw, cap):
    """cap * tanh(raw / cap), with tanh(x) as 2 sigmoid(2x) - 1."""
    return cap * (2.0 * tl.sigmoid(2.0 * raw / cap) - 1.0)


@triton_jit
def softcapped_normalizer(line, columns, cap, BLOCK: tl.constexpr):
    """Streaming log-sum-exp of a row's capped logits."""
    largest = -float("inf")
    total = 0.0  # of exp(capped - largest) over the columns so far
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        raw = tl.load(line + column, mask=live, other=0.0).to(tl.float32)
        capped = tl.where(live, softcap(raw, cap), -float("inf"))
        larger = tl.maximum(largest, tl.max(capped, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(capped - larger), 0)
        largest = larger
    return largest + tl.log(total)


@triton_jit
def softcapped_slope(raw, hit, normalizer, cap):
    """The derivative of a row's loss in its raw logits: (softmax - one-hot) * (1 - tanh^2)."""
    rising = tl.sigmoid(2.0 * raw / cap)
    falling = tl.sigmoid(-2.0 * raw / cap)
    probability = tl.exp(cap * (2.0 * rising - 1.0) - normalizer)
    # The last factor is 1 - tanh^2, exact when saturated.
    return (probability - hit.to(tl.float32)) * (4.0 * rising * falling)


@triton_jit
def softcapped_ce_forward_kernel(logits, targets, losses, normalizers, columns, cap, BLOCK: tl.constexpr):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)  # a batch may hold more than 2^31 logits
    line = logits + row * columns
    normalizer = softcapped_normalizer(line, columns, cap, BLOCK)
    chosen = tl.load(line + tl.load(targets + row)).to(tl.float32)
    tl.store(losses + row, normalizer - softcap(chosen, cap))
    tl.store(normalizers + row, normalizer)


@triton_jit
def softcapped_ce_backward_kernel(
    logits, targets, normalizers, upstream, gradient, columns, cap, BLOCK: tl.constexpr
):
    """One (row, block of columns) per program: the slopes times the upstream."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    raw = tl.load(logits + row * columns + column, mask=live, other=0.0).to(tl.float32)
    hit = column == tl.load(targets + row)
    slope = tl.load(upstream + row) * softcapped_slope(raw, hit, tl.load(normalizers + row), cap)
    tl.store(gradient + row * columns + column, slope.to(gradient.dtype.element_ty), mask=live)


@torch.library.custom_op(f"{OPERATORS}::softcapped_ce", mutates_args=())
def softcapped_ce_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(losses, normalizers), both (N,) fp32: see softcapped_ce_reference; the second is for the backward."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normalizers = torch.empty_like(losses)
    block = min(triton.next_power_of_2(columns), 8192)
    softcapped_ce_forward_kernel[(rows,)](
        logits, targets, losses, normalizers, columns, cap, BLOCK=block, num_warps=8
    )
    return losses, normalizers


@softcapped_ce_op.register_fake
def _softcapped_ce_fake(logits, targets, cap):
    losses = logits.new_empty(logits.size(0), dtype=torch.float32)
    return losses, torch.empty_like(losses)


@torch.library.custom_op(f"{OPERATORS}::softcapped_ce_backward", mutates_args=())
def softcapped_ce_backward_op(
    logits: Tensor, targets: Tensor, normalizers: Tensor, grad: Tensor, cap: float
) -> Tensor:
    """The gradient with respect to `logits`, in their dtype; `grad` (N,) is that of the losses."""
    rows, columns = logits.shape
    gradient = torch.empty_like(logits)
    block = 1024
    softcapped_ce_backward_kernel[(rows, -(-columns // block))](
        logits, targets, normalizers, grad, gradient, columns, cap, BLOCK=block, num_warps=4
    )
    return gradient


@softcapped_ce_backward_op.register_fake
def _softcapped_ce_backward_fake(logits, targets, normalizers, grad, cap):
    return torch.empty_like(logits)


def _softcapped_ce_save(ctx, inputs, output):
    logits, targets, cap = inputs
    _, normalizers = output
    ctx.cap = cap
    ctx.save_for_backward(logits, targets, normalizers)


def _softcapped_ce_gradient(ctx, upstream, _):
    logits, targets, normalizers = ctx.saved_tensors
    return softcapped_ce_backward_op(logits, targets, normalizers, upstream.contiguous(), ctx.cap), None, None


softcapped_ce_op.register_autograd(_softcapped_ce_gradient, setup_context=_softcapped_ce_save)


@triton_jit
def finish_logits(
    logits,
    slopes,
    targets,
    sums,
    chosen,
    row,
    column,
    rows,
    columns,
    cap,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What head_kernel keeps of a block of logits."""
    token = row + tl.arange(0, HEIGHT)
    entry = column + tl.arange(0, WIDTH)
    live = token < rows
    # tanh |x| = (1 - e) / (1 + e) and its derivative 4 e / (1 + e)^2 with e = exp(-2 |x|).
    decay = tl.exp(tl.abs(logits) * (-2.0 / cap))
    part = 1.0 / (1.0 + decay)
    steep = 4.0 * decay * part * part
    capped = cap * tl.where(logits > 0, 2.0 * part - 1.0, 1.0 - 2.0 * part)
    target = tl.load(targets + token, mask=live, other=-1)
    hit = entry[None, :] == target[:, None]
    holds = (target >= column) & (target < column + WIDTH)
    tl.store(chosen + token, tl.sum(tl.where(hit, capped, 0.0), 1), mask=holds)
    tl.store(chosen + rows + token, tl.sum(tl.where(hit, steep, 0.0), 1), mask=holds)
    weight = tl.where((entry < columns)[None, :], tl.exp(capped), 0.0)
    place = token.to(tl.int64) * tl.cdiv(columns, WIDTH) + column // WIDTH
    tl.store(sums + place, tl.sum(weight, 1), mask=live & (column < columns))
    slopes.store([0, row, column], (weight * steep).to(slopes.dtype).reshape(1, HEIGHT, WIDTH))


@triton_jit(do_not_specialize=["rows"])
def head_kernel(
    a,
    b,
    slopes,
    targets,
    sums,
    chosen,
    rows,
    columns,
    depth,
    cap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of the head's product per program, and of it what head_loss_op wants, without the normaliser.

    With z the logits and c = cap tanh(z / cap): `slopes` are exp(c) dc/dz, `sums` (rows, quarters of tiles
    across) those of exp(c), `chosen` (2, rows) the c and dc/dz of the target. One quarter of a tile after
    the other: what more of them take would spill registers.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    WIDTH: tl.constexpr = BLOCK_N // 4
    row, column = tile_place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    total = multiply_tile(a, b, 0, row, column, depth, False, BLOCK_M, BLOCK_N, BLOCK_K)
    left, right = total.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    first, second = left.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    third, fourth = right.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    quarters = (first, second, third, fourth)
    for place in tl.static_range(4):
        finish_logits(
            quarters[place],
            slopes,
            targets,
            sums,
            chosen,
            row,
            column + place * WIDTH,
            rows,
            columns,
            cap,
            BLOCK_M,
            WIDTH,
        )


@triton_jit(do_not_specialize=["rows"])
def head_finish_kernel(
    slopes,
    targets,
    sums,
    chosen,
    losses,
    shares,
    rows,
    stride,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses, 1 over the normaliser, and the target's slope, which contains it, for BLOCK rows a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    part = tl.arange(0, WIDTH)
    place = sums + row[:, None] * PARTS + part[None, :]
    parts = tl.load(place, mask=live[:, None] & (part < PARTS)[None, :], other=0.0)
    normalizer = tl.where(live, tl.sum(parts, 1), 1.0)
    capped = tl.load(chosen + row, mask=live, other=0.0)
    steep = tl.load(chosen + rows + row, mask=live, other=0.0)
    tl.store(losses + row, tl.log(normalizer) - capped, mask=live)
    tl.store(shares + row, 1.0 / normalizer, mask=live)
    slope = (tl.exp(capped) - normalizer) * steep
    place = slopes + row * stride + tl.load(targets + row, mask=live, other=0)
    tl.store(place, slope.to(slopes.dtype.element_ty), mask=live)


# Up to this cap exp(capped logit) and its sums need no largest logit subtracted, in fp32 and in bf16.
LARGEST_CAP = 60.0
LOSS_BLOCK = 32  # of a program of head_finish_kernel


@torch.library.custom_op(f"{OPERATORS}::head_loss", mutates_args=())
def head_loss_op(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, slopes, shares) of softcapped_ce_op on the logits x (N, D) weight (V, D)^T.

    Losses and shares (N,) in fp32; the slopes (N, V) times their row's share are the losses' derivatives in
    the logits. For training: the logits are not written. A cap bounds them, so that exp needs no largest one
    and a tile's epilogue can give the slopes but for the normaliser, which is a factor of each row: it and
    the upstream gradient multiply what is small, x and its gradient, instead of another (N, V).
    """
    if x.dtype == torch.bfloat16 and not x.is_cuda:  # as in gemm
        losses, slopes, shares = head_loss_op(x.float(), weight.float(), targets, cap)
        return losses, slopes.bfloat16(), shares
    rows, depth = x.shape
    columns = weight.size(0)
    height, width, inner = gemm_tile("head", x.dtype, is_large(x.device))
    align = 16 // x.element_size()
    slopes = torch.empty(1, rows, -(-columns // align) * align, dtype=x.dtype, device=x.device)
    parts = -(-columns // (width // 4))
    sums, chosen, losses, shares = (
        torch.empty(*shape, dtype=torch.float32, device=x.device)
        for shape in ((rows, parts), (2, rows), (rows,), (rows,))
    )
    head_kernel[(-(-rows // height) * -(-columns // width),)](
        describe_tiles(x[None], height, inner),
        describe_tiles(weight[None], width, inner),
        describe_tiles(slopes, height, width // 4),
        targets,
        sums,
        chosen,
        rows,
        columns,
        depth,
        cap,
        height,
        width,
        inner,
        **tile_options(x),
    )
    head_finish_kernel[(-(-rows // LOSS_BLOCK),)](
        slopes,
        targets,
        sums,
        chosen,
        losses,
        shares,
        rows,
        slopes.stride(1),
        PARTS=parts,
        WIDTH=triton.next_power_of_2(parts),
        BLOCK=LOSS_BLOCK,
    )
    return losses, slopes[0, :, :columns].contiguous(), shares


@head_loss_op.register_fake
def _head_loss_fake(x, weight, targets, cap):
    losses = x.new_empty(x.size(0), dtype=torch.float32)
    return losses, x.new_empty(x.size(0), weight.size(0)), torch.empty_like(losses)


def _head_loss_save(ctx, inputs, output):
    x, weight, _, _ = inputs
    _, slopes, shares = output
    ctx.mark_non_differentiable(slopes, shares)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, slopes, shares)


def _head_loss_gradients(ctx, upstream, *_):
    x, weight, slopes, shares = ctx.saved_tensors
    share = (upstream * shares)[:, None]
    x_gradient = ((slopes @ weight) * share).to(x.dtype)
    weight_gradient = slopes.T @ (x * share).to(x.dtype) if ctx.needs_input_grad[1] else None
    return x_gradient, weight_gradient, None, None


head_loss_op.register_autograd(_head_loss_gradients, setup_context=_head_loss_save)


# === HEADS ===
# What attention does head by head before its product, as one fused GPU kernel per direction beside its plain
# PyTorch reference: queries and keys are normalised, scaled and rotated. In the order of KERNELS. All of this
# moves data and computes little, so the kernels read each tensor once and write each result once; a program
# takes HEAD_BLOCK tokens and goes through their heads. Gradients of small parameters are summed in a fixed
# order: in each program, then over programs.


@torch.library.custom_op(f"{OPERATORS}::rotation_tables", mutates_args=())
def rotation_tables_op(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of `angles` in `dtype`, once per forward.

    An operator, because Inductor would compute the sines again in every kernel that reads them: in four per
    visit and for every head. A buffer would need to know the longest row, and with ROPE_YARN all lengths.
    """
    return angles.cos().to(dtype), angles.sin().to(dtype)


@rotation_tables_op.register_fake
def _rotation_tables_fake(angles, dtype):
    return torch.empty_like(angles, dtype=dtype), torch.empty_like(angles, dtype=dtype)


def rms_norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last dimension, without gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, in halves, of the first dimensions of each head of x (B, T, H, D).

    cos and sin (T, 1, R/2): R dimensions are rotated.
    """
    half = cos.size(-1)
    a = x[..., :half]
    b = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1)


def rotated_heads_reference(
    q: Tensor, k: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D) and k (B, T, KV, D) normalised and rotated (see rotate), q times the `gain` (H,)."""
    return rotate(rms_norm(q), cos, sin) * gain[:, None], rotate(rms_norm(k), cos, sin)


@triton_jit
def load_rows(start, line, column, live):
    """The columns of several rows in fp32, 0 where nothing lives; `line` is where each row begins."""
    return tl.load(start + line + column[None, :], mask=live, other=0.0).to(tl.float32)


@triton_jit
def store_rows(start, line, column, live, values):
    """What load_rows reads, rounded to the type of `start`."""
    tl.store(start + line + column[None, :], values.to(start.dtype.element_ty), mask=live)


@triton_jit
def load_rotation(cos, sin, position, dim, live, HALF: tl.constexpr):
    """(cos, signed sin, partner) per token and dimension: x_d becomes x_d cos + x_partner sin.

    Dimensions behind 2 HALF keep their value: cos is 1 and sin 0 there.
    """
    turns = live & (dim < 2 * HALF)[None, :]
    frequency = tl.where(dim < HALF, dim, dim - HALF)
    places = position[:, None] * HALF + frequency[None, :]
    c = tl.load(cos + places, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + places, mask=turns, other=0.0).to(tl.float32)
    signed = tl.where((dim < HALF)[None, :], s, -s)
    partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < 2 * HALF, dim - HALF, dim))
    return c, signed, partner


@triton_jit
def load_head_gain(gain, head, live):
    """The gains of heads, 1 where none lives; one of 0 as 1e-18, so that backward can undo it."""
    found = tl.load(gain + head, mask=live, other=1.0).to(tl.float32)
    return tl.where(tl.abs(found) < 1e-18, 1e-18, found)


@triton_jit
def rotate_rows(
    x,
    out,
    scales,
    gain,
    turn,
    token,
    tokens,
    stride,
    pitch,
    dim,
    live,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """Every head of these tokens normalised, times its gain (1 without a pointer), rotated.

    Tokens of x lie `stride` values apart, those of the scales of the norm, which are kept, `pitch`; `turn` is
    what load_rotation gives.
    """
    c, s, partner = turn
    for head in range(HEADS):
        line = token[:, None] * stride + head * D
        here = load_rows(x, line, dim, live)
        there = load_rows(x, line, partner, live)
        scale = tl.rsqrt(tl.sum(here * here, 1) / D + eps)
        tl.store(scales + token * pitch + head, scale, mask=token < tokens)
        if gain is not None:
            scale = scale * load_head_gain(gain, head, True)
        result = (here * c + there * s) * scale[:, None]
        store_rows(out, (token[:, None] * HEADS + head) * D, dim, live, result)


@triton_jit(do_not_specialize=["tokens", "length"])
def rotated_heads_kernel(
    q,
    k,
    gain,
    cos,
    sin,
    q_out,
    k_out,
    scales,
    tokens,
    length,
    q_stride,
    k_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """rotated_heads_op of BLOCK tokens per program; strides are those from token to token."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    live = (token < tokens)[:, None] & (dim < D)[None, :]
    turn = load_rotation(cos, sin, token % length, dim, live, HALF)
    pitch = HEADS + KV_HEADS
    rotate_rows(q, q_out, scales, gain, turn, token, tokens, q_stride, pitch, dim, live, eps, HEADS, D)
    scales += HEADS
    rotate_rows(k, k_out, scales, None, turn, token, tokens, k_stride, pitch, dim, live, eps, KV_HEADS, D)


@triton_jit
def rotate_rows_back(
    out,
    scales,
    upstream,
    gradient,
    gain,
    gain_gradient,
    turn,
    place,
    pitch,
    scale_pitch,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """The gradient of rotate_rows with respect to x, and that of the gains, summed over these tokens.

    What was normalised follows from what came out of it, turned back: cos and sin are rounded, so that they
    turn and change the length, which the last of `turn` undoes. Tokens of the gradient lie `pitch` values
    apart.
    """
    c, s, partner, shrink = turn
    token, some, dim, live = place
    for head in range(HEADS):
        line = (token[:, None] * HEADS + head) * D
        given = load_rows(upstream, line, dim, live) * c - load_rows(upstream, line, partner, live) * s
        normed = load_rows(out, line, dim, live) * c - load_rows(out, line, partner, live) * s
        normed *= shrink
        scale = tl.load(scales + token * scale_pitch + head, mask=some, other=0.0)
        if gain is not None:
            factor = load_head_gain(gain, head, True)
            normed /= factor
            scale *= factor
        along = tl.sum(given * normed, 1)
        if gain is not None:
            tl.store(gain_gradient + head, tl.sum(along, 0))
        result = (given - normed * (along / D)[:, None]) * scale[:, None]
        store_rows(gradient, token[:, None] * pitch + head * D, dim, live, result)


@triton_jit
def add_rows(one, other, total, token, pitch, dim, live, HEADS: tl.constexpr, D: tl.constexpr):
    """The sum of two or, without the other, the copy of one; tokens of the total lie `pitch` values apart."""
    for head in range(HEADS):
        line = (token[:, None] * HEADS + head) * D
        values = load_rows(one, line, dim, live)
        if other is not None:
            values += load_rows(other, line, dim, live)
        store_rows(total, token[:, None] * pitch + head * D, dim, live, values)


@triton_jit(do_not_specialize=["tokens", "length"])
def rotated_heads_backward_kernel(
    q,
    k,
    scales,
    gain,
    cos,
    sin,
    q_upstream,
    k_upstream,
    v_upstream,
    v_path_upstream,
    q_gradient,
    k_gradient,
    v_gradient,
    gain_gradients,
    tokens,
    length,
    q_pitch,
    k_pitch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of rotated_heads_kernel from its results; `gain_gradients` (programs, HEADS) are parts.

    With v_gradient, which lies like k_gradient, it receives the sum of the gradients of the values.
    """
    program = tl.program_id(0).to(tl.int64)
    token = program * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    some = token < tokens
    live = some[:, None] & (dim < D)[None, :]
    place = token, some, dim, live
    c, s, partner = load_rotation(cos, sin, token % length, dim, live, HALF)
    turn = c, s, partner, 1.0 / (c * c + s * s)
    parts = gain_gradients + program * HEADS
    both = HEADS + KV_HEADS
    rotate_rows_back(q, scales, q_upstream, q_gradient, gain, parts, turn, place, q_pitch, both, HEADS, D)
    scales += HEADS
    rotate_rows_back(k, scales, k_upstream, k_gradient, None, None, turn, place, k_pitch, both, KV_HEADS, D)
    if v_gradient is not None:
        add_rows(v_upstream, v_path_upstream, v_gradient, token, k_pitch, dim, live, KV_HEADS, D)


# Tokens of a program and warps that share it: 8 values per thread at D = 64. Not measured on a GPU.
HEAD_BLOCK = 16
HEAD_WARPS = 4
MOST_READ = 64  # channels that a gate may read in the kernel
RMS_EPS = torch.finfo(torch.float32).eps  # what F.rms_norm takes in fp32 and below


def rotated_heads_sizes(q: Tensor, k: Tensor, cos: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """(the grid, the sizes) of the kernels of rotated_heads_op."""
    tokens = q.size(0) * q.size(1)
    sizes = {
        "tokens": tokens,
        "length": q.size(1),
        "HEADS": q.size(2),
        "KV_HEADS": k.size(2),
        "D": q.size(3),
        "HALF": cos.size(-1),
        "BLOCK": HEAD_BLOCK,
        "WIDTH": triton.next_power_of_2(q.size(3)),
        "num_warps": HEAD_WARPS,
    }
    return (-(-tokens // HEAD_BLOCK),), sizes


@torch.library.custom_op(f"{OPERATORS}::rotated_heads", mutates_args=())
def rotated_heads_op(
    q: Tensor, k: Tensor, gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """rotated_heads_reference in one kernel, and the scales (B, T, H + KV) of the norms in fp32.

    The heads of a token lie side by side. Backward needs what comes out alone: no one keeps the operands.
    """
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    scales = torch.empty(*q.shape[:2], q.size(2) + k.size(2), dtype=torch.float32, device=q.device)
    grid, sizes = rotated_heads_sizes(q, k, cos)
    strides = {"q_stride": q.stride(1), "k_stride": k.stride(1)}
    rotated_heads_kernel[grid](q, k, gain, cos, sin, q_out, k_out, scales, eps=RMS_EPS, **strides, **sizes)
    return q_out, k_out, scales


@rotated_heads_op.register_fake
def _rotated_heads_fake(q, k, gain, cos, sin):
    scales = q.new_empty(q.size(0), q.size(1), q.size(2) + k.size(2), dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k), scales


@torch.library.custom_op(f"{OPERATORS}::rotated_heads_backward", mutates_args=())
def rotated_heads_backward_op(
    q: Tensor,
    k: Tensor,
    scales: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_upstream: Tensor,
    k_upstream: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q and k before the norm and of the gain (this one summed in fp32)."""
    q_gradient = torch.empty_like(q)
    k_gradient = torch.empty_like(k)
    upstreams = q_upstream, k_upstream, None, None
    gradients = q_gradient, k_gradient, None
    gain_gradient = rotated_heads_back(q, k, scales, gain, cos, sin, upstreams, gradients)
    return q_gradient, k_gradient, gain_gradient


def rotated_heads_back(
    q: Tensor,
    k: Tensor,
    scales: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    upstreams: tuple[Tensor | None, ...],
    gradients: tuple[Tensor | None, ...],
) -> Tensor:
    """Fill the `gradients` of q, k and, if there, v; the upstreams of v are two, the second may lack.

    Returns the gradient of the gain in fp32.
    """
    grid, sizes = rotated_heads_sizes(q, k, cos)
    parts = torch.empty(*grid, q.size(2), dtype=torch.float32, device=q.device)
    pitches = {"q_pitch": gradients[0].stride(1), "k_pitch": gradients[1].stride(1)}
    rotated_heads_backward_kernel[grid](
        q, k, scales, gain, cos, sin, *upstreams, *gradients, parts, **sizes, **pitches
    )
    return parts.sum(0)


@rotated_heads_backward_op.register_fake
def _rotated_heads_backward_fake(q, k, scales, gain, cos, sin, q_upstream, k_upstream):
    return torch.empty_like(q), torch.empty_like(k), gain.new_empty(gain.size(0), dtype=torch.float32)


def _rotated_heads_save(ctx, inputs, output):
    _, _, gain, cos, sin = inputs
    q, k, scales = output
    ctx.mark_non_differentiable(scales)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, scales, gain, cos, sin)


def _rotated_heads_gradients(ctx, q_upstream, k_upstream, _):
    gain = ctx.saved_tensors[3]
    q_gradient, k_gradient, gain_gradient = rotated_heads_backward_op(
        *ctx.saved_tensors, q_upstream.contiguous(), k_upstream.contiguous()
    )
    return q_gradient, k_gradient, gain_gradient.to(gain.dtype), None, None


rotated_heads_op.register_autograd(_rotated_heads_gradients, setup_context=_rotated_heads_save)


# === PROJECTION ===
# The product that makes queries, keys and values, with the norm, gain and rotation of HEADS in its epilogue,
# where a tile can hold whole heads. The plain form is F.linear and rotated_heads_reference.


@triton_jit
def rotate_tile(
    x,
    gain,
    scales,
    cos,
    sin,
    row,
    head,
    rows,
    length,
    eps,
    HEADS: tl.constexpr,
    BOTH: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whole heads of queries and keys in a tile of a product, normalised, times their gain, rotated."""
    COUNT: tl.constexpr = BLOCK_N // D
    GROUPS: tl.constexpr = D // (2 * HALF)  # of pairs of halves; the first is rotated
    token = row + tl.arange(0, BLOCK_M)
    member = head + tl.arange(0, COUNT)
    x = x.reshape(BLOCK_M, COUNT, D)
    scale = tl.rsqrt(tl.sum(x * x, 2) / D + eps)
    place = token.to(tl.int64)[:, None] * BOTH + member[None, :]
    tl.store(scales + place, scale, mask=(token < rows)[:, None])
    scale *= load_head_gain(gain, member, member < HEADS)[None, :]
    group = tl.arange(0, GROUPS)[None, :, None]
    place = (token % length)[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :] + 0 * group
    turns = (token < rows)[:, None, None] & (group == 0)
    c = tl.load(cos + place, mask=turns, other=1.0).to(tl.float32)[:, None]
    s = tl.load(sin + place, mask=turns, other=0.0).to(tl.float32)[:, None]
    x = (x * scale[:, :, None]).reshape(BLOCK_M, COUNT, GROUPS, 2, HALF).permute(0, 1, 2, 4, 3)
    first, second = x.split()
    x = tl.join(first * c + second * s, second * c - first * s)
    return x.permute(0, 1, 2, 4, 3).reshape(BLOCK_M, BLOCK_N)


@triton_jit(do_not_specialize=["rows", "length"])
def attention_inputs_kernel(
    a,
    b,
    q,
    k,
    v,
    scales,
    gain,
    cos,
    sin,
    rows,
    columns,
    depth,
    length,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """attention_inputs_op, a tile of whole heads of q, of k or of v per program."""
    BOTH: tl.constexpr = HEADS + KV_HEADS
    row, column = tile_place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    total = multiply_tile(a, b, 0, row, column, depth, False, BLOCK_M, BLOCK_N, BLOCK_K)
    if column < BOTH * D:
        turned = rotate_tile(
            total,
            gain,
            scales,
            cos,
            sin,
            row,
            column // D,
            rows,
            length,
            eps,
            HEADS,
            BOTH,
            D,
            HALF,
            BLOCK_M,
            BLOCK_N,
        )
        turned = turned.to(q.dtype).reshape(1, BLOCK_M, BLOCK_N)
        if column < HEADS * D:
            q.store([0, row, column], turned)
        else:
            k.store([0, row, column - HEADS * D], turned)
    else:
        v.store([0, row, column - BOTH * D], total.to(v.dtype).reshape(1, BLOCK_M, BLOCK_N))


def attention_inputs_width(heads: int, kv_heads: int, size: int, half: int, most: int) -> int:
    """The width of a tile of attention_inputs_kernel, at `most` so wide; 0 where it cannot serve.

    A tile holds whole heads of one kind. Sizes that are no powers of 2 have no such tiles.
    """
    powers = half > 0 and size & (size - 1) == 0 and half & (half - 1) == 0
    width = math.gcd(heads, kv_heads, most // size or 1) * size
    return width if powers and 16 <= width <= most else 0


def attention_inputs(
    x: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, scales) of attention_inputs_op by attention_inputs_kernel with tiles of this width."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:  # as in gemm
        wide = (tensor.float() for tensor in (x, weight, gain, cos, sin))
        *found, scales = attention_inputs(*wide, kv_heads, width)
        return *(tensor.bfloat16() for tensor in found), scales
    B, T, depth = x.shape
    heads = gain.size(0)
    size = weight.size(0) // (heads + 2 * kv_heads)
    q, k, v = (
        torch.empty(1, B * T, count * size, dtype=x.dtype, device=x.device)
        for count in (heads, kv_heads, kv_heads)
    )
    scales = torch.empty(B, T, heads + kv_heads, dtype=torch.float32, device=x.device)
    height, _, inner = gemm_tile("inputs", x.dtype, is_large(x.device))
    attention_inputs_kernel[(-(-B * T // height) * (weight.size(0) // width),)](
        describe_tiles(x.reshape(1, B * T, depth), height, inner),
        describe_tiles(weight[None], width, inner),
        *(describe_tiles(out, height, width) for out in (q, k, v)),
        scales,
        gain,
        cos,
        sin,
        B * T,
        weight.size(0),
        depth,
        T,
        RMS_EPS,
        heads,
        kv_heads,
        size,
        cos.size(-1),
        height,
        width,
        inner,
        **tile_options(x),
    )
    return *(out.view(B, T, -1, size) for out in (q, k, v)), scales


def empty_path(like: Tensor) -> Tensor:
    """A tensor of the shape of `like` that takes no memory, for gradients to follow."""
    return like.new_empty((1,) * like.dim()).expand(like.shape)


@torch.library.custom_op(f"{OPERATORS}::attention_inputs", mutates_args=())
def attention_inputs_op(
    x: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, a path to v, scales) of x (B, T, D), for one matrix of all three: see rotated_heads_op.

    `weight` ((H + 2 KV) D', D) has the rows of queries, keys and values. Norm, gain and rotation are done in
    the product's epilogue. In backward the gradients of all three lie side by side and are multiplied at
    once: two products for six, and none of the three results is added to another. Values that are read in
    two places have their two gradients added in the same kernel, for which the second goes through the path.
    """
    heads = gain.size(0)
    size = weight.size(0) // (heads + 2 * kv_heads)
    _, most, _ = gemm_tile("inputs", x.dtype, is_large(x.device))
    width = attention_inputs_width(heads, kv_heads, size, cos.size(-1), most)
    if width:
        q, k, v, scales = attention_inputs(x, weight, gain, cos, sin, kv_heads, width)
    else:
        rows = x.flatten(0, 1)
        turning = (heads + kv_heads) * size
        raw = (rows @ weight[:turning].T).view(*x.shape[:2], heads + kv_heads, size)
        v = (rows @ weight[turning:].T).view(*x.shape[:2], kv_heads, size)
        q, k, scales = rotated_heads_op(raw[:, :, :heads], raw[:, :, heads:], gain, cos, sin)
    return q, k, v, empty_path(v), scales


@attention_inputs_op.register_fake
def _attention_inputs_fake(x, weight, gain, cos, sin, kv_heads):
    heads = gain.size(0)
    size = weight.size(0) // (heads + 2 * kv_heads)
    q, k, v = (x.new_empty(x.size(0), x.size(1), count, size) for count in (heads, kv_heads, kv_heads))
    scales = x.new_empty(x.size(0), x.size(1), heads + kv_heads, dtype=torch.float32)
    return q, k, v, empty_path(v), scales


@torch.library.custom_op(f"{OPERATORS}::attention_inputs_backward", mutates_args=())
def attention_inputs_backward_op(
    q: Tensor,
    k: Tensor,
    scales: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_upstream: Tensor,
    k_upstream: Tensor,
    v_upstream: Tensor,
    v_path_upstream: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the product of x and weight, (tokens, rows of weight), and of the gain in fp32."""
    B, T, heads, size = q.shape
    kv_heads = k.size(2)
    gradient = q.new_empty(B, T, heads + 2 * kv_heads, size)
    parts = gradient.split((heads, kv_heads, kv_heads), 2)
    upstreams = q_upstream, k_upstream, v_upstream, v_path_upstream
    gain_gradient = rotated_heads_back(q, k, scales, gain, cos, sin, upstreams, parts)
    return gradient.view(B * T, -1), gain_gradient


@attention_inputs_backward_op.register_fake
def _attention_inputs_backward_fake(
    q, k, scales, gain, cos, sin, q_upstream, k_upstream, v_upstream, v_path_upstream
):
    width = (q.size(2) + 2 * k.size(2)) * q.size(3)
    gradient = q.new_empty(q.size(0) * q.size(1), width)
    return gradient, gain.new_empty(gain.size(0), dtype=torch.float32)


def _attention_inputs_save(ctx, inputs, output):
    x, weight, gain, cos, sin, _ = inputs
    q, k, _, _, scales = output
    ctx.mark_non_differentiable(scales)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, q, k, scales, gain, cos, sin)


def _attention_inputs_gradients(ctx, q_upstream, k_upstream, v_upstream, v_path_upstream, _):
    x, weight, *kept = ctx.saved_tensors
    gradient, gain_gradient = attention_inputs_backward_op(
        *kept,
        q_upstream.contiguous(),
        k_upstream.contiguous(),
        v_upstream.contiguous(),
        None if v_path_upstream is None else v_path_upstream.contiguous(),
    )
    x_gradient = (gradient @ weight).view(x.shape)
    weight_gradient = gradient.T @ x.flatten(0, 1) if ctx.needs_input_grad[1] else None
    return x_gradient, weight_gradient, gain_gradient.to(kept[3].dtype), None, None, None


attention_inputs_op.register_autograd(_attention_inputs_gradients, setup_context=_attention_inputs_save)


# === GATES ===
# What XSA and the gate do to the heads after attention, as one kernel each way beside its plain form; made
# like those of HEADS.


class Gate(NamedTuple):
    """How a head's gate follows from what it reads: height * sigmoid(slope * opening)."""

    height: float
    slope: float


def without_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y (B, T, H, D) less its part along the value of its own position, v (B, T, KV, D)."""
    own = F.normalize(v, dim=-1)[:, :, :, None]
    grouped = y.view(*v.shape[:3], -1, y.size(-1))
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).reshape(y.shape)


def gate_heads(y: Tensor, source: Tensor, weight: Tensor, gate: Gate) -> Tensor:
    """y (B, T, H, D), each head times a gate that `weight` (H, G) reads from `source` (B, T, G)."""
    opening = gate.height * torch.sigmoid(gate.slope * F.linear(source, weight))
    return y * opening[..., None]


def attention_output_reference(y: Tensor, v: Tensor, source: Tensor, weight: Tensor, gate: Gate) -> Tensor:
    """gate_heads of without_own_value, (B, T, H, D)."""
    return gate_heads(without_own_value(y, v), source, weight, gate)


@triton_jit
def load_own(v, line, dim, live):
    """(The value's direction, one over its length, whether this is not cut off at 1e-12) as F.normalize."""
    own = load_rows(v, line, dim, live)
    norm = tl.sqrt(tl.sum(own * own, 1))
    inverse = 1.0 / tl.maximum(norm, 1e-12)
    return own * inverse[:, None], inverse, norm > 1e-12


@triton_jit
def load_gate(weight, seen, head, channel, slope, READ: tl.constexpr):
    """(What the gate of a head reads with, the sigmoid of what it has read in `seen`)."""
    reader = tl.load(weight + head * READ + channel, mask=channel < READ, other=0.0).to(tl.float32)
    return reader, tl.sigmoid(slope * tl.sum(seen * reader[None, :], 1))


@triton_jit(do_not_specialize=["tokens"])
def attention_output_kernel(
    y,
    v,
    source,
    weight,
    out,
    tokens,
    stride,
    height,
    slope,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    READ_WIDTH: tl.constexpr,
):
    """attention_output_reference of BLOCK tokens a program; rows of `source` lie `stride` values apart."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    channel = tl.arange(0, READ_WIDTH)
    live = (token < tokens)[:, None] & (dim < D)[None, :]
    reads = (token < tokens)[:, None] & (channel < READ)[None, :]
    seen = load_rows(source, token[:, None] * stride, channel, reads)
    for kv_head in range(KV_HEADS):
        own, _, _ = load_own(v, (token[:, None] * KV_HEADS + kv_head) * D, dim, live)
        for member in tl.static_range(GROUP):
            head = kv_head * GROUP + member
            _, risen = load_gate(weight, seen, head, channel, slope, READ)
            line = (token[:, None] * KV_HEADS * GROUP + head) * D
            here = load_rows(y, line, dim, live)
            along = tl.sum(here * own, 1)
            result = (here - along[:, None] * own) * (height * risen)[:, None]
            store_rows(out, line, dim, live, result)


@triton_jit(do_not_specialize=["tokens"])
def attention_output_backward_kernel(
    y,
    v,
    source,
    weight,
    upstream,
    y_gradient,
    v_gradient,
    source_gradient,
    weight_gradients,
    tokens,
    stride,
    height,
    slope,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    READ_WIDTH: tl.constexpr,
):
    """The gradients of attention_output_kernel; `weight_gradients` (programs, H, READ) are parts of a sum.

    With u the upstream, n the direction of v, a = y n and b = gate u n, head by head:
    dy = gate u - b n, and dv = sum over the group of (2 a b n - a gate u - b y) / |v|.
    """
    program = tl.program_id(0).to(tl.int64)
    token = program * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    channel = tl.arange(0, READ_WIDTH)
    live = (token < tokens)[:, None] & (dim < D)[None, :]
    reads = (token < tokens)[:, None] & (channel < READ)[None, :]
    seen = load_rows(source, token[:, None] * stride, channel, reads)
    seen_gradient = tl.zeros((BLOCK, READ_WIDTH), dtype=tl.float32)
    for kv_head in range(KV_HEADS):
        kv_line = (token[:, None] * KV_HEADS + kv_head) * D
        own, inverse, is_unit = load_own(v, kv_line, dim, live)
        turning = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
        for member in tl.static_range(GROUP):
            head = kv_head * GROUP + member
            reader, risen = load_gate(weight, seen, head, channel, slope, READ)
            line = (token[:, None] * KV_HEADS * GROUP + head) * D
            here = load_rows(y, line, dim, live)
            given = load_rows(upstream, line, dim, live)
            a = tl.sum(here * own, 1)
            given_along = tl.sum(given * own, 1)
            gate_gradient = tl.sum(here * given, 1) - a * given_along
            opening_gradient = gate_gradient * height * slope * risen * (1.0 - risen)
            seen_gradient += opening_gradient[:, None] * reader[None, :]
            part = tl.sum(opening_gradient[:, None] * seen, 0)
            place = (program * KV_HEADS * GROUP + head) * READ + channel
            tl.store(weight_gradients + place, part, mask=channel < READ)
            given = given * (height * risen)[:, None]
            b = given_along * height * risen
            store_rows(y_gradient, line, dim, live, given - b[:, None] * own)
            straight = tl.where(is_unit, 2.0 * a * b, 0.0)
            turning += straight[:, None] * own - a[:, None] * given - b[:, None] * here
        store_rows(v_gradient, kv_line, dim, live, turning * inverse[:, None])
    store_rows(source_gradient, token[:, None] * READ, channel, reads, seen_gradient)


def attention_output_sizes(y: Tensor, v: Tensor, source: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """(the grid, the sizes) of the kernels of attention_output_op."""
    tokens = y.size(0) * y.size(1)
    sizes = {
        "tokens": tokens,
        "stride": source.stride(1),
        "KV_HEADS": v.size(2),
        "GROUP": y.size(2) // v.size(2),
        "D": y.size(3),
        "READ": source.size(2),
        "BLOCK": HEAD_BLOCK,
        "WIDTH": triton.next_power_of_2(y.size(3)),
        "READ_WIDTH": triton.next_power_of_2(source.size(2)),
        "num_warps": HEAD_WARPS,
    }
    return (-(-tokens // HEAD_BLOCK),), sizes


@torch.library.custom_op(f"{OPERATORS}::attention_output", mutates_args=())
def attention_output_op(
    y: Tensor,
    v: Tensor,
    v_path: Tensor | None,
    source: Tensor,
    weight: Tensor,
    height: float,
    slope: float,
) -> Tensor:
    """attention_output_reference in one kernel; `source` may be the first channels of wider rows.

    The gradient of v goes to `v_path` if there is one, see attention_inputs_op.
    """
    out = torch.empty_like(y)
    grid, sizes = attention_output_sizes(y, v, source)
    attention_output_kernel[grid](y, v, source, weight, out, height=height, slope=slope, **sizes)
    return out


@attention_output_op.register_fake
def _attention_output_fake(y, v, v_path, source, weight, height, slope):
    return torch.empty_like(y)


@torch.library.custom_op(f"{OPERATORS}::attention_output_backward", mutates_args=())
def attention_output_backward_op(
    y: Tensor, v: Tensor, source: Tensor, weight: Tensor, upstream: Tensor, height: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, v, source and weight (this one summed in fp32)."""
    y_gradient = torch.empty_like(y)
    v_gradient = torch.empty_like(v)
    source_gradient = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    grid, sizes = attention_output_sizes(y, v, source)
    parts = torch.empty(*grid, *weight.shape, dtype=torch.float32, device=y.device)
    attention_output_backward_kernel[grid](
        y,
        v,
        source,
        weight,
        upstream,
        y_gradient,
        v_gradient,
        source_gradient,
        parts,
        height=height,
        slope=slope,
        **sizes,
    )
    return y_gradient, v_gradient, source_gradient, parts.sum(0)


@attention_output_backward_op.register_fake
def _attention_output_backward_fake(y, v, source, weight, upstream, height, slope):
    source_gradient = source.new_empty(source.size(0), source.size(1), source.size(2))
    weight_gradient = weight.new_empty(weight.size(0), weight.size(1), dtype=torch.float32)
    return torch.empty_like(y), torch.empty_like(v), source_gradient, weight_gradient


def _attention_output_save(ctx, inputs, output):
    y, v, v_path, source, weight, height, slope = inputs
    ctx.has_path = v_path is not None
    ctx.gate = Gate(height, slope)
    ctx.save_for_backward(y, v, source, weight)


def _attention_output_gradients(ctx, upstream):
    y, v, source, weight = ctx.saved_tensors
    y_gradient, v_gradient, source_gradient, weight_gradient = attention_output_backward_op(
        y, v, source, weight, upstream.contiguous(), *ctx.gate
    )
    v_gradients = (None, v_gradient) if ctx.has_path else (v_gradient, None)
    return y_gradient, *v_gradients, source_gradient, weight_gradient.to(weight.dtype), None, None


attention_output_op.register_autograd(_attention_output_gradients, setup_context=_attention_output_save)


# === RESIDUAL ===
# The residual stream between the products of serial visits, each join as one kernel per direction. The plain
# form is in GPT: mix, merge_skip, normalise and the sums of serial. Three things make the kernels move less:
#
# * A stream is kept normalised, as the products read it, with its `size` per token: the stream itself is the
#   two multiplied, rounded no worse than in its own dtype, and is neither written nor read beside them.
# * What a join multiplies by a gain per channel it takes from somewhere: another stream, a remembered output,
#   the embedding. The gradient there is the join's own times the gain. It travels without the gain, as one
#   tensor for all of them, and who made the tensor multiplies it where it is read anyway. Such gradients take
#   a `path`: a tensor of the right shape that holds nothing.
# * The embedding enters every visit. Its gradient is summed once for all of them (spread_op).


@triton_jit
def load_gain(gain, channel, D: tl.constexpr):
    """A gain per channel in fp32, as a row."""
    return tl.load(gain + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]


@triton_jit(do_not_specialize=["tokens"])
def residual_kernel(
    normed,
    size,
    branch,
    keep,
    skip,
    share,
    embedding,
    again,
    out,
    out_size,
    source,
    whole,
    tokens,
    scale,
    eps,
    D: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The join of residual_op for BLOCK tokens a program; what takes no part is None."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    live = (token < tokens)[:, None] & (channel < D)[None, :]
    line = token[:, None] * D
    joined = tl.zeros((BLOCK, WIDTH), tl.float32)
    if normed is not None:
        lengths = tl.load(size + token, mask=token < tokens, other=0.0)
        joined += load_rows(normed, line, channel, live) * lengths[:, None]
        if whole is not None:
            joined += load_rows(branch, line, channel, live)
            store_rows(whole, line, channel, live, joined)
        if keep is not None:
            joined *= load_gain(keep, channel, D)
        if whole is None:
            joined += load_rows(branch, line, channel, live)
    if skip is not None:
        joined += load_gain(share, channel, D) * load_rows(skip, line, channel, live)
    if embedding is not None:
        joined += load_gain(again, channel, D) * load_rows(embedding, line, channel, live)
    lengths = tl.sqrt(tl.sum(joined * joined, 1) / D + eps) / scale
    result = joined / lengths[:, None]
    tl.store(out_size + token, lengths, mask=token < tokens)
    store_rows(out, line, channel, live, result)
    if READ > 0:
        store_rows(source, token[:, None] * READ, channel, live & (channel < READ)[None, :], result)


@triton_jit
def load_source(source, token, channel, live, READ: tl.constexpr):
    """Rows of the first READ channels, 0 behind these; 0 without a source."""
    rows = 0.0
    if source is not None:
        rows = load_rows(source, token[:, None] * READ, channel, live & (channel < READ)[None, :])
    return rows


@triton_jit
def store_sum(place, gain, parts, live):
    """The sum of the parts, if there is such a gain."""
    if gain is not None:
        tl.store(place, tl.sum(parts, 0), mask=live)


@triton_jit(do_not_specialize=["tokens"])
def residual_backward_kernel(
    out,
    out_size,
    out_upstream,
    path_upstream,
    source_upstream,
    after,
    keep,
    whole,
    whole_upstream,
    late,
    gradient,
    whole_gradient,
    gain_gradients,
    tokens,
    scale,
    D: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of residual_kernel; `gain_gradients` (programs, 3, D) are parts of sums."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    after_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    keep_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    late_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(program * BLOCK, tokens, tl.num_programs(0) * BLOCK):
        token = start + tl.arange(0, BLOCK)
        live = (token < tokens)[:, None] & (channel < D)[None, :]
        line = token[:, None] * D
        result = load_rows(out, line, channel, live)
        lengths = tl.load(out_size + token, mask=token < tokens, other=1.0)[:, None]
        slope = load_rows(out_upstream, line, channel, live)
        slope += load_source(source_upstream, token, channel, live, READ)
        along = tl.sum(slope * result, 1) / (D * scale * scale)
        slope = (slope - result * along[:, None]) / lengths
        if path_upstream is not None:
            straight = load_rows(path_upstream, line, channel, live)
            if after is not None:
                after_sum += straight * result * lengths
                straight *= load_gain(after, channel, D)
            slope += straight
        if gradient is not None:
            store_rows(gradient, line, channel, live, slope)
        if keep is not None:
            keep_sum += slope * load_rows(whole, line, channel, live)
            slope *= load_gain(keep, channel, D)
        if whole_upstream is not None:
            lately = load_rows(whole_upstream, line, channel, live)
            if late is not None:
                late_sum += lately * load_rows(whole, line, channel, live)
                lately *= load_gain(late, channel, D)
            slope += lately
        if whole_gradient is not None:
            store_rows(whole_gradient, line, channel, live, slope)
    place = gain_gradients + program * 3 * D + channel
    store_sum(place, after, after_sum, channel < D)
    store_sum(place + D, keep, keep_sum, channel < D)
    store_sum(place + 2 * D, late, late_sum, channel < D)


# Tokens that a program of the residual kernels holds at a time, its warps, and the most programs that sum
# gradients, four for each multiprocessor of an H100. Not measured on a GPU.
RESIDUAL_BLOCK = 4
RESIDUAL_WARPS = 4
RESIDUAL_PROGRAMS = 528


def residual_sizes(like: Tensor, read: int) -> dict[str, Any]:
    """The sizes that the residual kernels take."""
    return {
        "tokens": like.size(0) * like.size(1),
        "D": like.size(2),
        "READ": read,
        "BLOCK": RESIDUAL_BLOCK,
        "WIDTH": triton.next_power_of_2(like.size(2)),
        "num_warps": RESIDUAL_WARPS,
    }


@torch.library.custom_op(f"{OPERATORS}::residual", mutates_args=())
def residual_op(
    normed: Tensor | None = None,
    size: Tensor | None = None,
    path: Tensor | None = None,
    branch: Tensor | None = None,
    keep: Tensor | None = None,
    skip: Tensor | None = None,
    share: Tensor | None = None,
    embedding: Tensor | None = None,
    embedding_path: Tensor | None = None,
    again: Tensor | None = None,
    after: Tensor | None = None,
    late: Tensor | None = None,
    remembers: bool = False,
    read: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(normed, size, path, source, whole) of a stream that the parts join; each but the embedding may lack.

    The stream is keep * (normed * size) + branch + share * skip + again * embedding, all (B, T, D), `size`
    (B, T), gains (D,) in fp32. If it `remembers`, it is keep * whole + ... with whole = normed * size +
    branch, which is given too. Returned are the stream, normalised and times `scale`, its size, and the first
    `read` channels of it, as its gate reads them.

    Gradients of a stream (through `path`), of a skip and of the embedding come without the gains: `after` is
    the gain that the next join gives to this stream, `late` the share of `whole` in the join that remembers
    it, or None for 1. Of gains, after, late and the keep of a whole have gradients here, the others where the
    tensor was made that they multiply.
    """
    like = embedding if normed is None else normed
    out = torch.empty_like(like)
    out_size = torch.empty(like.shape[:2], dtype=torch.float32, device=like.device)
    source = like.new_empty(*like.shape[:2], read)
    whole = torch.empty_like(like) if remembers else None
    sizes = residual_sizes(like, read)
    residual_kernel[(-(-sizes["tokens"] // RESIDUAL_BLOCK),)](
        normed,
        size,
        branch,
        keep,
        skip,
        share,
        embedding,
        again,
        out,
        out_size,
        source,
        whole,
        scale=scale,
        eps=RMS_EPS,
        **sizes,
    )
    return out, out_size, empty_path(like), source, like.new_empty(0) if whole is None else whole


@residual_op.register_fake
def _residual_fake(
    normed=None,
    size=None,
    path=None,
    branch=None,
    keep=None,
    skip=None,
    share=None,
    embedding=None,
    embedding_path=None,
    again=None,
    after=None,
    late=None,
    remembers=False,
    read=0,
    scale=1.0,
):
    like = embedding if normed is None else normed
    out_size = like.new_empty(like.size(0), like.size(1), dtype=torch.float32)
    source = like.new_empty(like.size(0), like.size(1), read)
    whole = torch.empty_like(like) if remembers else like.new_empty(0)
    return torch.empty_like(like), out_size, empty_path(like), source, whole


@torch.library.custom_op(f"{OPERATORS}::residual_backward", mutates_args=())
def residual_backward_op(
    out: Tensor,
    out_size: Tensor,
    out_upstream: Tensor,
    path_upstream: Tensor | None,
    source_upstream: Tensor | None,
    after: Tensor | None,
    keep: Tensor | None,
    whole: Tensor | None,
    whole_upstream: Tensor | None,
    late: Tensor | None,
    wants: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the stream, that of `whole`, those of after, keep and late (3, D) in fp32).

    The second is empty where it is the first, the first unless it is wanted or is the second.
    """
    differs = keep is not None or whole_upstream is not None
    gradient = torch.empty_like(out) if wants or not differs else None
    whole_gradient = torch.empty_like(out) if differs else None
    sizes = residual_sizes(out, 0 if source_upstream is None else source_upstream.size(2))
    programs = min(-(-sizes["tokens"] // RESIDUAL_BLOCK), RESIDUAL_PROGRAMS)
    parts = torch.empty(programs, 3, out.size(2), dtype=torch.float32, device=out.device)
    residual_backward_kernel[(programs,)](
        out,
        out_size,
        out_upstream,
        path_upstream,
        source_upstream,
        after,
        keep,
        whole,
        whole_upstream,
        late,
        gradient,
        whole_gradient,
        parts,
        scale=scale,
        **sizes,
    )
    has_gains = after is not None or keep is not None or late is not None
    empty = out.new_empty(0)
    return (
        empty if gradient is None else gradient,
        empty if whole_gradient is None else whole_gradient,
        parts.sum(0) if has_gains else parts.new_empty(3, out.size(2)),
    )


@residual_backward_op.register_fake
def _residual_backward_fake(
    out,
    out_size,
    out_upstream,
    path_upstream,
    source_upstream,
    after,
    keep,
    whole,
    whole_upstream,
    late,
    wants,
    scale,
):
    differs = keep is not None or whole_upstream is not None
    return (
        torch.empty_like(out) if wants or not differs else out.new_empty(0),
        torch.empty_like(out) if differs else out.new_empty(0),
        out.new_empty(3, out.size(2), dtype=torch.float32),
    )


def _residual_save(ctx, inputs, output):
    normed, _, _, _, keep, skip, _, embedding, _, _, after, late, remembers, _, scale = inputs
    out, out_size, _, _, whole = output
    own_keep = keep if remembers else None
    # Whoever shares in it needs no whole for its own gradient, only the gains do.
    kept_whole = whole if own_keep is not None or late is not None else None
    ctx.continues = normed is not None
    ctx.takes = skip is not None, embedding is not None
    ctx.scale = scale
    ctx.mark_non_differentiable(out_size)
    ctx.set_materialize_grads(False)  # else what no one has read would be read as zeros
    ctx.save_for_backward(out, out_size, after, own_keep, kept_whole, late)


def _residual_gradients(ctx, out_upstream, _, path_upstream, source_upstream, whole_upstream):
    out, out_size, after, keep, whole, late = ctx.saved_tensors
    upstreams = [
        None if upstream is None else upstream.contiguous()
        for upstream in (out_upstream, path_upstream, source_upstream, whole_upstream)
    ]
    if source_upstream is not None and source_upstream.size(2) == 0:
        upstreams[2] = None
    if whole is None and whole_upstream is not None and whole_upstream.numel() == 0:
        upstreams[3] = None
    gradient, whole_gradient, gains = residual_backward_op(
        out, out_size, *upstreams[:3], after, keep, whole, upstreams[3], late, any(ctx.takes), ctx.scale
    )
    if keep is None and upstreams[3] is None:
        whole_gradient = gradient
    gain_gradients = [
        None if gain is None else gains[place].to(gain.dtype)
        for place, gain in enumerate((after, keep, late))
    ]
    after_gradient, keep_gradient, late_gradient = gain_gradients
    has_skip, has_embedding = ctx.takes
    return (
        None,
        None,
        whole_gradient if ctx.continues else None,
        whole_gradient if ctx.continues else None,
        keep_gradient,
        gradient if has_skip else None,
        None,
        None,
        gradient if has_embedding else None,
        None,
        after_gradient,
        late_gradient,
        None,
        None,
        None,
    )


residual_op.register_autograd(_residual_gradients, setup_context=_residual_save)


@triton_jit(do_not_specialize=["tokens"])
def spread_backward_kernel(
    embedding,
    again,
    upstreams,
    gradient,
    gain_gradients,
    tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of spread_op for a tile (BLOCK, WIDTH); `gain_gradients` (programs, V, D) are parts."""
    program = tl.program_id(1).to(tl.int64)
    token = program * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    live = (token < tokens)[:, None] & (channel < D)[None, :]
    line = token[:, None] * D
    given = load_rows(embedding, line, channel, live)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for visit in tl.static_range(len(upstreams)):
        upstream = load_rows(upstreams[visit], line, channel, live)
        total += upstream * load_gain(again + visit * D, channel, D)
        place = gain_gradients + (program * len(upstreams) + visit) * D + channel
        tl.store(place, tl.sum(upstream * given, 0), mask=channel < D)
    store_rows(gradient, line, channel, live, total)


# The tile of spread_backward_kernel: tall, so that the parts of its sums stay few, and so narrow that what
# all visits gave fits into registers. Neighbours in width run side by side. Not measured on a GPU.
SPREAD_BLOCK = 128
SPREAD_WIDTH = 32
SPREAD_WARPS = 8


@torch.library.custom_op(f"{OPERATORS}::spread", mutates_args=())
def spread_op(embedding: Tensor, again: Tensor) -> list[Tensor]:
    """A path for each use of the embedding (B, T, D), which multiplies it by its row of `again` (V, D)."""
    return [empty_path(embedding) for _ in range(again.size(0))]


@spread_op.register_fake
def _spread_fake(embedding, again):
    return [empty_path(embedding) for _ in range(again.size(0))]


@torch.library.custom_op(f"{OPERATORS}::spread_backward", mutates_args=())
def spread_backward_op(embedding: Tensor, again: Tensor, upstreams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of the embedding and, in fp32, of `again`, from those at its uses."""
    width = embedding.size(2)
    tokens = embedding.size(0) * embedding.size(1)
    gradient = torch.empty_like(embedding)
    programs = -(-tokens // SPREAD_BLOCK)
    parts = torch.empty(programs, *again.shape, dtype=torch.float32, device=embedding.device)
    spread_backward_kernel[(-(-width // SPREAD_WIDTH), programs)](
        embedding,
        again,
        tuple(upstreams),
        gradient,
        parts,
        tokens,
        D=width,
        BLOCK=SPREAD_BLOCK,
        WIDTH=SPREAD_WIDTH,
        num_warps=SPREAD_WARPS,
    )
    return gradient, parts.sum(0)


@spread_backward_op.register_fake
def _spread_backward_fake(embedding, again, upstreams):
    return torch.empty_like(embedding), again.new_empty(again.size(0), again.size(1), dtype=torch.float32)


def _spread_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _spread_gradients(ctx, upstreams):
    embedding, again = ctx.saved_tensors
    gradient, gains = spread_backward_op(embedding, again, [upstream.contiguous() for upstream in upstreams])
    return gradient, gains.to(again.dtype)


spread_op.register_autograd(_spread_gradients, setup_context=_spread_save)


class Stream(NamedTuple):
    """A residual stream as residual_op gives it."""

    normed: Tensor
    size: Tensor
    path: Tensor
    source: Tensor
    whole: Tensor


class Join(NamedTuple):
    """How the stream of a visit comes about from the one before, see residual_op."""

    keep: Tensor | None
    again: Tensor
    path: Tensor
    share: Tensor | None
    late: Tensor | None
    remembers: bool


# === LANES ===
# The residual streams of visits whose attention and MLP have a lane each (GPT.two_lane is the plain form),
# joined as one kernel per direction and visit; made like RESIDUAL. The MLP's lane is kept as its norm and
# its size, and has a path. That of attention is written: it goes on as it is, and only what is normalised
# contains the embedding.


@triton_jit
def place_rows(program, tokens, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(tokens, which of them live, where their rows begin, channels, what lives) of a block."""
    token = program * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    some = token < tokens
    return token, some, token[:, None] * D, channel, some[:, None] & (channel < D)[None, :]


@triton_jit
def join_lanes(x, lane, lane_size, attended, transformed, weights, place):
    """(The lane of attention, that of the MLP) before a skip is merged; without weights both are one."""
    token, some, line, channel, live = place
    first = load_rows(x, line, channel, live)
    if weights is None:
        if transformed is not None:
            first += load_rows(transformed, line, channel, live)
        second = first
    else:
        size = tl.load(lane_size + token, mask=some, other=0.0) * tl.load(weights + 3)
        second = load_rows(lane, line, channel, live) * size[:, None]
        first *= tl.load(weights)
        branch = load_rows(attended, line, channel, live)
        first += branch * tl.load(weights + 1)
        second += branch * tl.load(weights + 4)
        branch = load_rows(transformed, line, channel, live)
        first += branch * tl.load(weights + 2)
        second += branch * tl.load(weights + 5)
    return first, second


@triton_jit
def merge_rows(first, skip, through, share, place, D: tl.constexpr):
    """A lane with a skip merged into it, if there is one."""
    _, _, line, channel, live = place
    if skip is not None:
        if through is not None:
            first *= load_gain(through, channel, D)
        first += load_gain(share, channel, D) * load_rows(skip, line, channel, live)
    return first


@triton_jit
def normalise_rows(values, out, out_size, place, scale, eps, D: tl.constexpr):
    """Store rows normalised and times `scale`, and what they were divided by; returns the rows stored."""
    token, some, line, channel, live = place
    lengths = tl.sqrt(tl.sum(values * values, 1) / D + eps) / scale
    result = values / lengths[:, None]
    tl.store(out_size + token, lengths, mask=some)
    store_rows(out, line, channel, live, result)
    return result


@triton_jit
def normalise_rows_back(slope, out, out_size, place, scale, D: tl.constexpr):
    """The gradient in the values of normalise_rows, for `slope` that in its result."""
    token, some, line, channel, live = place
    result = load_rows(out, line, channel, live)
    lengths = tl.load(out_size + token, mask=some, other=1.0)
    along = tl.sum(slope * result, 1) / (D * scale * scale)
    return (slope - result * along[:, None]) / lengths[:, None]


@triton_jit(do_not_specialize=["tokens"])
def lanes_kernel(
    x,
    lane,
    lane_size,
    attended,
    transformed,
    weights,
    skip,
    through,
    share,
    embedding,
    keep,
    again,
    merged,
    out,
    out_size,
    lane_out,
    lane_out_size,
    source,
    whole,
    tokens,
    scale,
    eps,
    LATE: tl.constexpr,
    D: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The join of lanes_op for BLOCK tokens a program; what takes no part is None."""
    place = place_rows(tl.program_id(0).to(tl.int64), tokens, D, BLOCK, WIDTH)
    token, _, line, channel, live = place
    first, second = join_lanes(x, lane, lane_size, attended, transformed, weights, place)
    first = merge_rows(first, skip, through, share, place, D)
    if LATE:
        second = first
    store_rows(merged, line, channel, live, first)
    if whole is not None:
        store_rows(whole, line, channel, live, second)
    mixed = load_gain(keep, channel, D) * first
    mixed += load_gain(again, channel, D) * load_rows(embedding, line, channel, live)
    result = normalise_rows(mixed, out, out_size, place, scale, eps, D)
    if READ > 0:
        store_rows(source, token[:, None] * READ, channel, live & (channel < READ)[None, :], result)
    normalise_rows(second, lane_out, lane_out_size, place, scale, eps, D)


@triton_jit
def share_branch(branch, gradient, first, second, weights, sums, PLACE: tl.constexpr, place):
    """Store the gradient of a branch from those of the lanes; returns `sums` (8, BLOCK) with its weights'."""
    _, _, line, channel, live = place
    values = load_rows(branch, line, channel, live)
    given = first * tl.load(weights + PLACE) + second * tl.load(weights + 3 + PLACE)
    store_rows(gradient, line, channel, live, given)
    row = tl.arange(0, 8)[:, None]
    sums += tl.where(row == PLACE, tl.sum(first * values, 1)[None, :], 0.0)
    return sums + tl.where(row == 3 + PLACE, tl.sum(second * values, 1)[None, :], 0.0)


@triton_jit
def share_lanes(x, lane, lane_size, gradients, first, second, weights, sums, place):
    """As share_branch for the two lanes before, which go on in one lane each."""
    token, some, line, channel, live = place
    x_gradient, lane_gradient = gradients
    before = load_rows(x, line, channel, live)
    store_rows(x_gradient, line, channel, live, first * tl.load(weights))
    store_rows(lane_gradient, line, channel, live, second * tl.load(weights + 3))
    size = tl.load(lane_size + token, mask=some, other=0.0)
    other = load_rows(lane, line, channel, live) * size[:, None]
    row = tl.arange(0, 8)[:, None]
    sums += tl.where(row == 0, tl.sum(first * before, 1)[None, :], 0.0)
    return sums + tl.where(row == 3, tl.sum(second * other, 1)[None, :], 0.0)


@triton_jit
def merge_rows_back(
    both, first, skip, skip_gradient, through, share, through_sum, share_sum, place, D: tl.constexpr
):
    """(The gradient of merge_rows in `first`, the sums of those in its gains), `both` that in its result."""
    _, _, line, channel, live = place
    if skip is not None:
        share_sum += both * load_rows(skip, line, channel, live)
        store_rows(skip_gradient, line, channel, live, both * load_gain(share, channel, D))
        if through is not None:
            through_sum += both * first
            both *= load_gain(through, channel, D)
    return both, through_sum, share_sum


@triton_jit(do_not_specialize=["tokens"])
def lanes_backward_kernel(
    inputs,
    gains,
    results,
    upstreams,
    gradients,
    gain_gradients,
    weight_gradients,
    tokens,
    scale,
    LATE: tl.constexpr,
    D: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of lanes_kernel; those of gains (programs, 3, D) and weights (programs, 6) are parts."""
    x, lane, lane_size, attended, transformed, skip = inputs
    weights, through, share, keep = gains
    out, out_size, lane_out, lane_out_size = results
    out_upstream, source_upstream, lane_out_upstream, merged_upstream, lane_upstream = upstreams
    gradient, skip_gradient, x_gradient, lane_gradient, attended_gradient, transformed_gradient = gradients
    program = tl.program_id(0).to(tl.int64)
    keep_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    through_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    share_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    sums = tl.zeros((8, BLOCK), tl.float32)
    for block in range(program, tl.cdiv(tokens, BLOCK), tl.num_programs(0)):
        place = place_rows(block, tokens, D, BLOCK, WIDTH)
        token, _, line, channel, live = place
        first, _ = join_lanes(x, lane, lane_size, attended, transformed, weights, place)
        merged = merge_rows(first, skip, through, share, place, D)
        slope = load_rows(out_upstream, line, channel, live)
        slope += load_source(source_upstream, token, channel, live, READ)
        slope = normalise_rows_back(slope, out, out_size, place, scale, D)
        store_rows(gradient, line, channel, live, slope)
        keep_sum += slope * merged
        both = slope * load_gain(keep, channel, D) + load_rows(merged_upstream, line, channel, live)
        other = load_rows(lane_out_upstream, line, channel, live)
        other = normalise_rows_back(other, lane_out, lane_out_size, place, scale, D)
        other += load_rows(lane_upstream, line, channel, live)
        if LATE:
            both += other
        both, through_sum, share_sum = merge_rows_back(
            both, first, skip, skip_gradient, through, share, through_sum, share_sum, place, D
        )
        if weights is None:
            store_rows(x_gradient, line, channel, live, both if LATE else both + other)
        else:
            sums = share_lanes(
                x, lane, lane_size, (x_gradient, lane_gradient), both, other, weights, sums, place
            )
            sums = share_branch(attended, attended_gradient, both, other, weights, sums, 1, place)
            sums = share_branch(transformed, transformed_gradient, both, other, weights, sums, 2, place)
    channel = tl.arange(0, WIDTH)
    parts = gain_gradients + program * 3 * D + channel
    tl.store(parts, tl.sum(keep_sum, 0), mask=channel < D)
    store_sum(parts + D, through, through_sum, channel < D)
    store_sum(parts + 2 * D, share, share_sum, channel < D)
    tl.store(weight_gradients + program * 6 + tl.arange(0, 8), tl.sum(sums, 1), mask=tl.arange(0, 8) < 6)


LANES_WARPS = 8  # of the kernels here, which hold RESIDUAL_BLOCK tokens at a time. Not measured on a GPU.


@torch.library.custom_op(f"{OPERATORS}::lanes", mutates_args=())
def lanes_op(
    x: Tensor,
    lane: Tensor | None,
    lane_size: Tensor | None,
    lane_path: Tensor | None,
    attended: Tensor | None,
    transformed: Tensor | None,
    weights: Tensor | None,
    skip: Tensor | None,
    through: Tensor | None,
    share: Tensor | None,
    embedding: Tensor,
    embedding_path: Tensor,
    keep: Tensor,
    again: Tensor,
    late: bool,
    ends: bool,
    read: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(merged, normed, size, source, lane, lane size, lane path, whole) of a visit with two lanes.

    With `weights` (2, 3) in fp32 the lanes are the sums of their streams before, x and lane * lane_size, of
    attended and of transformed, all (B, T, D), times these. Without, which is where the lanes part, both are
    x + transformed. Merged is the lane of attention times `through` plus share * skip, gains (D,) in fp32.
    The branches read normed, the norm of keep * merged + again * embedding, and lane, that of the other lane,
    both times `scale`. `late`: the lanes part after the skip is merged. `ends`: the lane is given whole.

    Gradients of lane and embedding go to their paths, that of the embedding without `again`: see residual_op.
    """
    merged, normed, lane_normed = (torch.empty_like(x) for _ in range(3))
    size, out_lane_size = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    source = x.new_empty(*x.shape[:2], read)
    whole = torch.empty_like(x) if ends else None
    streams = x, lane, lane_size, attended, transformed, weights
    gains = skip, through, share, embedding, keep, again
    results = merged, normed, size, lane_normed, out_lane_size, source, whole
    sizes = residual_sizes(x, read) | {"num_warps": LANES_WARPS}
    grid = (-(-sizes["tokens"] // RESIDUAL_BLOCK),)
    lanes_kernel[grid](*streams, *gains, *results, scale=scale, eps=RMS_EPS, LATE=late, **sizes)
    whole = x.new_empty(0) if whole is None else whole
    return merged, normed, size, source, lane_normed, out_lane_size, empty_path(x), whole


@lanes_op.register_fake
def _lanes_fake(
    x,
    lane,
    lane_size,
    lane_path,
    attended,
    transformed,
    weights,
    skip,
    through,
    share,
    embedding,
    embedding_path,
    keep,
    again,
    late,
    ends,
    read,
    scale,
):
    merged, normed, lane_normed = (torch.empty_like(x) for _ in range(3))
    size, out_lane_size = (x.new_empty(x.size(0), x.size(1), dtype=torch.float32) for _ in range(2))
    source = x.new_empty(x.size(0), x.size(1), read)
    whole = torch.empty_like(x) if ends else x.new_empty(0)
    return merged, normed, size, source, lane_normed, out_lane_size, empty_path(x), whole


@torch.library.custom_op(f"{OPERATORS}::lanes_backward", mutates_args=())
def lanes_backward_op(
    inputs: list[Tensor | None],
    gains: list[Tensor | None],
    results: list[Tensor],
    upstreams: list[Tensor | None],
    late: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(Gradients of what is mixed, skip, x, lane, attended, transformed; of gains (3, D), of weights (6,)).

    What takes no part is empty; without weights the gradient of transformed is that of x.
    """
    x, skip = inputs[0], inputs[5]
    weights, source_upstream = gains[0], upstreams[1]
    wanted = True, skip is not None, True, *(weights is not None,) * 3
    gradients = tuple(torch.empty_like(x) if wants else None for wants in wanted)
    read = 0 if source_upstream is None else source_upstream.size(2)
    sizes = residual_sizes(x, read) | {"num_warps": LANES_WARPS}
    programs = min(-(-sizes["tokens"] // RESIDUAL_BLOCK), RESIDUAL_PROGRAMS)
    gain_parts = torch.empty(programs, 3, x.size(2), dtype=torch.float32, device=x.device)
    weight_parts = torch.empty(programs, 6, dtype=torch.float32, device=x.device)
    lanes_backward_kernel[(programs,)](
        tuple(inputs),
        tuple(gains),
        tuple(results),
        tuple(upstreams),
        gradients,
        gain_parts,
        weight_parts,
        scale=scale,
        LATE=late,
        **sizes,
    )
    gradients = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return *gradients, gain_parts.sum(0), weight_parts.sum(0)


@lanes_backward_op.register_fake
def _lanes_backward_fake(inputs, gains, results, upstreams, late, scale):
    x, skip, weights = inputs[0], inputs[5], gains[0]
    wanted = True, skip is not None, True, *(weights is not None,) * 3
    gradients = (torch.empty_like(x) if wants else x.new_empty(0) for wants in wanted)
    gain_gradients = x.new_empty(3, x.size(2), dtype=torch.float32)
    return *gradients, gain_gradients, x.new_empty(6, dtype=torch.float32)


def _lanes_save(ctx, inputs, output):
    x, lane, lane_size, _, attended, transformed, weights, skip, through, share, *_ = inputs
    keep, _, ctx.late, _, _, ctx.scale = inputs[12:]
    _, normed, size, _, lane_normed, out_lane_size, _, _ = output
    ctx.mark_non_differentiable(size, out_lane_size)
    ctx.set_materialize_grads(False)
    kept = x, lane, lane_size, attended, transformed, skip, weights, through, share, keep
    ctx.save_for_backward(*kept, normed, size, lane_normed, out_lane_size)


def _lanes_gradients(ctx, *upstreams):
    kept = ctx.saved_tensors
    merged, normed, _, source, lane, _, path, whole = (
        None if upstream is None or upstream.numel() == 0 else upstream.contiguous() for upstream in upstreams
    )
    given = [normed, source, lane, merged, path if whole is None else whole]
    mixed, skip, x, before, attended, transformed, gains, weights = lanes_backward_op(
        list(kept[:6]), list(kept[6:10]), list(kept[10:]), given, ctx.late, ctx.scale
    )
    continues = kept[6] is not None
    merges = kept[5] is not None
    branch = transformed if continues else x
    return (
        x,
        None,
        None,
        before if continues else None,
        attended if continues else None,
        None if kept[4] is None else branch,
        weights.view(2, 3) if continues else None,
        skip if merges else None,
        None if kept[7] is None else gains[1],
        gains[2] if merges else None,
        None,
        mixed,
        gains[0],
        None,
        None,
        None,
        None,
        None,
    )


lanes_op.register_autograd(_lanes_gradients, setup_context=_lanes_save)


# === TOPOLOGY ===
# In: the settings. Out: what the network is, as data. The route says which layer is visited when, and how its
# outputs join the residual stream; parameter_table gives each parameter's shape, initial values, optimiser
# and quantiser; MATRICES says which of them are quantised with calibration. A new parameter is a row here and
# its use in GPT; a new form of residual is a mark in the route and a method of GPT.


class Visit(NamedTuple):
    """One pass through a layer."""

    layer: int  # whose weights
    index: int  # how many visits came before
    pushes_skip: bool  # first half of the route, the U-Net's encoder: its output is remembered
    skip_row: int | None  # second half: the row of the skip parameters that first merges a remembered output
    residual: Literal["serial", "gptj", "two_lane"]  # GPT has a method of the same name for each


def loop_states(config: Config) -> tuple[int, ...]:
    """How many extra passes through the looped layers there are during training, one after the other."""
    return (0, config.num_loops) if config.num_loops else (0,)


def loops_at(config: Config, progress: float) -> int:
    """The extra passes at `progress`."""
    return config.num_loops if progress >= config.enable_looping_at else 0


def loop_spans(config: Config) -> dict[int, tuple[float, float]]:
    """The progress at which each of `loop_states` begins and ends; the last ends at 1."""
    edges = [0.0, config.enable_looping_at, 1.0] if config.num_loops else [0.0, 1.0]
    return dict(zip(loop_states(config), itertools.pairwise(edges), strict=True))


def make_route(config: Config, loops: int) -> tuple[Visit, ...]:
    """The order of layer visits; the looped layers appear `loops` times more."""
    layers = range(config.num_layers)
    loop = range(config.loop_start, config.loop_end + 1)
    order = [*layers[: loop.stop], *[*loop] * loops, *layers[loop.stop :]]
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


MUDD_VISITS = 3  # whose outputs the visits of MUDD_LAST_N read, besides the embedding
MUDD_NARROWS = 8  # the width of the stream over that of the hidden layer that weighs them: 64, as in #259


def mudd_sources(route: tuple[Visit, ...], last: int) -> list[int]:
    """The visits whose outputs the `last` ones read: evenly spread over those before, with the latest."""
    first = len(route) - last
    return [max(0, first * (place + 1) // MUDD_VISITS - 1) for place in range(MUDD_VISITS)] if last else []


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
    "bigram_rows": (("bigram.rows.weight", "bigram"),),  # looked up, see MomentTap.look_up
    "bigram_out": (("bigram.proj.weight", "bigram_out"),),
    "mudd_read": (("mudd.{}.read.weight", "mudd"),),
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
    skips = len(make_route(config, config.num_loops)) // 2
    routes = [make_route(config, loops) for loops in loop_states(config)]
    two_lanes = any(visit.residual == "two_lane" for route in routes for visit in route)

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
    return {name: spec for name, spec in table.items() if exists.get(name, True)} | lever_table(config)


def lever_table(config: Config) -> dict[str, ParameterSpec]:
    """The rows of BIGRAM_ROWS and MUDD_LAST_N, where they are on; neither changes the first losses."""
    table = {}
    if config.bigram_rows:
        # Rows of zeros: those of pairs that training never meets cost few bits.
        shape = (config.bigram_rows, config.bigram_width)
        table["bigram_rows"] = ParameterSpec(shape, nn.init.zeros_, "embed", "embed", layered=False)
        shape = (1, config.model_dim, config.bigram_width)
        table["bigram_out"] = ParameterSpec(shape, orthogonal, "muon", "attn", layered=False)
    if config.mudd_last_n:
        hidden = max(1, config.model_dim // MUDD_NARROWS)
        shape = (config.mudd_last_n, hidden, config.model_dim)
        table["mudd_read"] = ParameterSpec(shape, orthogonal, "muon", "attn", layered=False)
        shape = (config.mudd_last_n, 1 + MUDD_VISITS, hidden)
        table["mudd_write"] = ParameterSpec(shape, nn.init.zeros_, "scalar", "fp16", layered=False)
    return table


# Parameters that are factors of a product: on every visit of their layer, or once for every token.
VISIT_PRODUCTS = ("qo", "kv", "up", "down", "head_gate")
TOKEN_PRODUCTS = ("embed", "smear_w", "bigram_out", "mudd_read", "mudd_write")


def step_operations(config: Config, loops: int, tokens: int, pairs: int) -> int:
    """Floating-point operations of a forward and backward over `tokens` with so many `loops` and `pairs`.

    Two for each multiply-add of the products that the route makes, and as many again for each of the two
    gradients of a product: what torch's FlopCounterMode counts where attention keeps its scores. Elementwise
    work, what is computed twice and the optimisers do not count; the first token of a row counts as smeared.
    """
    table = parameter_table(config)
    visits = len(make_route(config, loops))
    entries = {name: math.prod(spec.shape) for name, spec in table.items()}
    by_visit = sum(entries.get(name, 0) for name in VISIT_PRODUCTS) // config.num_layers
    by_token = sum(entries.get(name, 0) for name in TOKEN_PRODUCTS)
    attention = 2 * pairs * config.model_dim  # scores, and what they weigh
    return 6 * (tokens * (visits * by_visit + by_token) + visits * attention)


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
        if parameter not in table:
            continue
        spec = table[parameter]
        banked = len(spec.shape) == 3
        layers = spec.shape[0] // len(groups) if banked else 1
        for group, (name, site) in enumerate(groups):
            for layer in range(layers):
                index = group * layers + layer if banked else None
                found.append(Matrix(name.format(layer), parameter, index, (site, layer), spec.quantizer))
    return found


# === ATTENTION ===
# In: the settings and this machine. Out: a function that computes causal attention. pick_attention tries the
# backends in order, forward and backward, and logs why not the better ones; a new one is an entry there.


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


def attend_past(q: Tensor, k: Tensor, v: Tensor, past: Past, visit: int) -> Tensor:
    """Attention of new tokens, as Attend says, over the cached keys and values of `visit` and over their own.

    Leaves those of the new tokens in `past`. The gradient ends at the cache, as in dynamic evaluation.
    """
    past.fresh_keys[visit].copy_(k.detach())
    past.fresh_values[visit].copy_(v.detach())
    B, T, H, D = q.shape
    groups = H // k.size(2)
    keys = torch.cat((past.keys[visit], k), 1).transpose(1, 2)
    values = torch.cat((past.values[visit], v), 1).transpose(1, 2)
    cached = past.keys[visit].size(1)

    place = torch.arange(cached + T, device=q.device)
    own = place - cached <= torch.arange(T, device=q.device)[:, None]
    visible = own & ((place < past.position[:, None, None]) | (place >= cached))
    # The query heads that share a head of keys stand below each other: repeating the keys would move more.
    queries = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = visible.repeat(1, groups, 1)[:, None]
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return y.unflatten(2, (groups, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def attend_varlen() -> Attend:
    """PyTorch's varlen kernel; attend_sdpa for rows that are not packed."""
    from torch.nn.attention.varlen import varlen_attn

    # Builds from January 2026 on have keyword-only options (pytorch#172238); those before take a flag and
    # want as many heads of keys as of queries.
    options = varlen_attn.__kwdefaults__ or {}
    grouped = "enable_gqa" in options
    causal = {"window_size": (-1, 0)} if options else {"is_causal": True}
    if grouped:
        causal["enable_gqa"] = True

    def attend(q, k, v, starts, longest):
        if starts is None:
            return attend_sdpa(q, k, v, None, longest)
        queries, keys, values = q.squeeze(0), k.squeeze(0), v.squeeze(0)
        if not grouped:
            copies = q.size(2) // k.size(2)
            keys, values = keys.repeat_interleave(copies, 1), values.repeat_interleave(copies, 1)
        return varlen_attn(queries, keys, values, starts, starts[:], longest, longest, **causal).unsqueeze(0)

    return attend


# The FlashAttention packages: the module of each, or its name on the kernels hub and its version there.
FLASH_MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute.interface", "fa2": "flash_attn"}
FLASH_HUB = ("kernels-community/flash-attn3", 1)


def attend_flash(backend: str) -> Attend:
    """FlashAttention by its module or from the hub ("fa3_hub"), or PyTorch's varlen kernel, as attend_sdpa.

    Raises what the package raises: ImportError if it is missing, AttributeError if it is another one, for the
    hub whatever the download does.
    """
    if backend == "varlen":
        return attend_varlen()
    if backend == "fa4":
        fa4_half("fwd")
        return attend_fa4
    if backend == "fa3_hub":
        name, version = FLASH_HUB
        library = importlib.import_module("kernels").get_kernel(name, version=version)
    else:
        library = importlib.import_module(FLASH_MODULES[backend])
    dense = library.flash_attn_func
    packed = library.flash_attn_varlen_func

    def output(result):  # some builds give the log-sum-exp as well
        return result[0] if isinstance(result, tuple) else result

    def attend(q, k, v, starts, longest):
        if starts is None:
            return output(dense(q, k, v, causal=True))
        # A view for the second: autograd functions that are given one tensor twice cannot be traced.
        edges = {"cu_seqlens_q": starts, "cu_seqlens_k": starts[:]}
        sizes = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        # Not q[0]: the gradient of a selection is written into zeros, a copy each; that of a view is one.
        rows = (tensor.squeeze(0) for tensor in (q, k, v))
        return output(packed(*rows, **edges, **sizes, causal=True)).unsqueeze(0)

    return attend


# FlashAttention-4 builds its kernels in Python while it runs, which no graph can hold: its two halves become
# operators, of which a graph knows the shapes alone. The package does not offer them to others, so a release
# may have them otherwise, which the trial shows. Read in 4.0.0b36; not run.


def fa4_half(name: Literal["fwd", "bwd"]) -> Callable:
    """FlashAttention-4's forward or backward."""
    return getattr(importlib.import_module(FLASH_MODULES["fa4"]), f"_flash_attn_{name}")


def fa4_options(starts: Tensor | None, longest: int) -> dict[str, Any]:
    """What both halves must know besides tensors."""
    if starts is None:
        return {"causal": True}
    edges = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return {"causal": True, **edges, "max_seqlen_q": longest, "max_seqlen_k": longest}


@torch.library.custom_op(f"{OPERATORS}::fa4", mutates_args=())
def fa4_op(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of FlashAttention-4 on q (B, T, H, D), or with `starts` packed (T, H, D)."""
    output, normalizers, *_ = fa4_half("fwd")(q, k, v, return_lse=True, **fa4_options(starts, longest))
    return output, normalizers


@fa4_op.register_fake
def _fa4_fake(q, k, v, starts, longest):
    rows = (q.size(0), q.size(2), q.size(1)) if starts is None else (q.size(1), q.size(0))
    return torch.empty_like(q), q.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op(f"{OPERATORS}::fa4_backward", mutates_args=())
def fa4_backward_op(
    tensors: list[Tensor], upstream: Tensor, starts: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; `tensors` are these, the output and the log-sum-exp."""
    q, k, v, output, normalizers = tensors
    gradients = fa4_half("bwd")(q, k, v, output, upstream, normalizers, **fa4_options(starts, longest))
    return gradients[0], gradients[1], gradients[2]


@fa4_backward_op.register_fake
def _fa4_backward_fake(tensors, upstream, starts, longest):
    return torch.empty_like(tensors[0]), torch.empty_like(tensors[1]), torch.empty_like(tensors[2])


def _fa4_save(ctx, inputs, output):
    q, k, v, ctx.starts, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, *output)


def _fa4_gradients(ctx, upstream, _):
    tensors = list(ctx.saved_tensors)
    return *fa4_backward_op(tensors, upstream.contiguous(), ctx.starts, ctx.longest), None, None


fa4_op.register_autograd(_fa4_gradients, setup_context=_fa4_save)


def attend_fa4(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> Tensor:
    """FlashAttention-4, as Attend says."""
    if starts is None:
        return fa4_op(q, k, v, None, 0)[0]
    return fa4_op(q[0], k[0], v[0], starts, longest)[0][None]


def wants_compile(config: Config, run: Run) -> bool:
    """Whether COMPILE asks for torch.compile on this machine."""
    return config.compile == "on" or (config.compile == "auto" and run.is_cuda)


TRIAL_TOKENS = 128  # of the trial of an attention backend: its kernels have tiles of 64 to 128


def on_products(attend: Attend, counts: tuple[int, int, int], width: int) -> Attend:
    """`attend` for q, k and v of so many heads as products give them, (B, T, heads * `width`).

    The number of heads and their width are constants then, as in the model, whatever is dynamic.
    """

    def attend_products(q, k, v, starts, longest):
        pairs = zip((q, k, v), counts, strict=True)
        heads = [tensor.unflatten(2, (count, width)) for tensor, count in pairs]
        return attend(*heads, starts, longest).flatten(2)

    return attend_products


def attention_and_gradients(attend: Attend, inputs: list[Tensor], starts: Tensor | None) -> list[Tensor]:
    """The output of `attend` on q, k and v, and the gradients of all three."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attend(*leaves, starts, TRIAL_TOKENS)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[0])]


def try_attention(attend: Attend, config: Config, run: Run) -> str:
    """Why `attend` cannot serve this run, empty if it can; raises what it raises.

    A dense and a packed batch go forward and backward and are compared with attend_sdpa in fp32: to import a
    package proves little, as FlashAttention-3 was long without a trace for torch.compile (pytorch#144540,
    flash-attention#1769), and wheels for another GPU fail at the launch. If the run is compiled, they go
    through one graph each as well, and a dense one of any length too, which documents with adapters have.
    """
    width = config.model_dim // config.num_heads
    counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    reference = on_products(attend_sdpa, counts, width)
    packed = pad_starts(np.array([0, 5, 70]), TRIAL_TOKENS).to(run.device)
    # (rows, starts, whether a graph is dynamic; None: no graph, which shows what the package itself says)
    cases = [(2, None, None), (1, packed, None)]
    if wants_compile(config, run):
        cases += [(2, None, False), (1, packed, False), (2, None, True)]
    for rows, starts, dynamic in cases:
        tried = on_products(attend, counts, width)
        if dynamic is not None:
            tried = torch.compile(tried, dynamic=dynamic, fullgraph=True)
        # A generator of its own: the random numbers that follow belong to the initial weights. Nothing
        # regular: of sines the gradient of q nearly cancels, and bfloat16 alone is 5 % off.
        generator = torch.Generator(run.device).manual_seed(1)
        inputs = []
        for count in counts:
            shape = (rows, TRIAL_TOKENS // rows, count * width)
            numbers = torch.randn(shape, generator=generator, device=run.device)
            inputs.append(numbers.to(run.dtype))
        wanted = attention_and_gradients(reference, [tensor.float() for tensor in inputs], starts)
        found = attention_and_gradients(tried, inputs, starts)
        for ours, right in zip(found, wanted, strict=True):
            close = ours.shape == right.shape and (ours.float() - right).norm() <= 0.02 * right.norm()
            if not close:
                kind = "dense" if starts is None else "packed"
                return f"gives other {kind} results than PyTorch's attention"
    return ""


BACKENDS = ("fa3", "fa3_hub", "fa4", "fa2", "varlen", "sdpa")  # the better ones first


def usable_attention(backend: str, config: Config, run: Run) -> Attend | str:
    """The backend, or why it cannot be used."""
    if backend == "sdpa":
        return attend_sdpa
    if not run.is_cuda or run.dtype != torch.bfloat16:
        return "needs a GPU and bfloat16"
    generation = torch.cuda.get_device_capability(run.device)[0]
    if backend in ("fa3", "fa3_hub") and generation != 9:
        return "needs a Hopper GPU"
    if backend == "fa4" and generation < 9:
        return "needs a Hopper or Blackwell GPU"
    try:
        attend = attend_flash(backend)
        trouble = try_attention(attend, config, run)
    except Exception as error:  # whatever a foreign package raises is a reason against it
        refuse_lost_gpu(backend, error)
        return describe_error(error)
    return trouble if trouble else attend


def refuse_lost_gpu(backend: str, error: Exception) -> None:
    """Stop if the trial of `backend`, which ended with `error`, has left a GPU that nothing else can use.

    After an illegal access CUDA refuses all that this process asks for, so no other backend can be tried.
    """
    order = ", ".join(BACKENDS)
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise Stop(
            f"ATTENTION={backend}: {describe_error(error)}, after which this process cannot use its GPU; "
            f"set ATTENTION to one after {backend} of {order}"
        ) from None


def describe_error(error: Exception) -> str:
    """An exception of a foreign package in one line of at most 160 characters."""
    lines = str(error).strip().splitlines() or [""]
    kind = "cannot be imported" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {lines[0]}"[:160]


def pick_attention(config: Config, run: Run) -> Attend:
    """The backend ATTENTION, or the first of BACKENDS that can be used; logs which and why."""
    order = {backend: functools.partial(usable_attention, backend, config, run) for backend in BACKENDS}
    return first_usable(run, "attention", "ATTENTION", config.attention, order)


# === ADAPTERS ===
# In: the sites of a forward (the products of its matrices) and an adapter or a tap. Out: `Hooks`, which the
# forward calls at every site, and `Shared`, what all visits of one forward have in common. A reader may add
# an adapter of another form: it gives each site a change of its product.


class LoRA(nn.Module):
    """Low-rank deltas x -> x A^T B^T, one per document, site and visit; the head has one visit (#1530)."""

    def __init__(self, config: Config, documents: int, device: torch.device, rank: int = 0):
        super().__init__()
        width = config.model_dim
        kv_width = config.num_kv_heads * width // config.num_heads
        rank = rank or config.ttt_lora_rank
        visits = len(make_route(config, config.num_loops))
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
    def reset(self, seed: int | None) -> None:
        """Fresh adapters: A uniform in +-1/sqrt(inputs) from `seed`, B zero, so that the delta is zero.

        Without a seed A stays as it is (#1787).
        """
        if seed is not None:
            generator = torch.Generator(self.read["head"].device).manual_seed(seed)
            for read in self.read.values():
                bound = read.size(-1) ** -0.5
                read.uniform_(-bound, bound, generator=generator)
        for write in self.write.values():
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

    def adapt(self, site: str, visit: Visit, x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
        """y plus what the site's adapter makes of x on this visit, if there is one, times `scale` (out,)."""
        if self.lora is None or site not in self.lora:
            return y
        read, write = self.lora[site][visit.index]
        if scale is not None:
            write = scale[:, None] * write
        return y + x @ read.mT @ write.mT


# The head is no layer, but its product has the same hooks: a tap sees it as layer 0, its only adapter has
# index 0. It comes after the last visit, so what is said of skips and residual means nothing here.
HEAD_VISIT = Visit(layer=0, index=0, pushes_skip=False, skip_row=None, residual="serial")


Banks = dict[str, tuple[Tensor, ...]]  # parameter -> its entries along dim 0, in the model's dtype


class Shared(NamedTuple):
    """What all visits of one forward read."""

    banks: Banks
    folded: bool  # whether the matrices before attn_scale and mlp_scale contain these, see GPT.banks
    rotation: tuple[Tensor, Tensor]
    x0: Tensor  # the embedding (B, T, D), to which every layer may return
    batch: Batch
    hooks: Hooks


# === MODEL ===
# In: an attention backend and a Batch of token ids. Out: the loss in nats of every target. One forward serves
# training, scores, calibration and test-time training: `Hooks` lets calibration look at every product and
# lets adapters add to it, and nothing else differs. A reader may change what a visit does (`GPT.serial`,
# `gptj`, `two_lane`) or how attention is finished (`GPT.attention`). Where the fused kernels run, GPT.joined
# takes the place of `serial` and joined_lanes that of `two_lane`: a change there belongs in both, and a test
# holds them together.


def leading(route: tuple[Visit, ...], residual: str) -> list[Visit]:
    """The visits of `route` before the first whose residual stream is another."""
    found = []
    for visit in route:
        if visit.residual != residual:
            break
        found.append(visit)
    return found


# Odd and below 2^31: a product with 32 bits stays an int64.
PAIR_FACTORS = (0x61C88647, 0x27D4EB2F)


def by_visit(entries: Tensor, visits: list[Visit]) -> Tensor:
    """The entry of each visit's layer, from `entries` by layer.

    Joined from slices of consecutive layers: an index would have a gradient that adds up in any order.
    """
    runs: list[list[int]] = []
    for visit in visits:
        if runs and visit.layer == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([visit.layer, visit.layer + 1])
    return torch.cat([entries[first:stop] for first, stop in runs])


def hash_pairs(pairs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(row below `rows`, sign) of each number of a token pair (int64, below 2^32), both int64.

    Pairs that share a row differ in sign half the time, so that what they teach it cancels out instead of
    adding up (modded-nanogpt #299).
    """
    mixed = pairs
    for factor in PAIR_FACTORS:
        mixed = (mixed * factor) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 15)
    return (mixed * rows) >> 32, 1 - 2 * (mixed & 1)


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
        self.loops = 0  # extra passes through the looped layers
        # Whether logits always go through a softcapped_ce function, so that one can look at them.
        self.shows_logits = False
        self.routes = {loops: make_route(config, loops) for loops in loop_states(config)}
        self.table = parameter_table(config)
        for name, spec in self.table.items():
            weight = torch.empty(spec.shape)
            spec.init(weight)
            if spec.optimizer == "embed" and not config.embed_master_fp32:
                weight = weight.to(dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.register_parameter("hash_embed", None)  # exists during test-time training alone

    @property
    def looped(self) -> bool:
        """Whether the looped layers are passed more than once."""
        return self.loops > 0

    @looped.setter
    def looped(self, value: bool) -> None:
        """NUM_LOOPS extra passes or none."""
        self.loops = self.config.num_loops if value else 0

    def forward(self, batch: Batch, tap: Tap | None = None, lora: LoRA | None = None) -> Tensor:
        """Cross-entropy in nats of every target, (B, T) fp32; with guesses (1 + G, B, T), theirs behind."""
        hooks = Hooks(tap, None if lora is None else lora.per_visit(self.dtype))
        head = self.embed.to(self.dtype)
        x = self.trunk(batch, hooks)
        targets = batch.targets.flatten()
        plain = hooks.tap is None and hooks.lora is None and batch.guesses is None and not self.shows_logits
        bounded = self.config.logit_softcap <= LARGEST_CAP and batch.mask is None
        if self.fused and plain and bounded and torch.is_grad_enabled():
            losses, _, _ = head_loss_op(x.flatten(0, 1), head, targets, self.config.logit_softcap)
            return losses.view_as(batch.targets)
        logits = self.matmul("head", head, x, HEAD_VISIT, hooks).flatten(0, 1)
        return self.losses(logits, batch)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """What `forward` gives, from the logits (B T, V) before the softcap and the mask."""
        targets = batch.targets.flatten()
        if batch.mask is not None:
            logits = refuse(logits, batch.mask)
        if self.fused:
            losses, _ = softcapped_ce_op(logits, targets, self.config.logit_softcap)
        else:
            losses = softcapped_ce_reference(logits, targets, self.config.logit_softcap)
        if batch.guesses is None:
            return losses.view_as(batch.targets)
        # Two tokens of one distribution: their losses differ as their logits do.
        ids = torch.cat((targets[None], batch.guesses.flatten(1))).T
        raw = logits.detach().gather(1, ids).float() / self.config.logit_softcap
        chosen = (self.config.logit_softcap * torch.tanh(raw)).T
        guessed = losses.detach() + chosen[0] - chosen[1:]
        return torch.cat((losses[None], guessed)).view(-1, *batch.targets.shape)

    def trunk(self, batch: Batch, hooks: Hooks) -> Tensor:
        """The normalised output of the last layer, (B, T, D): the input of the head."""
        # The kernels are for speed: there, matrices take over the scales of their outputs. Calibration looks
        # at the outputs before these scales.
        folded = self.fused and hooks.tap is None
        banks = self.banks(folded)
        shared = Shared(banks, folded, self.rotation(batch), self.embedding(batch, hooks), batch, hooks)

        x = shared.x0
        lane = None  # the residual stream of the MLP, once it has parted from that of attention
        skips = []
        route = self.routes[self.loops]
        serial, parted = self.fused_visits(route, shared)
        if serial:
            keep, again, share = self.gains(serial)
            mix = by_visit(self.resid_mix, [*serial, *parted])[len(serial) :]
            paths = spread_op(shared.x0, torch.cat((again, mix[:, 1])))
            joins = self.joins(route, serial, paths, (keep, again, share))
            x, branch, skips = self.joined(serial, joins, shared)
            if parted:
                x, lane = self.joined_lanes(parted, paths[len(serial) :], mix, (x, branch), skips, shared)
            elif branch is not None:
                x = x + branch
        streams = [shared.x0]  # what the last visits read with MUDD_LAST_N
        read = mudd_sources(route, self.config.mudd_last_n)
        for visit in route[len(serial) + len(parted) :]:
            place = visit.index - len(route) + self.config.mudd_last_n
            if place >= 0:
                x = self.connect(x, streams, place, shared)
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
            streams += [x] * read.count(visit.index)
        return rms_norm(x if lane is None else 0.5 * (x + lane))

    def banks(self, folded: bool) -> Banks:
        """The entries of every bank that layers or skips read.

        One cast and one unbind per bank: looped layers reuse them, and the backward has a node per bank, not
        per visit. If `folded`, the rows of o and down are multiplied by attn_scale and mlp_scale, which is
        the same as scaling each output. It moves less: the gradients of the scales follow from those of the
        matrices, so a visit's backward reads none of the outputs and need not scale their gradients.
        """
        others = ("embed", "qo", "kv", "smear_w", "smear_lambda", "bigram_rows", "bigram_out")
        weights = {name: getattr(self, name) for name in self.table if name not in others}
        weights["q"], weights["o"] = self.qo.chunk(2)
        weights["k"], weights["v"] = self.kv.chunk(2)
        if folded:
            weights["qkv"] = torch.cat([weights[name] for name in "qkv"], 1)
            weights["o"] = weights["o"] * self.attn_scale[:, :, None]
            weights["down"] = self.down * self.mlp_scale[:, :, None]
        return {name: weight.to(self.dtype).unbind(0) for name, weight in weights.items()}

    def connect(self, x: Tensor, streams: list[Tensor], place: int, shared: Shared) -> Tensor:
        """x and what each token takes of `streams` (B, T, D each), by shares that a small MLP reads from x.

        The channel of the residual stream of MUDD, in its form for the last visits (modded-nanogpt #259).
        """
        visit = HEAD_VISIT._replace(layer=place)
        hidden = F.gelu(
            self.matmul("mudd", shared.banks["mudd_read"][place], rms_norm(x), visit, shared.hooks)
        )
        # Scaled, so that a step of Adam moves the shares alike whatever the width.
        shares = F.linear(hidden, shared.banks["mudd_write"][place]) * hidden.size(-1) ** -0.5
        for stream, share in zip(streams, shares.unbind(-1), strict=True):
            x = x + share[..., None] * stream
        return x

    def merge_skip(self, x: Tensor, skip: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """x with a remembered output, channel by channel: through a gate between the two, or added."""
        weight = shared.banks["skip_weights"][visit.skip_row]
        if not self.config.skip_gates_enabled:
            return x + weight * skip
        gate = torch.sigmoid(shared.banks["skip_gates"][visit.skip_row])
        if shared.folded:  # the derivative of lerp reads the two as well as their difference
            return gate * x + (1 - gate) * weight * skip
        return torch.lerp(weight * skip, x, gate)

    # The three forms of residual differ in what the MLP reads and where the outputs of attention and MLP go.
    # In all of them attention reads its stream mixed with the embedding, normalised.

    def serial(self, x: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """The MLP reads what attention has written; both write to the mixed stream."""
        x = self.mix(x, visit, shared)
        normed = self.normalise(x, visit)
        x = x + self.attention(normed, self.gate_source(normed, x), visit, shared)
        return x + self.mlp(self.normalise(x, visit), visit, shared)

    # Where the kernels are used, the serial visits before all others run as one chain of residual_op, and
    # those with two lanes behind them as one of lanes_op.

    def fused_visits(self, route: tuple[Visit, ...], shared: Shared) -> tuple[list[Visit], list[Visit]]:
        """The leading serial visits and those of two lanes behind them; none if the plain form has to run."""
        gates_read_residual = self.config.head_gate != "none" and self.config.gate_attn_src == "residual"
        # MUDD reads streams that the chains do not write.
        if not shared.folded or gates_read_residual or self.config.mudd_last_n:
            return [], []
        serial = leading(route, "serial")
        return serial, leading(route[len(serial) :], "two_lane") if serial else []

    def joins(
        self,
        route: tuple[Visit, ...],
        visits: list[Visit],
        paths: list[Tensor],
        gains: tuple[Tensor, Tensor, Tensor],
    ) -> list[Join]:
        """How the streams of the leading serial visits come about, with their `gains`."""
        half = sum(visit.pushes_skip for visit in route)
        keep, again, share = gains
        joins = []
        for visit in visits:
            index = visit.index
            # What the last visit of the first half leaves is merged at once, by the gain of the stream.
            remembers = 0 < index < half
            merger = 2 * half - index
            joins.append(
                Join(
                    keep=keep[index] if index else None,
                    again=again[index],
                    path=paths[index],
                    share=share[index - half] if index > half and visit.skip_row is not None else None,
                    late=share[merger - half] if remembers and merger < len(visits) else None,
                    remembers=remembers,
                )
            )
        return joins

    def gains(self, visits: list[Visit]) -> tuple[Tensor, Tensor, Tensor]:
        """(keep, again, share) per channel of visits from the first on: (V, D), (V, D), (merging visits, D).

        With mix after merge_skip, a visit's stream is keep * x + share * skip + again * embedding.
        """
        keep, again = by_visit(self.resid_mix, visits).unbind(1)
        # The first stream is the embedding.
        again = torch.cat((again[:1] + keep[:1], again[1:]))
        merging = [visit.index for visit in visits if visit.skip_row is not None]
        if not merging:
            return keep, again, keep[:0]
        start, stop = merging[0], merging[-1] + 1
        through = keep[start:stop]
        share = through * self.skip_weights[: len(merging)]
        if self.config.skip_gates_enabled:
            gate = torch.sigmoid(self.skip_gates[: len(merging)])
            share = share * (1 - gate)
            through = through * gate
        # The first that merges finds its own stream remembered.
        keep = torch.cat((keep[:start], through[:1] + share[:1], through[1:], keep[stop:]))
        return keep, again, share

    def gate_read(self) -> int:
        """How many channels the gates read of what a join gives apart; 0 if none does."""
        width = self.config.gate_width
        compact = self.config.head_gate != "none" and self.config.gate_attn_src == "proj"
        return width if compact and width <= MOST_READ else 0

    def joined(
        self, visits: list[Visit], joins: list[Join], shared: Shared
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """(x, what is to be added to it, the outputs remembered for later) after the leading serial visits.

        As `serial` has them.
        """
        read = self.gate_read()
        carried: dict[str, Tensor] = {}
        skips: list[Tensor] = []
        for visit, join in zip(visits, joins, strict=True):
            scale = self.norm_scale(visit)
            mixed = Stream(
                *residual_op(
                    **carried,
                    keep=join.keep,
                    skip=None if join.share is None else skips.pop(),
                    share=join.share,
                    embedding=shared.x0,
                    embedding_path=join.path,
                    again=join.again,
                    late=join.late,
                    remembers=join.remembers,
                    read=read,
                    scale=scale,
                )
            )
            if join.remembers:
                skips.append(mixed.whole)
            source = mixed.source if read else self.gate_source(mixed.normed, None)
            attended = self.attention(mixed.normed, source, visit, shared)

            following = joins[visit.index + 1] if visit.index + 1 < len(joins) else None
            # A whole that is remembered has another gain there, so the MLP's output cannot contain this one.
            after = None if following is None or following.remembers else following.keep
            ends = following is None  # the plain form goes on with what is written
            written = Stream(*residual_op(*mixed[:3], attended, after=after, remembers=ends, scale=scale))
            branch = self.mlp(written.normed, visit, shared, after)
            carried = dict(zip(("normed", "size", "path", "branch"), (*written[:3], branch), strict=True))
        if visits[-1].pushes_skip:
            skips.append(written.whole + branch)
            return skips[-1], None, skips
        return written.whole, branch, skips

    def joined_lanes(
        self,
        visits: list[Visit],
        paths: list[Tensor],
        mix: Tensor,
        start: tuple[Tensor, Tensor | None],
        skips: list[Tensor],
        shared: Shared,
    ) -> tuple[Tensor, Tensor]:
        """(x, lane) after visits with two lanes, as `two_lane` has them.

        They `start` from the sum of two; `mix` (V, 2, D) are the gains of what attention reads.
        """
        read = self.gate_read()
        x, transformed = start
        lane = size = path = attended = weights = None
        for visit, embedding_path, (keep, again) in zip(visits, paths, mix.unbind(0), strict=True):
            skip = through = share = None
            if visit.skip_row is not None:
                skip = skips.pop()
                share = self.skip_weights[visit.skip_row]
            if visit.skip_row is not None and self.config.skip_gates_enabled:
                through = torch.sigmoid(self.skip_gates[visit.skip_row])
                share = share * (1 - through)
            x, normed, _, source, lane, size, path, whole = lanes_op(
                x,
                lane,
                size,
                path,
                attended,
                transformed,
                weights,
                skip,
                through,
                share,
                shared.x0,
                embedding_path,
                keep,
                again,
                late=weights is None and self.config.parallel_first_skip == "both",
                ends=visit is visits[-1],
                read=read,
                scale=self.norm_scale(visit),
            )
            source = source if read else self.gate_source(normed, None)
            attended = self.attention(normed, source, visit, shared)
            transformed = self.mlp(lane, visit, shared)
            own = self.parallel_resid_lambdas[visit.layer]
            weights = torch.cat((own[:, None], self.parallel_post_lambdas[visit.layer].T), 1)
        x, lane = (
            row[0] * stream + row[1] * attended + row[2] * transformed
            for row, stream in zip(weights, (x, whole), strict=True)
        )
        return x, lane

    def gptj(self, x: Tensor, visit: Visit, shared: Shared) -> Tensor:
        """Attention and MLP read the same, as in GPT-J; both write to the mixed stream."""
        x = self.mix(x, visit, shared)
        normed = self.normalise(x, visit)
        attended = self.attention(normed, self.gate_source(normed, x), visit, shared)
        return x + attended + self.mlp(normed, visit, shared)

    def two_lane(self, x: Tensor, lane: Tensor, visit: Visit, shared: Shared) -> tuple[Tensor, Tensor]:
        """Attention reads x mixed, the MLP `lane` as it is; both write to both, without the mix (#1529)."""
        mixed = self.mix(x, visit, shared)
        normed = self.normalise(mixed, visit)
        attended = self.attention(normed, self.gate_source(normed, mixed), visit, shared)
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
        return rms_norm(x) * self.norm_scale(visit)

    def norm_scale(self, visit: Visit) -> float:
        """What the normalised input of a layer is multiplied by."""
        return (visit.layer + 1) ** -0.5 if self.config.ln_scale else 1.0

    def gate_source(self, normed: Tensor, residual: Tensor | None) -> Tensor | None:
        """What the gates of the heads read: of the residual stream or of its norm; None: of the queries."""
        return {"residual": residual, "proj": normed, "q": None}[self.config.gate_attn_src]

    @staticmethod
    def matmul(
        site: str,
        weight: Tensor,
        x: Tensor,
        visit: Visit,
        hooks: Hooks,
        adapt: Tensor | None = None,
        adapt_scale: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, in) times weight (out, in), with its hooks; an adapter reads `adapt` if given, else x.

        `adapt_scale` (out,) scales what the adapter gives.
        """
        y = F.linear(x, weight)
        if hooks.tap is not None:
            hooks.tap(site, visit.layer, x, y)
        return hooks.adapt(site, visit, x if adapt is None else adapt, y, adapt_scale)

    def attention(self, x: Tensor, source: Tensor | None, visit: Visit, shared: Shared) -> Tensor:
        """The scaled output of attention on x (B, T, D), with gates that read `source`, see gate_source."""
        config = self.config
        banks = shared.banks
        layer = visit.layer
        B, T, _ = x.shape
        v_path = None
        if shared.folded and shared.hooks.lora is None and source is not None and shared.batch.past is None:
            gain = banks["q_gain"][layer]
            heads = attention_inputs_op(x, banks["qkv"][layer], gain, *shared.rotation, config.num_kv_heads)
            q, k, v, v_path, _ = heads
        else:
            raw = self.matmul("q", banks["q"][layer], x, visit, shared.hooks)
            k = self.matmul("k", banks["k"][layer], x, visit, shared.hooks)
            v = self.matmul("v", banks["v"][layer], x, visit, shared.hooks)
            source = raw if source is None else source
            q = raw.view(B, T, config.num_heads, -1)
            k = k.view(B, T, config.num_kv_heads, -1)
            v = v.view(B, T, config.num_kv_heads, -1)
            q, k = self.heads_for_attention(q, k, banks["q_gain"][layer], shared.rotation)
        if shared.batch.past is None:
            y = self.attend(q, k, v, shared.batch.starts, shared.batch.longest)
        else:
            y = attend_past(q, k, v, shared.batch.past, visit.index)
        y = self.finish_heads(y, v, v_path, source, layer, banks).flatten(2)

        weight = banks["o"][layer]
        scale = banks["attn_scale"][layer]
        if shared.folded:
            return self.matmul("o", weight, y, visit, shared.hooks, adapt=x, adapt_scale=scale)
        return scale * self.matmul("o", weight, y, visit, shared.hooks, adapt=x)

    def rotation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, ROPE_DIMS/2) of every position, (B T, ...) where each row has its own."""
        length = batch.inputs.size(1)
        dims = self.config.rope_dims
        base = self.config.rope_base
        if self.config.rope_yarn and dims > 2:
            # NTK: where rows are longer than in training, the slowest wave becomes longer by the same factor.
            longest = length if batch.past is None else self.config.ttt_eval_seq_len  # cached keys stay
            base = base * max(1.0, longest / self.config.train_seq_len) ** (dims / (dims - 2))
        # Angles in fp32: rounding these would cost phase.
        options = {"device": batch.inputs.device, "dtype": torch.float32}
        frequencies = base ** -(torch.arange(0, dims, 2, **options) / max(dims, 1))
        positions = torch.arange(length, **options)
        if batch.past is not None:
            positions = (positions + batch.past.position[:, None]).flatten()
        angles = torch.outer(positions, frequencies)[:, None]
        return rotation_tables_op(angles, self.dtype)

    def heads_for_attention(
        self, q: Tensor, k: Tensor, gain: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as attention compares them: see rotated_heads_reference."""
        act = rotated_heads_op if self.fused else rotated_heads_reference
        if rotation[0].size(0) == q.size(1):
            return act(q, k, gain, *rotation)[:2]
        # Rows with positions of their own are one long row with a position for every token.
        turned = act(q.flatten(0, 1)[None], k.flatten(0, 1)[None], gain, *rotation)
        return turned[0].view_as(q), turned[1].view_as(k)

    def finish_heads(
        self, y: Tensor, v: Tensor, v_path: Tensor | None, source: Tensor, layer: int, banks: Banks
    ) -> Tensor:
        """The heads y (B, T, H, D) of attention after XSA and gate, where the layer has them.

        v (B, T, KV, D) are the values; the gate reads the first channels of `source`.
        """
        config = self.config
        exclusive = layer >= config.num_layers - config.xsa_last_n
        if config.head_gate == "none":
            return without_own_value(y, v) if exclusive else y
        weight = banks["head_gate"][layer]
        source = source[..., : config.gate_width or None]
        # With the initial weights attn_out is 1.
        gate = Gate(2.0, 1.0) if config.head_gate == "attn_out" else Gate(1.0, config.sparse_attn_gate_scale)
        if not exclusive:
            return gate_heads(y, source, weight, gate)
        if self.fused and source.size(-1) <= MOST_READ:
            return attention_output_op(y.contiguous(), v, v_path, source, weight, *gate)
        return attention_output_reference(y, v, source, weight, gate)

    def mlp(self, x: Tensor, visit: Visit, shared: Shared, gain: Tensor | None = None) -> Tensor:
        """The scaled output of LeakyReLU(x up^T, 1/2)^2 down^T, in one unless calibration looks inside.

        `gain` (D,) multiplies it too, where matrices contain the scales.
        """
        hooks = shared.hooks
        up = shared.banks["up"][visit.layer]
        down = shared.banks["down"][visit.layer]
        scale = shared.banks["mlp_scale"][visit.layer]
        if gain is not None:
            gain = self.mlp_scale[visit.layer] * gain
            down = (self.down[visit.layer] * gain[:, None]).to(self.dtype)
            scale = gain.to(self.dtype)
        if shared.folded:
            return hooks.adapt("down", visit, x, self.feed_forward(x, up, down), scale)
        if hooks.tap is None:
            y = hooks.adapt("down", visit, x, self.feed_forward(x, up, down))
        else:
            hidden = F.leaky_relu(self.matmul("up", up, x, visit, hooks), 0.5).square()
            y = self.matmul("down", down, hidden, visit, hooks, adapt=x)
        return scale * y

    def embedding(self, batch: Batch, hooks: Hooks) -> Tensor:
        """The normalised token embeddings (B, T, D), with what they take from the token before."""
        ids = batch.inputs
        if batch.past is not None:
            ids = torch.cat((batch.past.previous, ids), 1)
        # Where a packed row starts a segment; the starts that are padding lie behind its end.
        opens = torch.zeros(ids.size(1) + 1, dtype=torch.bool, device=ids.device)
        if batch.starts is not None:
            opens = opens.index_fill(0, batch.starts.long(), True)
        opens = opens[:-1]

        order = self.config.smear_gate_order if self.config.smear_gate else None
        x = F.embedding(ids, self.embed.to(self.dtype))
        if order == "before_norm":
            x = self.smear(x, ids, opens, batch.past)
        x = rms_norm(x)
        if self.hash_embed is not None:
            x = x + self.hashed_pairs(ids, opens).to(x.dtype)
        if order == "after_norm":
            x = self.smear(x, ids, opens, batch.past)
        if self.config.bigram_rows:
            x = x + self.bigrams(ids, opens, batch.past, hooks)
        return x if batch.past is None else x[:, 2:].contiguous()

    def hashed_pairs(self, ids: Tensor, opens: Tensor) -> Tensor:
        """The hash embedding of each (token before, token); 0 comes before the start of a segment (#1523)."""
        previous = F.pad(ids[:, :-1], (1, 0)).masked_fill(opens, 0)
        return F.embedding((2039 * previous + ids) % self.config.hash_embed_size, self.hash_embed)

    def bigrams(self, ids: Tensor, opens: Tensor, past: Past | None, hooks: Hooks) -> Tensor:
        """What the table of token pairs adds to each position, (B, T, D): 0 where no token comes before.

        That is at the start of a row, a segment or a document; with `past` the first two positions are those
        before.
        """
        alone = F.pad(((ids == BOS) | opens)[:, 1:], (1, 0), value=True)
        if past is not None:
            third = alone[:, 2:3] | (past.position == 0)[:, None]
            alone = torch.cat((alone[:, :2], third, alone[:, 3:]), 1)
        pairs = self.config.vocab_size * F.pad(ids[:, :-1], (1, 0)) + ids
        rows, signs = hash_pairs(pairs, self.config.bigram_rows)
        found = F.embedding(rows, self.bigram_rows.to(self.dtype)) * signs[..., None].to(self.dtype)
        if hooks.tap is not None:
            hooks.tap("bigram", 0, rows.masked_fill(alone, -1), found)
        found = found.masked_fill(alone[..., None], 0)
        return self.matmul("bigram_out", self.bigram_out[0].to(self.dtype), found, HEAD_VISIT, hooks)

    def smear(self, x: Tensor, ids: Tensor, opens: Tensor, past: Past | None) -> Tensor:
        """x with a gated share of the position before (#1667); with `past` the first two are those before."""
        opening = F.linear(x[:, 1:, : self.config.gate_width or None], self.smear_w.to(x.dtype))
        share = self.smear_lambda.to(x.dtype) * torch.sigmoid(opening)
        if self.config.smear_gate_bos_fix:
            shut = ids == BOS
            if self.config.smear_gate_segment_fix:
                shut = shut | opens
            share = share.masked_fill(shut[:, 1:, None], 0)
        if past is not None:
            third = share[:, 1:2] * (past.position > 0)[:, None, None]
            share = torch.cat((share[:, :1], third, share[:, 2:]), 1)
        return torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), 1)


# === OPTIMIZERS ===
# In: the gradients of this rank's share of a batch. Out: parameters one step further, the same on every rank.
# Muon moves the banks of matrices, AdamW the embedding and everything small: a column of the parameter table
# says which. Ranks divide Muon's work bank by bank and do the rest in full each. The schedules at the end are
# functions of progress or step alone: change them freely.

# A row (a, b, c) per iteration of X <- aX + (bA + cA^2)X with A = XX^T; iterations after the last row repeat
# it. "classic" is Muon's own quintic. "polar_express" (#1787): each row is the odd quintic nearest to 1 on
# the interval where the rows before leave singular values of 1e-3 to 1, which starts at 2 % of its end at
# least; it is then shrunk by 2 % for rounding (Amsel et al., arXiv:2505.16932). The tests derive the digits.
NEWTON_SCHULZ = {
    "classic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
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
    mixture: Sequence[tuple[Tensor, float, float]] = (),
    mixed: bool = False,
) -> Tensor:
    """Nesterov momentum (updating `buffer`), row normalisation in fp32, Newton-Schulz in `dtype`.

    `momentum` is 0-d fp32: in bfloat16 0.97 would act as 0.96875, so products with it are taken in fp32.
    `mixture` are (average, decay, weight) that are updated too and, if `mixed`, take the place of the buffer:
    each with its own Nesterov step (modded-nanogpt #340, #357).
    """
    buffer.copy_(momentum * buffer.float()).add_(gradient)
    update = gradient.float() + momentum * buffer.float()
    for average, decay, _ in mixture:
        average.lerp_(gradient.to(average), 1 - decay)
    if mixed:
        parts = [
            weight * torch.lerp(gradient.float(), average.float(), decay)
            for average, decay, weight in mixture
        ]
        update = torch.stack(parts).sum(0)
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
        pairs = [pair.split(":") for pair in run.config.muon_mixture.split(",") if pair]
        self.mixture = [(float(decay), float(weight)) for decay, weight in pairs]
        self.momenta = {}
        for name, bank in self.banks.items():
            count = -(-len(bank) // run.world_size)
            shape = (count, *bank.shape[1:])
            self.momenta[name] = torch.zeros(shape, dtype=self.dtype, device=bank.device)
            # In fp32: bfloat16 would round a hundredth of itself away.
            for key in self.average_names(name):
                self.momenta[key] = torch.zeros(shape, device=bank.device)
        # The numbers of a step, filled by `set_rates`: a graph of CUDA would freeze those of the host.
        number = functools.partial(torch.zeros, (), device=run.device)
        self.momentum = number()
        self.kept = number()  # the part of a matrix that weight decay leaves
        self.rates = {self.aspect(bank): number() for bank in self.banks.values()}
        self.shards = {}  # this rank's part of each averaged gradient, from `reduce` to `step`
        self.pending = {}  # (handle, what is sent) of each reduce-scatter under way

    def average_names(self, name: str) -> list[str]:
        """What the averages of MUON_MIXTURE of a bank are called among the momenta."""
        return [f"{name}/{place}" for place in range(len(self.mixture))]

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

    @staticmethod
    def aspect(bank: nn.Parameter) -> float:
        """sqrt(max(1, R/C)) of the matrices of a bank."""
        return math.sqrt(max(1.0, bank.size(1) / bank.size(2)))

    def is_mixed(self, progress: float) -> bool:
        """Whether the averages of MUON_MIXTURE move the matrices in an update at `progress`."""
        return bool(self.mixture) and progress >= self.run.config.muon_mixture_start

    def set_rates(self, rate: float, momentum: float, decay: float) -> None:
        """The numbers of the steps to come; on the device, without waiting for it."""
        self.momentum.fill_(momentum)
        self.kept.fill_(1 - rate * decay)
        for aspect, tensor in self.rates.items():
            tensor.fill_(-rate * aspect)

    def step(self, scale: Tensor | None, mixed: bool) -> None:
        """p <- p (1 - rate*decay) - rate sqrt(max(1, R/C)) X for every bank; `scale`: of the gradients."""
        config = self.run.config
        previous = None
        for name, bank in self.banks.items():
            self.wait(name)
            shard = self.shards.pop(name)
            if scale is not None:
                shard.mul_(scale)
            averages = [self.momenta[key] for key in self.average_names(name)]
            update = self.update(
                shard,
                self.momenta[name],
                self.momentum,
                config.muon_row_normalize,
                self.dtype,
                self.coefficients,
                self.fused,
                [(average, *pair) for average, pair in zip(averages, self.mixture, strict=True)],
                mixed,
            )
            gathered = self.gather(update)
            if previous is not None:
                self.apply(*previous)
            previous = (bank, *gathered)
        self.apply(*previous)

    def gather(self, shard: Tensor) -> tuple[Tensor, Any]:
        """The shards of all ranks as one tensor, and what to wait for before reading it (one rank: None)."""
        if self.run.world_size == 1:
            return shard, None
        whole = shard.new_empty((len(shard) * self.run.world_size, *shard.shape[1:]))
        return whole, all_gather(whole, shard.contiguous(), async_op=True)

    def apply(self, bank: nn.Parameter, gathered: Tensor, handle: Any) -> None:
        """Move one bank by its gathered update."""
        if handle is not None:
            handle.wait()
        rate = self.rates[self.aspect(bank)]
        # Rounded once, like a sum with a factor (alpha) that is a number.
        bank.data.mul_(self.kept).addcmul_(gathered[: len(bank)].to(bank.dtype), rate)

    def state(self) -> dict[str, Tensor]:
        """The whole momentum of each bank, whatever the number of ranks."""
        gathered = {name: self.gather(shard) for name, shard in self.momenta.items()}
        state = {}
        for name, (whole, handle) in gathered.items():
            if handle is not None:
                handle.wait()
            state[name] = whole[: len(self.banks[name.split("/")[0]])].clone()
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take this rank's part of a `state`."""
        for name, shard in self.momenta.items():
            part = state[name][self.run.rank * len(shard) : (self.run.rank + 1) * len(shard)]
            shard.zero_()
            shard[: len(part)] = part.to(shard)


class Optimizers:
    """Muon for the banks, AdamW for the embedding and everything small, one gradient clip for all of it.

    All that a step reads and writes stays where it is, `load` copies into it, and the numbers that change are
    tensors: so a step can be recorded as a CUDA graph (`StepGraphs`). With an `average` it moves that, too.
    """

    def __init__(self, run: Run, model: GPT, compiled: bool, average: dict[str, Tensor] | None = None):
        self.run = run
        self.model = model
        self.average = average
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
        self.adam = torch.optim.AdamW(
            groups,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=run.is_cuda,
            capturable=run.is_cuda,
        )
        self.rates = [group["lr"] for group in self.adam.param_groups]
        # The fused kernel of a GPU reads an fp32; on a CPU it is a number of the host, and rounded later.
        dtype = torch.float32 if run.is_cuda else torch.float64
        for group in self.adam.param_groups:
            group["lr"] = torch.zeros((), dtype=dtype, device=run.device)
        for parameter in self.replicated:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[parameter] = {"step": torch.zeros((), device=run.device), **moments}

    def step(self, rate_scale: float, momentum: float, decay: float, progress: float = 0.0) -> None:
        """One update of all parameters from their gradients, which are freed; `decay`: of the matrices.

        `progress`: see Muon.is_mixed.
        """
        self.set_rates(rate_scale, momentum, decay)
        self.update(self.muon.is_mixed(progress))

    def set_rates(self, rate_scale: float, momentum: float, decay: float) -> None:
        """The numbers of the updates to come; on the device, without waiting for it."""
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"].fill_(rate * rate_scale)
        self.muon.set_rates(self.run.config.matrix_lr * rate_scale, momentum, decay)

    def update(self, mixed: bool) -> None:
        """The step itself: reads no number of the host that changes, and waits for no GPU."""
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

        self.adam.step()
        self.muon.step(scale, mixed)
        if self.average is not None:
            update_ema(self.average, self.model, config.ema_decay)

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
        saved = state["adam"]["state"]
        for place, parameter in enumerate(self.replicated):
            for name, tensor in self.adam.state[parameter].items():
                tensor.copy_(saved[place][name])
        self.muon.load(state["muon"])

    @torch.no_grad()
    def restart_average(self) -> None:
        """Let the average, if there is one, begin with the weights of now."""
        for name, tensor in (self.average or {}).items():
            tensor.copy_(self.model.get_parameter(name))


def blend_average(config: Config, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a finished training's checkpoint: its average, EMA_SHARE of it, the rest its last step.

    An average lags behind; modded-nanogpt #45 (track 3) and #347 blend it in parts.
    """
    average = saved["average"]
    if config.ema_share == 1:
        return average
    return {name: torch.lerp(saved["last"][name], mean, config.ema_share) for name, mean in average.items()}


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
    """Muon weight decay at `progress`: constant, then linear to WD_TAPER_FINAL_MULT of it (#1729).

    With WD_FOLLOWS_RATE times the learning-rate multiplier, as in modded-nanogpt #369.
    """
    start = config.wd_taper_start_frac
    taper = max(0.0, progress - start) / max(1 - start, 1e-9)
    decay = config.muon_wd * (1 - taper * (1 - config.wd_taper_final_mult))
    return decay * learning_rate_scale(config, progress) if config.wd_follows_rate else decay


def muon_momentum(config: Config, step: int) -> float:
    """Muon momentum at `step`: a linear ramp, then constant."""
    if config.muon_momentum_warmup_steps == 0:
        return config.muon_momentum
    ramp = min(1.0, step / config.muon_momentum_warmup_steps)
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
# With CORRECT_LEVELS, what the exponents of a parameter's step sizes grow by. Moments take inputs and
# gradients as independent: rounded alone, attention costs 0.8 to 1.2 of the KL that they predict, MLPs 1.0
# to 2.7 of it and the head, which is the embedding as well, 2.5 to 3.3 (docs/packing.md).
LEVEL_CORRECTIONS = {"qo": 3, "kv": 3, "embed": -2}
BIT_PRICE = 0.5  # how much of the price of its bits an integer pays when it is rounded, see round_matrix
GAUSSIAN_BITS = 2.05  # log2(2 pi e) / 2: a Gaussian of deviation s costs log2(s / step size) + this
# With OUTPUT_FEEDBACK, rows that are decided at once and then feed back, and rows looked at beyond them.
ROW_BLOCK = 16
ROW_PREVIEW = 8
COLUMN_BLOCK = 16  # columns that get the errors of all before them at once, while these are in the cache
COLUMN_TILE = 512  # rows of such a block that get them at once
INVERSE_BLOCK = 256  # columns that invert_upper finds at once


def parallel_map(work: Callable, jobs: Iterable, threads: int | None = None) -> list:
    """[work(job)] on as many threads as there are cores for us, or on `threads`."""
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        return list(pool.map(work, jobs))


def can_cache() -> bool:
    """Whether numba finds a place for what it compiles; a packed script has no file, HOME may be unusable."""
    try:
        numba.njit(cache=True)(can_cache)
    except RuntimeError:
        return False
    return True


HAS_CACHE = can_cache()
numba_jit = numba.njit(nogil=True, cache=HAS_CACHE)
numba_inline = numba.njit(cache=HAS_CACHE, forceinline=True)  # in a hot loop: calls would cost a fifth more


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


# The matrices of queries, keys and values multiply the same input: its moment is taken once.
SAME_INPUT = {"q": "k", "v": "k"}


@dataclass(frozen=True)
class MomentTap:
    """The tap of one calibration forward; it adds its tokens to the `sums` of every matrix.

    These are x x^T of the inputs (C, C) and g^2 of the loss gradients at the outputs (R,), or g g^T where its
    place has that shape (R, R), by (site, layer); the gradients arrive in the backward. `labels` are replaced
    by draws from the model once its head is reached, which makes g^2 the Fisher diagonal. Without `sensitive`
    the gradients and the labels stay alone.
    """

    sums: dict[tuple[str, int], tuple[Tensor, Tensor]]
    labels: Tensor
    generator: torch.Generator
    cap: float
    sensitive: bool

    def __call__(self, site: str, layer: int, x: Tensor, y: Tensor) -> None:
        inputs, outputs = self.sums[site, layer]
        if site == "bigram":
            self.look_up(inputs, outputs, x, y)
            return
        if site not in SAME_INPUT:
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
            gradient = gradient.flatten(0, -2).float()
            if outputs.dim() == 2:
                outputs.addmm_(gradient.T, gradient)
            else:
                outputs.add_(gradient.square().sum(0))

        y.register_hook(add_squares)

    def look_up(self, inputs: Tensor, outputs: Tensor, rows: Tensor, y: Tensor) -> None:
        """Add the moments of a table whose `rows` (-1: none) were looked up as y (..., C).

        An error of row r costs what E[g g^T] of the gradients of `y` says, as often as r is read: that takes
        the place of the inputs' moment, the counts that of the outputs'. Without gradients all columns are
        alike.
        """
        read = rows[rows >= 0]
        if not self.sensitive:
            inputs.diagonal().add_(len(read))
            return
        outputs.add_(torch.bincount(read, minlength=len(outputs)))

        def add_products(gradient: Tensor) -> None:
            gradient = gradient.flatten(0, -2).float()
            inputs.addmm_(gradient.T, gradient)

        y.register_hook(add_products)


def calibration_forwards(config: Config) -> tuple[int, int]:
    """How many forwards calibration takes over all ranks, and the tokens of each."""
    windows = max(1, config.train_batch_tokens // STREAMS // config.train_seq_len)  # of a micro-batch
    part = max(1, min(windows, 2**14 // config.train_seq_len))  # of a forward: the backward keeps it all
    return config.gptq_calibration_batches * windows // part, part * config.train_seq_len


def rounding_loader(config: Config, data: Dataset, tokens: int, window: int) -> ShuffledLoader:
    """Training windows for calibration and tuning, so many tokens of each stream, however the run trains."""
    changes = {"loader": "shuffled", "train_seq_schedule": "", "train_seq_len": window}
    return ShuffledLoader(dataclasses.replace(config, train_batch_tokens=STREAMS * tokens, **changes), data)


def collect_moments(
    run: Run, model: GPT, data: Dataset, forwards: int = 0
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(E[x x^T] of the inputs, E[g^2] of the loss gradients at the outputs) by (site, layer) of the matrix.

    GPTQ_CALIBRATION_BATCHES micro-batches of shuffled training windows are dealt to the ranks, whose number
    changes nothing. A looped layer counts every visit. Labels are drawn from the model, for the Fisher
    diagonal (SDClip needs none: E[g^2] is 0). With OUTPUT_FEEDBACK it is E[g g^T], but for the head, where
    it gives nothing. `forwards`: over all ranks, if not as many as that.
    """
    config = run.config
    needed, tokens = calibration_forwards(config)
    forwards = forwards or needed
    loader = rounding_loader(config, data, tokens, config.train_seq_len)
    sensitive = config.quantizer == "rate_distortion"
    parameters = {matrix.key: matrix.parameter for matrix in list_matrices(model.table)}
    sums = {}
    for key in sorted(parameters):
        rows, columns = model.get_parameter(parameters[key]).shape[-2:]
        source = SAME_INPUT.get(key[0])  # before its like in the order of the alphabet
        inputs = sums[source, key[1]][0] if source else torch.zeros(columns, columns, device=run.device)
        # Not the square of the vocabulary or of a table's rows.
        whole = config.output_feedback and sensitive and key[0] not in ("head", "bigram")
        sums[key] = inputs, torch.zeros((rows, rows) if whole else rows, device=run.device)

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

    means = {}
    for (site, layer), (inputs, outputs) in sums.items():
        source = SAME_INPUT.get(site)
        means[site, layer] = means[source, layer][0] if source else mean(inputs), mean(outputs)
    return means


class RoundingProblem(NamedTuple):
    """A matrix (R, C) ready to be rounded."""

    weight: Tensor  # fp32 (R, C)
    column_order: Tensor  # int64 (C,), in which columns are rounded: by falling diagonal of `inputs`
    feedback: Tensor  # fp32 (C, C) in that order, upper, unit diagonal: what a column's error does to others
    row_exponents: np.ndarray  # int32 (R,) of the step sizes
    column_exponents: np.ndarray  # int32 (C,), in the order of `weight`
    row_feedback: Tensor | None = None  # fp32 (R, R), what a block of rows does to later ones; None: nothing


def rounding_problem(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    damping: float,
    powers: tuple[float, float, float],
    output_damping: float = 0.0,
) -> RoundingProblem:
    """The problem of rounding `weight` (R, C) with E[x x^T] of `inputs` (C, C) and E[g^2] of `outputs` (R,).

    An error E of the weights costs sum_r outputs_r E_r H E_r^T, where H is `inputs` with `damping` times its
    mean diagonal added. With H = R R^T, R upper, and U = R^-1, an error e of column j costs (e / U_jj)^2 once
    the later columns have made up for it: GPTQ adds -e U_jk / U_jj to column k. Reverse water-filling wants
    the same distortion everywhere, so step sizes follow outputs_r^(-1/2) U_jj, to the `powers`: the first is
    for the geometric means of whole matrices, the others for rows and for columns within. `outputs` (R, R)
    are E[g g^T], see `feed_rows`; `output_damping` is added to them like `damping` to the inputs.
    torch.linalg.LinAlgError: H, or E[g g^T], is not positive definite.
    """
    inputs = inputs.double().cpu().clone()
    outputs, row_feedback = feed_rows(outputs.cpu(), output_damping)
    weight = weight.float().cpu() * (inputs.diagonal() > 0)  # a column whose input is always 0 costs no bits
    inputs.diagonal().add_(damping * inputs.diagonal().mean().clamp_min(1e-30))
    order = torch.argsort(inputs.diagonal(), descending=True, stable=True)

    _, inverse = upper_root(inputs[order][:, order])
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
        row_feedback,
    )


def correct_level(problem: RoundingProblem, parameter: str) -> RoundingProblem:
    """The `problem` of a matrix of `parameter` with step sizes corrected by LEVEL_CORRECTIONS."""
    exponents = problem.row_exponents + np.int32(LEVEL_CORRECTIONS.get(parameter, 0))
    return problem._replace(row_exponents=exponents)


def upper_root(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(R, R^-1) with moments = R R^T and R upper triangular; LinAlgError: not positive definite."""
    # A Cholesky factor from the last column on: that of the matrix turned by 180 degrees, turned back.
    root = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)
    return root, invert_upper(root)


def invert_upper(matrix: Tensor) -> Tensor:
    """The inverse (R, R) of an upper triangular `matrix`, by blocks of columns.

    torch has no triangular inverse, and its solver takes the zeros of the right side for numbers: that is
    three times the work.
    """
    inverse = torch.zeros(matrix.shape, dtype=matrix.dtype)
    for first in range(0, len(matrix), INVERSE_BLOCK):
        block = slice(first, first + INVERSE_BLOCK)
        corner = matrix[block, block]
        identity = torch.eye(len(corner), dtype=matrix.dtype)
        inverse[block, block] = torch.linalg.solve_triangular(corner, identity, upper=True)
        above = matrix[:first, block] @ inverse[block, block]
        for row in range(0, first, INVERSE_BLOCK):
            rows = slice(row, row + INVERSE_BLOCK)
            inverse[rows, block] = -inverse[rows, row:first] @ above[row:]
    return inverse


def feed_rows(outputs: Tensor, damping: float) -> tuple[Tensor, Tensor | None]:
    """(cost of a squared error by row (R,), what a block of rows does to later rows (R, R)) of `outputs`.

    `damping` times their mean is added first: what was calibrated says little of errors as large as those at
    low rates, above all in rows that hardly matter, which would get the largest.

    With G = E[g g^T] an error E costs tr(E^T G E H): YAQA's objective (arXiv 2505.22988). With G = S S^T, S
    upper, and S_b the square of S on block b of ROW_BLOCK rows, E = F^T N (the columns' feedback) for F =
    diag(S_b) S^-1, which is 1 on every block, and the rounding errors N cost sum_b N_b^T S_b S_b^T N_b. Of
    these products the diagonal is counted: a trellis cannot wait for single rows. `outputs` (R,): nothing is
    fed back. In fp32, for half the time: dampened moments are far from singular.
    """
    if outputs.dim() == 1:
        outputs = outputs.double()
        return outputs + damping * outputs.mean(), None
    outputs = outputs.float().clone()
    outputs.diagonal().add_(damping * outputs.diagonal().mean().clamp_min(1e-30))
    root, inverse = upper_root(outputs)
    costs = torch.empty(len(root))
    for first in range(0, len(root), ROW_BLOCK):
        block = slice(first, first + ROW_BLOCK)
        costs[block] = root[block, block].square().sum(1)
        inverse[block] = root[block, block] @ inverse[block]
    return costs.double(), inverse


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
def viterbi(goals, prices, before, start=0):
    """Integers m (R,) on a trellis path from `start` with least sum of price (goal - m)^2, both fp32 (R,).

    A branch fixes m modulo 4 (2 bit + parity of the state), and the nearest such integer is the best. Into
    every state lead two branches, one with each bit: the cheaper one is kept, and at the end the choices are
    followed back.
    """
    rows = len(goals)
    states = before.shape[1]
    choices = np.empty((rows, states), np.uint8)
    branch = np.empty(4, np.float32)  # cost of a branch by m modulo 4
    cost = np.full(states, 1e30, np.float32)  # of the best path that ends in a state
    cost[start] = 0
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
def subtract_products(target, factors, rows, first):
    """Take factors (K,) times the columns of `rows` (K, first + N) from `first` on from target (N,).

    Term after term, eight in each pass over it. The bits are those of a pass for each term, which waits for
    memory: so two-sided rounding took twice as long. Every row is an array of one dimension, which is what
    the compiler makes vectors of.
    """
    count = len(factors)
    whole = count - count % 8
    for k in range(0, whole, 8):
        f0, f1, f2, f3, f4, f5, f6, f7 = (
            factors[k],
            factors[k + 1],
            factors[k + 2],
            factors[k + 3],
            factors[k + 4],
            factors[k + 5],
            factors[k + 6],
            factors[k + 7],
        )
        r0, r1, r2, r3, r4, r5, r6, r7 = (
            rows[k][first:],
            rows[k + 1][first:],
            rows[k + 2][first:],
            rows[k + 3][first:],
            rows[k + 4][first:],
            rows[k + 5][first:],
            rows[k + 6][first:],
            rows[k + 7][first:],
        )
        for n in range(len(target)):
            rest = target[n]
            rest -= f0 * r0[n]
            rest -= f1 * r1[n]
            rest -= f2 * r2[n]
            rest -= f3 * r3[n]
            rest -= f4 * r4[n]
            rest -= f5 * r5[n]
            rest -= f6 * r6[n]
            rest -= f7 * r7[n]
            target[n] = rest
    for k in range(whole, count):
        row = rows[k][first:]
        for n in range(len(target)):
            target[n] -= factors[k] * row[n]


@numba_jit
def subtract_from_columns(w, first, factors, rows):
    """Take factors (K, J) times `rows` (K, R) from the columns w (J, R), but not before row `first`."""
    turned = np.ascontiguousarray(factors.T)
    for start in range(first, w.shape[1], COLUMN_TILE):
        end = min(start + COLUMN_TILE, w.shape[1])
        for k in range(0, len(rows), ROW_BLOCK):
            for j in range(len(w)):
                part = turned[j][k : k + ROW_BLOCK]
                subtract_products(w[j][start:end], part, rows[k : k + ROW_BLOCK], start)


@numba_jit
def round_block(w, taken, step_size, prices, after, before, state, integers, errors):
    """Decide the integers (K,) of a block of a column w (>= K,); returns the state of the trellis behind it.

    The trellis looks at all of w, which ends beyond the block. The error stays in w; `errors` (K,) have
    `taken` (K,) added, what the errors of earlier columns have taken: later rows make up for both.
    """
    goals = w / (step_size * prices)
    if before.shape[1]:
        found = viterbi(goals, prices, before, state)
    else:
        found = np.rint(goals).astype(np.int32)
    for row in range(len(integers)):
        integer = found[row]
        integers[row] = integer
        state = np.int64(after[state, integer >> 1 & 1])
        w[row] -= integer * step_size[row]
        errors[row] = w[row] + taken[row]
    return state


@numba_jit
def round_both_ways(w, taken, step_size, prices, feedback, row_feedback, after, before, integers):
    """Round a block of columns w (J, R) whose errors go to later columns and to later rows, and stay in w.

    `taken` (J, R) is what the errors of the columns before the block have taken from it. Column j is always a
    block of rows behind column j - 1, whose errors are known as far as it looks. So all columns are within
    `reach` rows, to which errors go at once; to the rows beyond they go when the last column is there, which
    reads the large `row_feedback` (R, R) once for all columns.
    """
    columns, rows = w.shape
    blocks = -(-rows // ROW_BLOCK)
    reach = ROW_BLOCK * columns + ROW_PREVIEW
    errors = np.empty((rows, columns), np.float32)
    states = np.zeros(columns, np.int64)
    for step in range(blocks + columns - 1):
        for j in range(max(0, step - blocks + 1), min(step + 1, columns)):
            first = ROW_BLOCK * (step - j)
            end = min(first + ROW_BLOCK, rows)
            seen = min(end + ROW_PREVIEW, rows)
            fresh = min(first + ROW_PREVIEW, rows) if first else 0  # looked at for the first time
            taken[j][fresh:seen] += w[j][fresh:seen]
            subtract_products(w[j][fresh:seen], feedback[:j, j], w[:j], fresh)
            taken[j][fresh:seen] -= w[j][fresh:seen]
            states[j] = round_block(
                w[j][first:seen],
                taken[j][first:end],
                step_size[j][first:seen],
                prices[j][first:seen],
                after,
                before,
                states[j],
                integers[j][first:end],
                errors[first:end, j],
            )
            near = min(end + reach, rows)
            subtract_products(w[j][end:near], errors[first:end, j], row_feedback[first:end], end)
        first = ROW_BLOCK * (step - columns + 1)
        far = first + ROW_BLOCK + reach
        if first >= 0 and far < rows:
            last = first + ROW_BLOCK
            subtract_from_columns(w, far, errors[first:last], row_feedback[first:last])


@numba_jit
def round_one_way(w, step_size, prices, feedback, before, largest, integers):
    """Round a block of columns w (J, R) whose errors go to later columns and stay in w."""
    for j in range(len(w)):
        subtract_products(w[j], feedback[:j, j], w[:j], 0)
        goals = w[j] / (step_size[j] * prices[j])
        if before.shape[1]:
            integers[j] = viterbi(goals, prices[j], before)
        else:
            integers[j] = np.minimum(np.maximum(np.rint(goals), -largest), largest)
        w[j] -= integers[j] * step_size[j]


@numba_jit
def round_columns(w, step_size, feedback, row_feedback, bit_prices, after, before, largest):
    """Integers (C, R) of the columns w (C, R) in turn; the error of each goes to later ones and stays in w.

    With s the step size and p the price of an integer's square (R,), a column minimises (w/s - m)^2 + p s^2
    m^2, which is g (w/(s g) - m)^2 and a constant for g = 1 + p s^2. No BLAS: its sums depend on the number
    of threads.
    """
    integers = np.empty(w.shape, np.int32)
    for first in range(0, len(w), COLUMN_BLOCK):
        end = min(first + COLUMN_BLOCK, len(w))
        block = w[first:end]
        given = block.copy()
        subtract_from_columns(block, 0, feedback[:first, first:end], w[:first])
        sizes = step_size[first:end]
        g = np.float32(1) + bit_prices * sizes * sizes
        within = feedback[first:end, first:end]
        found = integers[first:end]
        if len(row_feedback):
            round_both_ways(block, given - block, sizes, g, within, row_feedback, after, before, found)
        else:
            round_one_way(block, sizes, g, within, before, largest, found)
    return integers


def round_matrix(
    problem: RoundingProblem,
    step_size: np.ndarray,
    states: int,
    bit_price: float = 0.0,
    largest: int = 1 << 30,
) -> np.ndarray:
    """Integers int32 (R, C) so that integers * step_size, fp32 (R, C), has little error under the inputs.

    Column by column, the error of one goes to those not yet rounded (GPTQ), and with `row_feedback` to later
    rows as well. `bit_price` is how much of the
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
    after, before = trellis(states)
    row_feedback = (
        np.empty((0, 0), np.float32) if problem.row_feedback is None else problem.row_feedback.numpy()
    )
    integers[order] = round_columns(
        w, step_size, problem.feedback.numpy(), row_feedback, bit_prices, after, before, largest
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
        return Quantized(torch.from_numpy(integers), scales, torch.tensor([delta], dtype=torch.float32))

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


class Fit(NamedTuple):
    """How exactly a file is fitted to its size."""

    tolerance: float  # what it may lack, as a part of the size
    trials: int  # after so many it may lack 5 %


EXACT_FIT = Fit(5e-4, 8)
# Where rounding is a part of the training budget: a trial costs more steps than half a per cent of the bytes
# is worth.
QUICK_FIT = Fit(1e-2, 3)
# What feedback across rows makes of a file at the same delta (1.010 at 2.25 bits a weight, 1.011 at 2.75).
# Rounding without it can take a sample of the rows, which finds the delta to begin with in an eighth of the
# time.
ROW_FEEDBACK_GROWTH = 1.01
SAMPLED_ROWS = 4  # every fourth


def fit_delta(
    delta: float,
    goal: float,
    slope: float,
    size_of: Callable[[float], int],
    log: Callable,
    fit: Fit = EXACT_FIT,
) -> float:
    """The delta for which `size_of(delta)` bytes lie below `goal` by at most `fit.tolerance`, or the best.

    A secant in x = log2(delta) from `delta` on, aimed at the middle of the tolerance. `slope` is about how
    many bytes fewer an octave makes; a secant may halve or double it at most. Every trial goes to `log`.
    """
    x = math.log2(delta)
    sizes: dict[float, int] = {}
    for trial in range(1, EXACT_FIT.trials + 1):
        sizes[x] = size_of(2.0**x)
        log(f"size: delta 2^{x:.5f} gives {sizes[x]} bytes, {100 * (sizes[x] / goal - 1):+.3f}% of the goal")
        lacking = goal - max((size for size in sizes.values() if size <= goal), default=0)
        if lacking <= (0.05 if trial >= fit.trials else fit.tolerance) * goal:
            break
        if len(sizes) > 1:
            before = list(sizes)[-2]
            secant = (sizes[before] - sizes[x]) / (x - before)
            slope = min(max(secant, slope / 2), slope * 2)
        x += (sizes[x] - goal * (1 - fit.tolerance / 2)) / slope
    fitting = [exponent for exponent, size in sizes.items() if size <= goal]
    return 2.0 ** min(fitting, default=max(sizes))


def matrix_weight(weights: dict[str, Tensor], matrix: Matrix) -> Tensor:
    """The weight (R, C) of `matrix`, a view of its bank or the parameter itself."""
    weight = weights[matrix.parameter]
    return weight if matrix.index is None else weight[matrix.index]


def fp16_tensors(table: dict[str, ParameterSpec], weights: dict[str, Tensor]) -> dict[str, Quantized]:
    """What the artifact holds in fp16, by name."""
    return {
        name: Quantized(weights[name].half().cpu())
        for name, spec in table.items()
        if spec.quantizer == "fp16"
    }


def pose_problems(
    config: Config,
    table: dict[str, ParameterSpec],
    weights: dict[str, Tensor],
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
    powers: tuple[float, float, float],
    only: Iterable[str] = (),
) -> dict[str, RoundingProblem]:
    """The rounding problem of every matrix, in table order, or of those in the parameters `only`.

    Stop if `moments` are not positive definite.
    """
    matrices = [matrix for matrix in list_matrices(table) if not only or matrix.parameter in only]

    def pose(matrix: Matrix) -> RoundingProblem:
        weight = matrix_weight(weights, matrix)
        # Not that of the head: the probabilities of tokens differ, and are known.
        outputs = config.output_dampening if matrix.quantizer != "embed" else 0.0
        problem = rounding_problem(weight, *moments[matrix.key], config.gptq_dampening, powers, outputs)
        return correct_level(problem, matrix.parameter) if config.correct_levels else problem

    try:
        posed = parallel_map(pose, matrices)
    except torch.linalg.LinAlgError:
        raise Stop(
            f"GPTQ_DAMPENING={config.gptq_dampening}: the second moments of a matrix's inputs or outputs are "
            "not positive definite; raise it or GPTQ_CALIBRATION_BATCHES"
        ) from None
    return {matrix.name: problem for matrix, problem in zip(matrices, posed, strict=True)}


def clip_matrices(
    config: Config, table: dict[str, ParameterSpec], problems: dict[str, RoundingProblem]
) -> dict[str, Quantized]:
    """Every matrix by SDClip."""

    def clip(matrix: Matrix) -> Quantized:
        return round_clipped(problems[matrix.name], *clip_and_bits(config, matrix.quantizer))

    return dict(zip(problems, parallel_map(clip, list_matrices(table)), strict=True))


def estimate_size(
    config: Config,
    problems: dict[str, RoundingProblem],
    small: dict[str, Quantized],
    looped: bool,
    delta: float,
) -> int:
    """About how many bytes the artifact has with `delta`, rounded without feedback across rows.

    A sample of the rows is rounded; those left out are taken to cost as much as these but for the first.
    """
    sample = {
        name: problem._replace(
            weight=problem.weight[::SAMPLED_ROWS],
            row_exponents=problem.row_exponents[::SAMPLED_ROWS],
            row_feedback=None,
        )
        for name, problem in problems.items()
    }
    rounded = round_matrices(sample, delta, config.trellis_states, BIT_PRICE)
    for name, problem in problems.items():
        exponents = np.append(problem.row_exponents, problem.column_exponents)
        rounded[name] = rounded[name]._replace(scales=torch.from_numpy(exponents))
    first_rows = {name: tensor._replace(values=tensor.values[:1]) for name, tensor in rounded.items()}
    fixed = len(encode_artifact(config, first_rows | small, looped))
    later_rows = len(encode_artifact(config, rounded | small, looped)) - fixed
    counted = sum(tensor.values[1:].numel() for tensor in rounded.values())
    wanted = sum(problem.weight[1:].numel() for problem in problems.values())
    return fixed + later_rows * wanted // max(1, counted)


def quantize(
    run: Run,
    table: dict[str, ParameterSpec],
    weights: dict[str, Tensor],
    goal: int,
    looped: bool,
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
) -> dict[str, Quantized]:
    """All `weights` as the artifact holds them, by flat name: matrices in table order, then fp16 tensors.

    rate_distortion makes a file of `goal` bytes, and where its fp16 tensors are to be tuned, one that stays
    below whatever becomes of them. Rank 0 only: the matrices are spread over its threads. Stop if the
    `moments` of a matrix are not positive definite.
    """
    config = run.config
    small = fp16_tensors(table, weights)
    powers = SENSITIVITY_POWERS if config.quantizer == "rate_distortion" else (0.0, 0.0, 0.0)
    problems = pose_problems(config, table, weights, moments, powers)
    if config.quantizer == "sdclip":
        return clip_matrices(config, table, problems) | small

    trials: dict[float, dict[str, Quantized]] = {}
    growth = fp16_growth(config, small) if config.tune_steps else 0

    def size_of(delta: float) -> int:
        trials[delta] = round_matrices(problems, delta, config.trellis_states, BIT_PRICE) | small
        return len(encode_artifact(config, trials[delta], looped)) + growth

    count = sum(problem.weight.numel() for problem in problems.values())
    goal = min(goal, count)  # 8 bits a weight: finer would be waste
    delta = guess_delta(problems, goal, config.trellis_states)
    if config.output_feedback:

        def estimate(delta: float) -> int:
            return growth + estimate_size(config, problems, small, looped, delta)

        delta = fit_delta(delta, goal / ROW_FEEDBACK_GROWTH, count / 8, estimate, run.log, QUICK_FIT)
    fit = QUICK_FIT if config.tune_steps else EXACT_FIT
    return trials[fit_delta(delta, goal, count / 8, size_of, run.log, fit)]


def round_group(
    run: Run,
    model: GPT,
    goal: int,
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
    tensors: dict[str, Quantized],
    group: Sequence[str],
) -> None:
    """Round the matrices in the parameters `group` of the `model`, in place in `tensors`. Rank 0 only.

    With the delta of `tensors`; but the last group gets one of its own that makes a file of `goal` bytes.
    """
    config = run.config
    weights = {name: model.get_parameter(name).detach() for name in group}
    problems = pose_problems(config, model.table, weights, moments, SENSITIVITY_POWERS, group)
    small = {name: tensor for name, tensor in tensors.items() if tensor.scales is None}
    growth = fp16_growth(config, small)

    trials: dict[float, dict[str, Quantized]] = {}

    def round_at(delta: float) -> dict[str, Quantized]:
        return round_matrices(problems, delta, config.trellis_states, BIT_PRICE)

    def size_of(delta: float) -> int:
        trials[delta] = round_at(delta)
        return len(encode_artifact(config, tensors | trials[delta], model.looped)) + growth

    delta = tensors[next(iter(problems))].delta.item()
    if "embed" in group:
        slope = sum(problem.weight.numel() for problem in problems.values()) / 8
        delta = fit_delta(delta, goal, slope, size_of, run.log, QUICK_FIT)
        tensors.update(trials[delta])
    else:
        tensors.update(round_at(delta))


def fp16_growth(config: Config, small: dict[str, Quantized]) -> int:
    """How many bytes the stream of the fp16 tensors may grow by if other values do not compress at all."""
    values = [tensor.values for tensor in small.values()]
    raw = sum(value.nbytes for value in values)
    now = len(code_stream(values, config.compressor, config.trellis_states))
    return raw + raw // 1000 + 128 - now  # what a compressor adds to noise


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


# === TUNING ===
# In: the rounded tensors and the unquantised weights. Out: the same integers and step sizes; what the
# artifact holds in fp16 beside them (scales, gains, mixes, gates) has been trained for TUNE_STEPS steps until
# the model's distribution comes as near to the unquantised one's as it can: no byte more. With TUNE_MATRICES
# the matrices are rounded in groups, and after each those still to come are trained beside the fp16 tensors:
# they make up for the errors of those that are integers already. It reads training tokens, so rounding and
# tuning are part of the training budget. A reader may change what is trained (`Tuning.choose`), in which
# order (ROUNDING_GROUPS) or by what (`tuning_loss`).

TUNE_FORWARD = 2**13  # most tokens of a forward: two models' logits are kept


def rounding_groups(table: dict[str, ParameterSpec]) -> tuple[tuple[str, ...], ...]:
    """Those of ROUNDING_GROUPS that a model has."""
    return tuple(tuple(name for name in group if name in table) for group in ROUNDING_GROUPS)


def tuning_window(config: Config) -> int:
    """The tokens of context in tuning: those of training, but no more than a step has."""
    return min(config.train_seq_len, config.tune_tokens)


def tuning_forwards(config: Config) -> tuple[int, int]:
    """How many forwards a tuning step takes over all ranks, and the tokens of each."""
    window = tuning_window(config)
    windows = config.tune_tokens // window
    part = max(1, min(windows // STREAMS, TUNE_FORWARD // window))  # 8 ranks share a step
    return windows // part, part * window


def ignore_product(site: str, layer: int, x: Tensor, y: Tensor) -> None:
    """A tap that sees nothing: with it every product is taken as in calibration, no scale in a matrix."""


def log_probabilities(model: GPT, batch: Batch) -> Tensor:
    """The model's log-probabilities of the token after each of `batch`, fp32 (tokens, V)."""
    x = model.trunk(batch, Hooks(ignore_product)).flatten(0, 1)
    cap = model.config.logit_softcap
    raw = F.linear(x, model.embed.to(model.dtype)).float()
    return F.log_softmax(cap * torch.tanh(raw / cap), -1)


def tuning_loss(teacher: GPT, model: GPT, batch: Batch, share: float) -> Tensor:
    """KL of the `model` from the `teacher` in nats per token, and `share` times the model's own loss."""
    with torch.no_grad():
        wanted = log_probabilities(teacher, batch)
    found = log_probabilities(model, batch)
    loss = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return loss + share * F.nll_loss(found, batch.targets.flatten()) if share else loss


class Tuning:
    """The training after rounding: a model with the rounded weights, and one with those before."""

    def __init__(self, run: Run, model: GPT, data: Dataset, before: dict[str, Tensor]):
        self.run = run
        self.config = run.config
        self.teacher = self.copy_of(model, model.config)
        self.teacher.requires_grad_(False)
        self.teacher.load_state_dict(before)
        # Steps of a bf16 embedding would be lost in rounding.
        self.model = self.copy_of(model, dataclasses.replace(model.config, embed_master_fp32=True))
        self.model.load_state_dict(before)
        self.choose(())
        self.forwards, tokens = tuning_forwards(self.config)
        self.loader = rounding_loader(self.config, data, tokens, tuning_window(self.config))

    def copy_of(self, model: GPT, config: Config) -> GPT:
        """A model like `model` with weights of its own."""
        copy = GPT(config, model.attend, model.fused, model.dtype, model.feed_forward).to(self.run.device)
        copy.looped = model.looped
        return copy

    def choose(self, matrices: Collection[str]) -> None:
        """From here on the fp16 tensors and the parameters `matrices` are trained, by an Adam of their own.

        It has no momentum: with a first moment of 0.9 these few steps need three times the tokens for the
        same KL (docs/packing.md).
        """
        config = self.config
        groups = []
        self.parameters = {}
        for name, spec in self.model.table.items():
            parameter = self.model.get_parameter(name).requires_grad_(False)
            rate = config.tune_lr
            if name in matrices:
                rate = config.tune_matrix_lr * float(self.teacher.get_parameter(name).std())
            elif spec.quantizer != "fp16":
                continue
            self.parameters[name] = parameter.requires_grad_(True)
            groups.append({"params": [parameter], "lr": rate, "full_rate": rate})
        self.optimizer = torch.optim.Adam(groups, betas=(0.0, config.beta2))

    def load(self, weights: dict[str, Tensor]) -> None:
        """These parameters are `weights` from here on."""
        for name, weight in weights.items():
            self.model.get_parameter(name).data.copy_(weight)

    def forward_loss(self, step: int, forward: int) -> Tensor:
        """What is minimised, on the tokens of one of a step's forwards."""
        place = step * self.forwards + forward
        batch = to_device(self.loader.get(place // STREAMS, place % STREAMS), self.run)
        return tuning_loss(self.teacher, self.model, batch, self.config.tune_loss_weight)

    def mean_over_forwards(self, row_of: Callable[[int], Tensor], size: int) -> Tensor:
        """The mean (size,) of `row_of` each of a step's forwards.

        Each forward has a row of its own, which one rank fills; rows are added in order. So the result has
        the same bits for any number of ranks.
        """
        rows = torch.zeros(self.forwards, size, device=self.run.device)
        for forward in range(self.run.rank, self.forwards, self.run.world_size):
            rows[forward] = row_of(forward)
        return self.run.sum_over_ranks(rows).mean(0)

    def gradient(self, step: int) -> Tensor:
        """The gradient of all parameters in a row and behind it the loss, the mean over a step's forwards."""
        parameters = list(self.parameters.values())

        def gradient_and_loss(forward: int) -> Tensor:
            loss = self.forward_loss(step, forward)
            parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
            return torch.cat([part.flatten().float() for part in (*parts, loss.detach())])

        return self.mean_over_forwards(gradient_and_loss, sum(p.numel() for p in parameters) + 1)

    @torch.no_grad()
    def loss(self, step: int) -> float:
        """The loss on the tokens of a step, nats per token."""
        return self.mean_over_forwards(functools.partial(self.forward_loss, step), 1).item()

    def step(self, step: int, rate: float) -> Tensor:
        """One update at `rate` times the full rates; the loss before it (0-d, on the device)."""
        parameters = self.parameters.values()
        *parts, loss = self.gradient(step).split([*(parameter.numel() for parameter in parameters), 1])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss[0]


def spread_weights(
    run: Run, model: GPT, tensors: dict[str, Quantized], names: Iterable[str]
) -> dict[str, Tensor]:
    """The parameters `names` of rank 0's `tensors` on every rank."""
    if run.is_main:
        found = assemble_weights(model.table, tensors)
    else:
        found = {name: torch.zeros(spec.shape) for name, spec in model.table.items()}
    return {name: run.sum_over_ranks(found[name].to(run.device)) for name in sorted(names)}


def train_by_groups(
    tuning: Tuning,
    before: dict[str, Tensor],
    tensors: dict[str, Quantized],
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
    goal: int,
) -> float:
    """The training of `tune`, and the rounding of groups in rank 0's `tensors`; returns its last loss."""
    run = tuning.run
    config = tuning.config
    table = tuning.model.table
    groups = rounding_groups(table)
    if not config.tune_matrices:
        groups = (sum(groups, ()),)
    tuning.load({name: before[name] for name in sum(groups[1:], ())})
    done = 0
    for place, group in enumerate(groups):
        if place:
            round_next = functools.partial(round_group, run, tuning.model, goal, moments, tensors, group)
            run.on_main_rank(round_next)
            tuning.load(spread_weights(run, tuning.model, tensors, group))
        tuning.choose(sum(groups[place + 1 :], ()))
        steps = config.tune_steps * (place + 1) // len(groups) - done
        for step in run.progress("tuning", range(steps)):
            loss = tuning.step(done + step, 1 - step / steps)
        done += steps
    return loss.item()


def tune(
    run: Run,
    model: GPT,
    data: Dataset,
    before: dict[str, Tensor],
    tensors: dict[str, Quantized],
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
    goal: int,
) -> dict[str, float]:
    """Train the fp16 tensors in rank 0's `tensors`, in place; returns the facts. Every rank takes part.

    `before` are the weights before rounding. With TUNE_MATRICES the matrices after the first group are
    rounded anew as well, by `moments` and for a file of `goal` bytes. Stop if the loss is not finite.
    """
    began = run.now()
    tuning = Tuning(run, model, data, before)
    config = run.config
    unseen = config.tune_steps  # no step reads its tokens
    untuned = dict(tensors)
    tuning.load(spread_weights(run, model, tensors, model.table))
    loss_before = tuning.loss(unseen)
    last_step = train_by_groups(tuning, before, tensors, moments, goal)
    if not math.isfinite(last_step):
        raise Stop(f"TUNE_LR={config.tune_lr}: the loss of tuning is not finite; lower it")
    if run.is_main:
        for name, parameter in tuning.parameters.items():
            tensors[name] = Quantized(parameter.detach().half().cpu())
    tuning.load(spread_weights(run, model, tensors, model.table))
    loss_after = tuning.loss(unseen)
    run.log(
        f"tuned in {config.tune_steps} steps: loss on tokens that they have not read {loss_before:.6f} -> "
        f"{loss_after:.6f}"
    )
    pays = loss_after < loss_before  # not a number does not
    if run.is_main and not pays:
        run.log(f"tuning does not pay: the weights before it are kept; lower TUNE_LR={config.tune_lr}")
        tensors.update(untuned)
    return {"tune_seconds": run.now() - began, "tune_loss_before": loss_before, "tune_loss_after": loss_after}


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
            # Not beyond the end, where a damaged stream may lead.
            low = low << 8 | buffer[min(coder[POSITION], len(buffer) - 1)]
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
    """The stream of int32 matrices (R, C), columns on trellis paths; with `data` they are filled from it.

    ValueError if `data` is not a stream of so many integers.
    """
    values = np.concatenate([matrix.ravel() for matrix in matrices])
    shapes = np.array([matrix.shape for matrix in matrices])
    if data is None:
        buffer = np.zeros(8 * values.size + 64, np.uint8)
        coder = np.array([0, INTERVAL_MASK + 1, 0])
    else:
        buffer = np.frombuffer(bytearray(data + b"\xff" * 64), np.uint8)
        coder = np.array([int.from_bytes(buffer[:7].tobytes(), "big"), INTERVAL_MASK + 1, 7])
    code_integers(values, shapes, trellis(states)[0], initial_counts(states), coder, buffer, data is not None)
    if data is not None and coder[POSITION] != len(data) + 6:  # it reads 7 bytes ahead of where it is
        raise ValueError(f"a stream of {len(data)} bytes holds other integers")
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


# Settings of the model that are younger than the format: an artifact has them where they are on, so that one
# without them keeps its bytes.
LATER_SETTINGS = ("BIGRAM_ROWS", "BIGRAM_WIDTH", "MUDD_LAST_N")


def model_settings(config: Config) -> dict[str, Any]:
    """The settings of the model as an artifact has them."""
    chosen = config.overrides()
    model = config.chosen("Model")
    return {name: value for name, value in model.items() if name in chosen or name not in LATER_SETTINGS}


def describe_other_model(theirs: Mapping[str, Any], config: Config) -> str:
    """describe_differences of the model settings of an artifact from those of `config`."""
    defaults = {name: getattr(Config, name.lower()) for name in LATER_SETTINGS}
    return describe_differences(defaults | dict(theirs), config.chosen("Model"))


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
        "model": model_settings(config),
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
    if coder not in (b"lzma", b"brotli"):
        raise Stop(f"{path}: packed with {coder!a}, which is not known; {remedy}")
    if hashlib.sha256(coder + data[start:]).digest() != digest:
        raise Stop(f"{path}: a byte was changed, the checksum does not fit; {remedy}")
    return coder.decode(), data[start : start + head], data[start + head :], hashlib.sha256(data).hexdigest()


def decode_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Quantized], str]:
    """(manifest, tensors by flat name, sha256) of the artifact at `path`; Stop if a byte of it is wrong.

    Also if its checksum fits and what it says cannot be: it may be another program's.
    """
    compressor, head, payload, digest = read_container(path)
    try:
        manifest = json.loads(compress(head, compressor, undo=True))
        tensors = decode_payload(manifest, compressor, payload)
    except ImportError as error:
        raise Stop(
            f"{path}: packed with {compressor}, which is not installed; pip install {error.name}"
        ) from None
    # lzma's and brotli's own errors are direct heirs of Exception.
    except Exception as error:
        raise Stop(
            f"{path}: not as an artifact has to be ({describe_error(error)}); "
            "make it again with STAGE=quantize"
        ) from None
    return manifest, tensors, digest


def decode_payload(manifest: dict[str, Any], compressor: str, payload: bytes) -> dict[str, Quantized]:
    """The tensors that `manifest` describes, from the streams in `payload`; any Exception if it cannot be."""
    if type(manifest["looped"]) is not bool or type(manifest["model"]) is not dict:
        raise ValueError("looped and model are not a truth value and an object")
    tensors = {}
    for name, parts in manifest["tensors"]:
        if type(name) is not str:
            raise ValueError(f"a tensor is called {name}")
        for kind, shape in parts:
            check_part(kind, shape)
        tensors[name] = Quantized(*(torch.empty(shape, dtype=getattr(torch, kind)) for kind, shape in parts))
    streams = collect_streams(tensors)
    names = [name for name, _ in manifest["streams"]]
    sizes = [size for _, size in manifest["streams"]]
    if names != list(streams) or min(sizes) < 0 or sum(sizes) != len(payload):
        raise ValueError(f"its streams are not {list(streams)} of {len(payload)} bytes")
    ends = itertools.accumulate(sizes)
    pieces = {name: payload[end - size : end] for name, size, end in zip(names, sizes, ends, strict=True)}

    def fill(name: str) -> None:
        code_stream(streams[name], compressor, manifest["states"], pieces[name])

    parallel_map(fill, pieces)
    return tensors


PART_TYPES = ("int8", "int32", "float16", "float32")
MOST_ELEMENTS = 1 << 28  # of one part: more than fit under the cap


def check_part(kind: Any, shape: Any) -> None:
    """ValueError unless these can be the type and the shape of a part of a tensor."""
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if kind not in PART_TYPES or not whole or math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"a part of type {kind} and shape {shape}")


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


# The packed script: a decoder around the compressed source. The compressed bytes stand in a string literal as
# they are, which Latin-1 allows (base 85 would be a fifth larger). It registers the source with linecache
# because Triton reads the text of its kernels through inspect, which a bare exec would leave without any.
PACKED_HEAD = b"# coding: latin-1\nimport linecache as l,lzma as z,sys\n"
PACKED_DECODER = (
    b"sys.version_info<(3,10)and sys.exit('needs Python 3.10 or newer')\n"
    b"s=z.decompress('%s'.encode('latin-1'),3,None,[{'id':33,'dict_size':1<<20}]).decode()\n"
    b"n='<train_gpt>'\nl.cache[n]=len(s),None,s.splitlines(True),n\nexec(compile(s,n,'exec'))\n"
)
LEAST_PYTHON = (3, 10)  # as the decoder says
# What cannot stand in the literal as it is.
LITERAL_ESCAPES = {b"\\": rb"\\", b"'": rb"\'", b"\n": rb"\n", b"\r": rb"\r", b"\0": rb"\x00"}


# In a process of its own: python-minifier hangs notes on the nodes of the syntax tree, some of which all
# trees of a process share, and Triton copies such a node with all that hangs on it, which is this whole file,
# for every += in a kernel.
MINIFY = """
import sys, python_minifier
kept = {"rename_locals": False, "hoist_literals": False, "remove_annotations": False}
source = sys.stdin.buffer.read().decode()
short = python_minifier.minify(source, remove_literal_statements=True, **kept)
sys.stdout.buffer.write(short.encode())
"""


def minify(source: str) -> tuple[str, str]:
    """(`source` without comments, docstrings and spaces, how it was made): the same under every Python."""
    import ast

    if importlib.util.find_spec("python_minifier") is None:
        return source, "not minified (python-minifier is not installed)"
    # Names stay: Triton passes arguments by name. Hoisting literals would take them out of the kernels' text.
    # Docstrings go, but for the head of the file, which --help prints.
    try:
        tree = ast.parse(source, feature_version=LEAST_PYTHON)
    except SyntaxError as error:
        raise Stop(
            f"{__file__}:{error.lineno}: {error.msg}; the packed script has to run on Python 3.10"
        ) from None
    head = ast.get_docstring(tree, clean=False) or ""
    done = subprocess.run([sys.executable, "-c", MINIFY], input=source.encode(), capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
        return source, f"not minified (python-minifier: {said[-1]})"
    minified = done.stdout.decode()
    lines = quoted_expressions(minified)
    if lines:
        return source, f"not minified (f-strings with quotes inside, in lines {lines} of its short form)"
    return f"{head!r}\n{minified}", "minified"


def quoted_expressions(source: str) -> list[int]:
    """The lines of `source` with an f-string in whose expressions there is a string.

    Python 3.12 lets such a string have the quotes of the f-string, and python-minifier makes use of that when
    it runs there; 3.10 and 3.11 refuse it. Without such strings the short form is the same under all of them.
    """
    import ast

    lines = set()
    for node in ast.walk(ast.parse(source, feature_version=LEAST_PYTHON)):
        if not isinstance(node, ast.FormattedValue):
            continue
        for inner in ast.walk(node.value):
            text = isinstance(inner, ast.Constant) and isinstance(inner.value, str | bytes)
            if text or isinstance(inner, ast.JoinedStr):
                lines.add(node.lineno)
    return sorted(lines)


@functools.lru_cache(1)
def pack_source(source: bytes) -> tuple[bytes, str]:
    """(`source` as a self-extracting script, how it was made); one that is packed already stays as it is."""
    if source.startswith(PACKED_HEAD):
        return source, "already packed"
    text, how = minify(source.decode())
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0, "dict_size": 1 << 20}
    ]
    packed = lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=filters)
    for byte, escape in LITERAL_ESCAPES.items():
        packed = packed.replace(byte, escape)
    return PACKED_HEAD + PACKED_DECODER % packed, how


# === EVALUATE ===
# In: the model with the weights of the artifact, and the validation tokens. Out: the loss of every target,
# entered exactly once into a Tally, the only place where losses become bits per byte. All modes score in
# windows (`plan_windows`). What learns at test time learns only from targets that the Tally has seen
# (`Tally.require`), so score-before-update is checked while it happens. To try another mode, write a function
# `mode(run, ..., tally)` and give it a name in `evaluation_modes` (section MAIN).


def plan_windows(length: int, context: int, stride: int) -> np.ndarray:
    """A plan that scores every target 1 ... length-1 once: (W, 3) int64 rows of windows.

    A row holds the first input, the end of the targets and the first target to score. The first window
    scores as many targets as it sees, every later one `stride`. Windows lie `stride` apart, the last too, as
    published (#1413): where the text ends early it has fewer than `context` inputs.
    """
    last = length - 1
    ends = np.minimum(np.arange(context, max(context, last) + stride, stride), last)
    ends = ends[: np.searchsorted(ends, last) + 1]
    scored_before = np.concatenate([[0], ends[:-1]])
    starts = np.maximum(0, scored_before + stride - context) * (scored_before > 0)
    return np.stack([starts, ends + 1, scored_before + 1], 1).astype(np.int64)


def plan_chunks(length: int, context: int, chunk: int) -> np.ndarray:
    """The plan (as plan_windows) of a document that is scored in chunks: every window ends with its chunk.

    It reaches back over all the `context` inputs that it may have, the last one too (#1530).
    """
    scored_before = np.arange(0, length - 1, chunk)
    ends = np.minimum(scored_before + chunk, length - 1)
    return np.stack([np.maximum(0, ends - context), ends + 1, scored_before + 1], 1).astype(np.int64)


class Score(NamedTuple):
    """Sums over scored targets, and the one place where they become bits per byte.

    `losses` (N,) fp32 are the nats of every target, where they are still known.
    """

    nats: float
    tokens: float
    bytes: float
    losses: Tensor | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of the original text."""
        return self.nats / math.log(2) / max(self.bytes, 1)


class Tally:
    """The loss of every validation target, written once: the one place where scores are summed (fp64)."""

    def __init__(self, run: Run, validation: Validation):
        self.run = run
        self.validation = validation
        self.nats = torch.zeros(len(validation.tokens), device=run.device)
        self.times = torch.zeros(len(validation.tokens), dtype=torch.int32, device=run.device)
        self.mask: TokenMask | None = None  # of every place of the text
        if run.config.canonical_mask and run.canonical is None:
            raise Stop("CANONICAL_MASK=1: a score without its mask: a bug, open_canonical comes first")
        if run.canonical is not None:
            rows = torch.from_numpy(run.canonical.rows(validation.tokens))
            self.mask = to_device(TokenMask(rows, torch.from_numpy(run.canonical.table)), run)

    def masked(self, batch: Batch, chosen: Tensor, places: Tensor) -> Batch:
        """`batch` with the mask of the targets at `places` (N,), `chosen` (N,) being theirs in the batch."""
        if self.mask is None:
            return batch
        rows = torch.zeros(batch.inputs.numel(), dtype=torch.int32, device=self.run.device)
        rows[chosen] = self.mask.rows[places - 1]
        return batch._replace(mask=self.mask._replace(rows=rows.view_as(batch.inputs)))

    def add(self, losses: Tensor, places: Tensor) -> None:
        """Enter the losses (N,) of the targets at `places` (N,)."""
        self.nats[places] = losses.float()
        self.times.index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def require(self, first: int, last: int) -> None:
        """Stop unless every target from `first` to `last` was scored: nothing else may be learnt."""
        times = self.run.sum_over_ranks(self.times[first : last + 1].clone())
        if (times != 1).any():
            raise Stop(
                f"targets {first} to {last}: not all scored exactly once before they are learnt: a bug"
            )

    def total(self, stage: str) -> Score:
        """The sums over all ranks; Stop if a target was left out or scored twice."""
        self.run.sum_over_ranks(self.nats)
        self.run.sum_over_ranks(self.times)
        wrong = int((self.times[1:] != 1).sum())
        if wrong:
            raise Stop(f"val:{stage}: {wrong} targets not scored exactly once: a bug, no score is reported")
        total_bytes = int(self.validation.bytes[1:].sum())
        return Score(self.nats.double().sum().item(), len(self.nats) - 1, total_bytes, self.nats)


def measure(run: Run, validation: Validation, stage: str, how: Callable[[Tally], None]) -> Score:
    """The score of all validation tokens by `how`; logs it."""
    began = run.now()
    tally = Tally(run, validation)
    how(tally)
    result = tally.total(stage)
    seconds = run.now() - began
    facts = {
        "val_loss": result.loss,
        "val_bpb": result.bpb,
        "tokens": result.tokens,
        "bytes": result.bytes,
    }
    run.metric("score", stage=stage, seconds=seconds, **facts)
    run.log(f"val:{stage} val_loss:{result.loss:.5f} val_bpb:{result.bpb:.5f} time:{seconds:.1f}s")
    return result


def save_document_sums(path: Path, validation: Validation, losses: Tensor) -> None:
    """Write the sums of tokens, bytes and nats by document, and by octaves of the position in a document.

    `losses` (N,) are those of a Score. Takes a second per ten million tokens: not for the evaluation clock.
    """
    documents = find_documents(validation.tokens)
    if len(documents) == 0:
        return
    firsts = documents[:, 0]
    sizes = documents[:, 1] - firsts - 1
    nats = losses[1:].double().cpu().numpy()
    position = np.arange(1, len(nats) + 1) - np.repeat(firsts, sizes)
    octave = np.log2(position).astype(int)
    sums = {"tokens": sizes, "position_start": 2 ** np.arange(octave.max() + 1)}
    for kind, values in (("nats", nats), ("bytes", validation.bytes[1:].astype(np.int64))):
        sums[kind] = np.add.reduceat(values, firsts)
        sums[f"position_{kind}"] = np.bincount(octave, values)
    write_atomically(path, functools.partial(savez, sums))


def savez(arrays: Mapping[str, np.ndarray], file: typing.BinaryIO) -> None:
    """Write `arrays` to `file` in NumPy's .npz format."""
    np.savez(file, **arrays)


def window_batch(
    tokens: np.ndarray, plan: np.ndarray, rows: int, context: int, packed: int
) -> tuple[Batch, Tensor, Tensor]:
    """The windows of `plan` as one batch of `rows` rows of `context` tokens; rows without a window are zeros.

    With `packed` the rows lie one behind the other and attention stays within documents. A document runs on
    from row to row where the windows do, as published (#1530), but not into a row whose number `packed`
    divides. Also returns the mask of the scored targets (rows, context) and their places (N,) in `tokens`.
    """
    place = plan[:, :1] + np.arange(context + 1)
    inside = place < plan[:, 1:2]
    ids = np.zeros((rows, context + 1), dtype=np.int64)
    ids[: len(plan)][inside] = tokens[place[inside]]
    scored = np.zeros((rows, context), dtype=bool)
    scored[: len(plan)] = inside[:, 1:] & (place[:, 1:] >= plan[:, 2:3])
    inputs = torch.from_numpy(ids[:, :-1].copy())
    targets = torch.from_numpy(ids[:, 1:].copy())
    batch = Batch(inputs, targets)
    if packed:
        runs_on = np.zeros(rows, dtype=bool)
        runs_on[1 : len(plan)] = plan[1:, 0] == plan[:-1, 0] + context
        runs_on[::packed] = False
        starts = segment_starts(ids[:, :-1].reshape(-1), context, np.flatnonzero(~runs_on) * context)
        batch = Batch(inputs.view(1, -1), targets.view(1, -1), starts, context)
    return batch, torch.from_numpy(scored), torch.from_numpy(place[:, 1:][scored[: len(plan)]])


@torch.no_grad()
def score_windows(run: Run, forward: Callable[[Batch], Tensor], tally: Tally, plan: np.ndarray) -> None:
    """Score the targets of the windows of `plan`, in batches that do not depend on the number of ranks."""
    config = run.config
    context = config.eval_seq_len
    rows = max(1, config.val_batch_tokens // STREAMS // context)
    packed = rows if config.loader == "packed" else 0
    mine = range(0, len(plan), rows)[run.rank :: run.world_size]
    for row in run.progress("windows", mine):
        batch, scored, places = window_batch(
            tally.validation.tokens, plan[row : row + rows], rows, context, packed
        )
        # Which losses are scored is found on the host: a mask on the device would have it wait for a count.
        chosen = scored.flatten().nonzero()[:, 0]
        batch, chosen, places = to_device((batch, chosen, places), run)
        batch = tally.masked(batch, chosen, places)
        run.count_tokens(batch.inputs.numel(), learns=False)
        tally.add(forward(batch).flatten()[chosen], places)


def score_sliding(run: Run, forward: Callable[[Batch], Tensor], stride: int, tally: Tally) -> None:
    """Score in windows of EVAL_SEQ_LEN with `stride` new targets each (all of them: plain evaluation)."""
    plan = plan_windows(len(tally.validation.tokens), run.config.eval_seq_len, stride)
    score_windows(run, forward, tally, plan)


# === ADAPTATION ===
# In: the model, its forward, a Tally. Out: every target scored, in an order in which what is scored may be
# learnt: chunk by chunk by SGD on all weights (`chunk_sgd`), document by document by adapters with phases of
# SGD between (`doc_lora`). `Tally.require` stops an update that is not earned. Training on validation text
# before scoring it (`prequant_ttt`) is here too and is not legal. Whatever runs on the evaluation clock is
# rehearsed.


def cosine_decay(place: int, count: int) -> float:
    """1 at place 0, falling to 0 at place count - 1 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * place / max(count - 1, 1)))


def hash_weights(model: GPT) -> str:
    """16 hex digits that change with any bit of the weights, for the ledger."""
    hashes = [torch.hash_tensor(parameter).item() for parameter in model.parameters()]
    return hashlib.sha256(str(hashes).encode()).hexdigest()[:16]


def frozen_rows(model: GPT, blocks: int) -> list[tuple[nn.Parameter, Any]]:
    """The rows of each parameter that belong to the first `blocks` layers, with the embedding if any do."""
    if blocks == 0:
        return []
    layers = model.config.num_layers
    frozen: list[tuple[nn.Parameter, Any]] = []
    for name, spec in model.table.items():
        if spec.optimizer == "embed":
            frozen.append((model.get_parameter(name), slice(None)))
        elif spec.layered:
            groups = spec.shape[0] // layers
            rows = [group * layers + layer for group in range(groups) for layer in range(blocks)]
            frozen.append((model.get_parameter(name), rows))
    return frozen


class Learner:
    """Trains all weights on ranges of tokens; the ranks share each step, or go alone if not `shared`.

    `model` is a GPT, or one that is compiled: a step has as many rows as the largest before it, the missing
    ones empty, so that a text that ends in a shorter step needs no graph of its own.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float,
        batch_seqs: int,
        freeze: int = 0,
        shared: bool = True,
        packed: bool | None = None,
    ):
        self.run = run
        self.model = model.requires_grad_(True)
        self.optimizer = optimizer
        self.clip = clip
        self.batch_seqs = batch_seqs
        self.shared = shared
        self.packed = model.config.loader == "packed" if packed is None else packed
        self.parameters = list(model.parameters())
        self.frozen = frozen_rows(model, freeze)
        self.weights = hash_weights(model)
        self.rows = 0  # of the largest step so far

    def learn(self, tokens: np.ndarray, first: int, last: int, rate: float, epochs: int = 1) -> None:
        """`epochs` passes over the whole rows of EVAL_SEQ_LEN targets among tokens[first + 1:last + 1]."""
        run = self.run
        length = run.config.eval_seq_len
        starts = np.arange(first, last - length + 1, length)
        plan = np.stack([starts, starts + length + 1, starts + 1], 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = self.batch_seqs * (STREAMS if self.shared else 1)
        for _ in range(epochs):
            for place in range(0, len(plan), size):
                self.learn_rows(tokens, plan[place : place + size])
        before = self.weights
        self.weights = hash_weights(self.model)
        run.ledger("update", first=first + 1, last=last, rate=rate, before=before, after=self.weights)

    def learn_rows(self, tokens: np.ndarray, plan: np.ndarray) -> None:
        """One step on the windows of `plan`; if it is shared, each stream has a part of adjacent ones."""
        run = self.run
        length = run.config.eval_seq_len
        part = len(plan)
        mine = plan
        if self.shared:
            part = -(-len(plan) // STREAMS)
            # A rank above the eighth has no stream.
            parts = [plan[stream * part : (stream + 1) * part] for stream in run.streams]
            mine = np.concatenate([plan[:0], *parts])
        if len(mine) > 0:  # else this rank only takes part in the sum
            self.rows = max(self.rows, len(mine))
            batch, _, _ = window_batch(tokens, mine, self.rows, length, part if self.packed else 0)
            run.count_tokens(batch.inputs.numel(), learns=True)
            losses = self.model(to_device(batch, run)).view(self.rows, length)
            (losses[: len(mine)].sum() / (len(plan) * length)).backward()
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """One update: gradients summed over ranks if shared, clipped, frozen weights put back."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.shared:
                self.run.sum_over_ranks(parameter.grad)
        for parameter, rows in self.frozen:
            parameter.grad[rows] = 0
        nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        kept = self.copy_frozen()
        self.optimizer.step()
        self.put_back(kept)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def average_over_ranks(self) -> None:
        """The weights become their mean over ranks; frozen ones stay: a sum of equal values may round."""
        kept = self.copy_frozen()
        for parameter in self.parameters:
            self.run.sum_over_ranks(parameter.data).div_(self.run.world_size)
        self.put_back(kept)

    def copy_frozen(self) -> list[Tensor]:
        """The frozen rows of each parameter that has any."""
        return [parameter[rows].clone() for parameter, rows in self.frozen]

    def put_back(self, kept: list[Tensor]) -> None:
        """Write what copy_frozen gave."""
        for (parameter, rows), before in zip(self.frozen, kept, strict=True):
            parameter[rows] = before


def chunk_sgd(run: Run, model: nn.Module, forward: Callable[[Batch], Tensor], tally: Tally) -> None:
    """Chunk by chunk: score its targets in sliding windows, then train all weights on it (#1413, #1493).

    `forward` scores, `model` learns (see Learner). The last chunk is not learnt. A window belongs to the
    chunk of the first target that it scores, so all targets of a chunk are scored before any is learnt.
    """
    config = run.config
    tokens = tally.validation.tokens
    size = config.ttt_chunk_tokens
    plan = plan_windows(len(tokens), config.eval_seq_len, config.eval_stride)
    chunk_of_window = (plan[:, 2] - 1) // size
    count = int(chunk_of_window[-1]) + 1
    if config.ttt_optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.ttt_adamw_wd)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=config.ttt_momentum)
    learner = Learner(
        run, model, optimizer, config.ttt_grad_clip, config.ttt_batch_seqs, config.ttt_freeze_blocks
    )
    for chunk in run.progress("val:ttt chunks", range(count)):
        score_windows(run, forward, tally, plan[chunk_of_window == chunk])
        run.ledger("scored", chunk=chunk, weights=learner.weights)
        if chunk + 1 < count:
            first = chunk * size
            last = first + size
            tally.require(first + 1, last)
            learner.learn(tokens, first, last, config.ttt_lr * cosine_decay(chunk, count), config.ttt_epochs)


def find_documents(tokens: np.ndarray) -> np.ndarray:
    """The documents of a token stream as (D, 2): first token, and one past the last target (the next BOS).

    A stream without BOS is cut every 2,048 tokens (#1670).
    """
    starts = np.unique(np.append(0, np.flatnonzero(tokens == BOS)))
    if len(starts) == 1:
        starts = np.arange(0, len(tokens), 2048)
    ends = np.minimum(np.append(starts[1:], len(tokens)) + 1, len(tokens))
    return np.stack([starts, ends], 1)[ends - starts > 1]


def schedule_documents(config: Config, lengths: np.ndarray) -> list[list[np.ndarray]]:
    """Per phase, the batches of document numbers in the order of scoring, longest first (#1530, #1626).

    Phase p ends at PHASED_TTT_PREFIX_DOCS * (p+1) / phases documents, rounded up to 8 batches: the same for
    any number of ranks.
    """
    phases = config.phased_ttt_num_phases
    size = config.ttt_batch_size
    order = np.argsort(lengths, kind="stable")
    batches = [order[place : place + size] for place in range(0, len(order), size)][::-1]
    scored = np.cumsum([len(batch) for batch in batches])
    cuts = [0]
    for phase in range(phases):
        last_batch = int(np.searchsorted(scored, config.phased_ttt_prefix_docs * (phase + 1) // phases))
        cuts.append(-(-(last_batch + 1) // STREAMS) * STREAMS)
    cuts.append(len(batches))
    return [batches[first:end] for first, end in itertools.pairwise(cuts) if first < len(batches)]


def longest_document(documents: np.ndarray) -> int:
    """The tokens of the longest of `documents` (N, 2)."""
    return int((documents[:, 1] - documents[:, 0]).max())


def deal_batches(config: Config, longest: Sequence[int]) -> list[list[int]]:
    """The places of the batches of documents that each stream takes: always the one with the least work.

    The work of a batch is its padded tokens, which follow from the length of its `longest` document. The same
    for any number of ranks.
    """
    work = [0] * STREAMS
    dealt: list[list[int]] = [[] for _ in range(STREAMS)]
    for place, length in enumerate(longest):
        plan = plan_chunks(length, config.ttt_eval_seq_len, config.ttt_chunk_size)
        stream = work.index(min(work))
        work[stream] += int((plan[:, 1] - plan[:, 0] - 1).sum())
        dealt[stream].append(place)
    return dealt


# A graph of dynamic lengths does not serve the lengths 1 and 2: a dimension of 1 is compiled for itself.
SHORTEST_CONTEXT = 16


class ChunkBatch(NamedTuple):
    """A chunk of each of several documents, a row each, in host memory or on the device.

    `chosen` (N,) are the places of the scored losses among all of the batch, `places` (N,) those of their
    targets in the text; `weight` (B, T) fp32 is what each loss counts in what is learnt next.
    """

    batch: Batch
    chosen: Tensor
    places: Tensor
    weight: Tensor


def learning_weight(scored: Tensor, goes_on: np.ndarray) -> Tensor:
    """What each loss (B, T) counts in what is learnt: documents that go on (N,) learn the mean of theirs."""
    learns = torch.zeros(len(scored), 1)
    learns[: len(goes_on), 0] = torch.from_numpy(goes_on.astype(np.float32))
    return scored * learns / scored.sum(1, keepdim=True).clamp_min(1)


def chunk_batch(tokens: np.ndarray, plans: list[np.ndarray], chunk: int, rows: int) -> ChunkBatch:
    """Window number `chunk` of each plan in `rows` rows; a row is empty where a plan has ended or none is."""
    ended = np.zeros(3, np.int64)
    plan = np.stack([windows[chunk] if chunk < len(windows) else ended for windows in plans])
    context = max(SHORTEST_CONTEXT, int((plan[:, 1] - plan[:, 0]).max()) - 1)
    batch, scored, places = window_batch(tokens, plan, rows, context, packed=0)
    weight = learning_weight(scored, np.array([chunk + 1 < len(windows) for windows in plans]))
    return ChunkBatch(batch, scored.flatten().nonzero()[:, 0], places, weight)


def adapter_optimizer(config: Config, lora: LoRA, rate: float, fused: bool) -> torch.optim.Optimizer:
    """AdamW as the published adapters have it (#1530)."""
    return torch.optim.AdamW(
        lora.parameters(),
        lr=rate,
        betas=(config.ttt_beta1, config.ttt_beta2),
        eps=1e-10,
        weight_decay=config.ttt_weight_decay,
        fused=fused,
    )


def adapt_documents(
    run: Run,
    forward: Callable[..., Tensor],
    tally: Tally,
    documents: np.ndarray,
    seed: int | None,
    lora: LoRA | None = None,
) -> None:
    """Score `documents` (N, 2) side by side in chunks, with an adapter step on the losses of each (#1530).

    There are always TTT_BATCH_SIZE adapters, of which the last may have no document: a batch of another size
    would be compiled anew. They start from `seed`, or without one from the A in `lora`.
    """
    config = run.config
    rows = config.ttt_batch_size
    if lora is None:
        lora = LoRA(config, rows, run.device)
    lora.reset(seed)
    optimizer = adapter_optimizer(config, lora, config.ttt_lora_lr, run.is_cuda)
    plans = []
    for first, end in documents:
        plans.append(first + plan_chunks(end - first, config.ttt_eval_seq_len, config.ttt_chunk_size))
    chunks = max(len(plan) for plan in plans)
    for chunk in range(chunks):
        # All of it is prepared on the host: nothing here waits for the device.
        prepared = chunk_batch(tally.validation.tokens, plans, chunk, rows)
        batch, chosen, places, weight = to_device(prepared, run)
        batch = tally.masked(batch, chosen, places)
        learning = chunk + 1 < chunks
        for repeat in range(config.ttt_grad_steps if learning else 1):
            run.count_tokens(batch.inputs.numel(), learning)
            with torch.set_grad_enabled(learning):
                losses = forward(batch, lora=lora)
            if repeat == 0:
                tally.add(losses.detach().flatten()[chosen], places)
            if learning:
                (losses * weight).sum().backward()
                optimizer.step()
                optimizer.zero_grad()


def adapt_phase(
    run: Run,
    forward: Callable[..., Tensor],
    tally: Tally,
    batches: list[np.ndarray],
    phase: int,
    first_seed: int,
    lora: LoRA,
) -> None:
    """Score this rank's share of the `batches` (documents (N, 2) each) of a phase, stream by stream.

    With TTT_WARM_START_A a batch starts from the A of the stream's batch before it, if that was full (#1787).
    """
    config = run.config
    dealt = deal_batches(config, list(map(longest_document, batches)))
    mine = [(place, turn) for stream in run.streams for turn, place in enumerate(dealt[stream])]
    kept = False
    for place, turn in run.progress(f"val:ttt phase {phase + 1}", mine):
        seed = None if kept and turn > 0 else first_seed + place
        adapt_documents(run, forward, tally, batches[place], seed, lora)
        kept = config.ttt_warm_start_a and len(batches[place]) == config.ttt_batch_size


def learn_documents(run: Run, model: nn.Module, tokens: np.ndarray, documents: np.ndarray) -> None:
    """One phase of SGD of all weights on the joined `documents` (N, 2), which are scored (#1610).

    The last chunk is left out.
    """
    config = run.config
    text = np.concatenate([tokens[first:end] for first, end in documents])
    optimizer = torch.optim.SGD(model.parameters(), momentum=config.global_ttt_momentum)
    learner = Learner(
        run,
        model,
        optimizer,
        config.global_ttt_grad_clip,
        config.global_ttt_batch_seqs,
        packed=config.global_ttt_respect_doc_boundaries,
    )
    size = config.global_ttt_chunk_tokens
    count = -(-(len(text) - 1) // size)
    for chunk in range(count - 1):
        rate = phase_rate(config, chunk, count)
        learner.learn(text, chunk * size, (chunk + 1) * size, rate, config.global_ttt_epochs)


def phase_rate(config: Config, chunk: int, count: int) -> float:
    """The learning rate of a phase at `chunk` of `count`: a linear warm-up, then a cosine to 0."""
    warmup = config.global_ttt_warmup_chunks
    if chunk >= warmup:
        return config.global_ttt_lr * cosine_decay(chunk - warmup, count - warmup)
    start = config.global_ttt_warmup_start_lr
    return start + (config.global_ttt_lr - start) * chunk / warmup


def doc_lora(run: Run, model: nn.Module, forward: Callable[..., Tensor], tally: Tally) -> None:
    """Score documents with own adapters; between phases all weights learn the shortest scored (#1626).

    `forward` takes adapters, `model` learns (see Learner).
    """
    lora = LoRA(run.config, run.config.ttt_batch_size, run.device)

    def score(batches: list[np.ndarray], phase: int, first_seed: int) -> None:
        adapt_phase(run, forward, tally, batches, phase, first_seed, lora)

    score_phases(run, model, tally, score)


def score_phases(
    run: Run, model: nn.Module, tally: Tally, score: Callable[[list[np.ndarray], int, int], None]
) -> None:
    """Documents phase by phase: `score` gets the batches, the phase and how many batches came before."""
    config = run.config
    tokens = tally.validation.tokens
    documents = find_documents(tokens)
    phases = schedule_documents(config, documents[:, 1] - documents[:, 0])
    scored: list[np.ndarray] = []
    for phase, batches in enumerate(phases):
        model.requires_grad_(False)
        score([documents[batch] for batch in batches], phase, len(scored))
        scored += batches
        count = sum(len(batch) for batch in scored)
        run.ledger("scored", phase=phase, documents=count, weights=hash_weights(model))
        if phase + 1 < len(phases):
            prefix = learnt_prefix(config, scored, phase)
            run.log(
                f"val:ttt phase:{phase + 1}/{len(phases) - 1} docs:{count}/{len(documents)} "
                f"learning {len(prefix)} of them"
            )
            for first, end in documents[prefix]:
                tally.require(first + 1, end - 1)
            learn_documents(run, model, tokens, documents[prefix])
    model.requires_grad_(True)


def learnt_prefix(config: Config, scored: list[np.ndarray], phase: int) -> np.ndarray:
    """The numbers of the documents that are learnt after `phase`: the shortest of those scored so far."""
    shortest_first = np.concatenate(scored[::-1])
    return shortest_first[: config.phased_ttt_prefix_docs * (phase + 1) // config.phased_ttt_num_phases]


def prequant_ttt(run: Run, model: nn.Module, validation: Validation) -> None:
    """Train on the validation tokens before scoring (#1735), averaging ranks after each pass. Not legal."""
    config = run.config
    tokens = validation.tokens
    last = len(tokens) - 1
    size = config.prequant_ttt_chunk_tokens
    epochs = config.prequant_ttt_epochs
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.prequant_ttt_wd, fused=run.is_cuda)
    learner = Learner(
        run,
        model,
        optimizer,
        config.prequant_ttt_grad_clip,
        batch_seqs=len(tokens),
        freeze=config.prequant_ttt_freeze_blocks,
        shared=False,
    )
    average = [parameter.detach().clone() for parameter in learner.parameters]
    share = 1 - config.ttt_ema_decay if config.ttt_ema_enabled else 1.0  # 1: the last pass alone
    for epoch in run.progress("prequant_ttt", range(epochs)):
        rate = config.prequant_ttt_lr * (0.1 + 0.9 * cosine_decay(epoch, epochs + 1))
        for first in range(run.rank * size, last, run.world_size * size):
            learner.learn(tokens, first, min(first + size, last), rate)
        learner.average_over_ranks()
        with torch.no_grad():
            for parameter, mean in zip(learner.parameters, average, strict=True):
                mean.lerp_(parameter, share)
    with torch.no_grad():
        torch._foreach_copy_(learner.parameters, average)


def rehearsal_text(config: Config, ranks: int) -> np.ndarray:
    """Random tokens (N,) with which every rank meets every shape of the evaluation, the longest context too.

    That is a batch of windows for each of `ranks`, two chunks to score and learn, a chunk for each rank to
    learn before quantising; and a batch of documents for each stream and one more, so that a phase is learnt.
    """
    rows = max(1, config.val_batch_tokens // STREAMS // config.eval_seq_len)
    needed = max(ranks * rows * config.eval_seq_len, 2 * config.ttt_chunk_tokens) + 1
    if config.prequant_ttt_enabled:
        needed = max(needed, ranks * config.prequant_ttt_chunk_tokens + 1)
    document = config.ttt_eval_seq_len + config.ttt_chunk_size
    count = -(-needed // document)
    if config.ttt_enabled and config.ttt_mode != "chunk_sgd":
        count = max(count, STREAMS * config.ttt_batch_size + 1)
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, count * document)
    tokens[::document] = BOS
    return tokens.astype("<u2")


def shorten(config: Config) -> Config:
    """`config` with one pass where there are several, and phases after the first batches of documents."""
    phases = config.phased_ttt_num_phases
    document = config.ttt_eval_seq_len + config.ttt_chunk_size
    learnt = phases * -(-2 * config.global_ttt_chunk_tokens // document)
    return dataclasses.replace(
        config,
        ttt_epochs=1,
        global_ttt_epochs=1,
        prequant_ttt_epochs=1,
        phased_ttt_prefix_docs=max(1, min(config.phased_ttt_prefix_docs, learnt)),
    )


def rehearse(run: Run, stages: dict[str, Callable[[Tally], None]]) -> None:
    """Run `stages` on random tokens, so that nothing is compiled on the clock.

    The weights change: the caller loads them again.
    """
    began = run.now()
    config = run.config
    tokens = rehearsal_text(config, run.world_size)
    names = ", ".join(stages)
    run.log(f"rehearsal: {names} on {len(tokens)} random tokens, untimed")
    run.config = shorten(config)
    try:
        for how in stages.values():
            how(Tally(run, Validation(tokens, np.zeros(len(tokens), np.int32), "random")))
    finally:
        run.config = config
    run.log(f"rehearsal: done in {run.now() - began:.1f}s, {compiled_graphs()} graphs are compiled")


# === PAIRS ===
# In: the tokenizer's model file, nothing else. Out: its `Vocabulary`, and which tokens can be neighbours
# (`pair_table`), exactly. BPE joins the two symbols with the highest score first, the leftmost of equals, in
# the whole text. If a and b are neighbours in the result, no merge has crossed the outer borders of the two,
# so all merges inside happened in the order that they have when the text of a and b is encoded alone: the
# pair occurs exactly if that gives [a, b] back. Both orders of merges are known, so they are played together,
# and the pair is refused if a merge across the border comes before one of theirs.
#
# A unigram model takes the pieces with the highest sum of scores, and every part of a best sum is a best one:
# the pair occurs exactly if no other pieces have a higher sum for the text of a and b. Either they split a or
# b, which then never occurs, or one of them goes across the border: the end of a and the start of b, with the
# best sums for what is left of the two. Of equal sums the one with the longest last piece is taken.

UNIGRAM, BPE = 1, 2  # SentencePiece's numbers for the kinds of model
UNKNOWN_PENALTY = 10.0  # a character without a piece scores so much less than the lowest piece


class Vocabulary(NamedTuple):
    """What a SentencePiece model says of its V tokens, by id.

    `model` is UNIGRAM or BPE. `texts` of pieces, "" where a token stands for none; `types`, by the names of
    SentencePiece, an operator always as USER_DEFINED; `scores` of the other pieces; the byte (V,) of a byte
    piece, else -1. The normaliser puts a space before the text (`dummy_prefix`), and joins spaces and drops
    those at the ends (`joins_spaces`).
    """

    model: int
    texts: list[str]
    types: list[str]
    scores: dict[str, float]
    bytes: np.ndarray
    dummy_prefix: bool
    joins_spaces: bool

    def where(self, holds: Callable[[str], Any]) -> np.ndarray:
        """(V,) bool: whether a token has a text for which `holds`."""
        return np.array([bool(text and holds(text)) for text in self.texts])

    def of_type(self, *types: str) -> np.ndarray:
        """(V,) bool: whether a token is of one of the types."""
        return np.isin(self.types, types)


def read_vocabulary(path: Path) -> Vocabulary:
    """The Vocabulary of a model file; Stop if it is none, or one for which the mask would not be exact."""
    from google.protobuf.message import DecodeError  # as in load_tokenizer
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise Stop(f"{path}: not a SentencePiece model ({error}); give the .model of a tokenizer") from None
    trainer = model.trainer_spec
    normaliser = model.normalizer_spec
    names = {number: name for name, number in model.SentencePiece.Type.items()}
    types = [names[piece.type] for piece in model.pieces]
    texts = ["" for _ in model.pieces]
    scores = {}
    values = np.full(len(types), -1)
    whole = True
    for token, piece in enumerate(model.pieces):
        if trainer.model_type == UNIGRAM:
            whole &= types[token] != "USER_DEFINED" and piece.score % 1 == 0
            if types[token] == "NORMAL" and piece.score == 0:
                types[token] = "USER_DEFINED"  # an operator, as data/shards.py says
        if types[token] in ("NORMAL", "USER_DEFINED"):
            texts[token] = piece.piece
        if types[token] == "NORMAL":
            scores[piece.piece] = piece.score
        if types[token] == "BYTE":
            values[token] = int(piece.piece[3:5], 16)  # as in <0x0A>
    marked = [text for text, kind in zip(texts, types, strict=True) if kind == "USER_DEFINED"]
    reason = ""
    if trainer.model_type not in (UNIGRAM, BPE):
        reason = "is no BPE or unigram model"
    elif not whole:
        reason = "is a unigram model whose scores are not whole, as those that data/prepare.py makes are"
    elif trainer.model_type == UNIGRAM and any(text in other for text in marked for other in scores):
        reason = "has pieces of score 0 within others"
    elif "UNUSED" in types:
        reason = "has unused pieces, which are split again"
    elif trainer.treat_whitespace_as_suffix or not normaliser.escape_whitespaces:
        reason = f"does not write a space as {WORD_START} before the word"
    elif any(WORD_START in text or " " in text for text in marked):
        reason = "has user-defined symbols with spaces"
    elif types[BOS : BOS + 1] != ["CONTROL"]:
        reason = f"has no control token {BOS} to begin a document with"
    if reason:
        raise Stop(f"{path}: {reason}, so the mask is not exact; set CANONICAL_MASK=0 or TOKENIZER_PATH")
    # Other normalisers leave spaces of another kind, and U+2581 of the text, as they are.
    joins = normaliser.remove_extra_whitespaces and normaliser.name.startswith("nmt_nfkc")
    return Vocabulary(trainer.model_type, texts, types, scores, values, normaliser.add_dummy_prefix, joins)


class Merges(NamedTuple):
    """How a token comes about from its text: the score of each merge in order, and the symbols at the left
    and the right end before the first merge and after each.
    """

    scores: list[float]
    left: list[str]
    right: list[str]


def find_merges(text: str, scores: Mapping[str, float]) -> Merges | None:
    """The merges that BPE makes of `text`, or None if they do not end in one symbol."""
    symbols = list(text)
    found = Merges([], [symbols[0]], [symbols[-1]])
    while len(symbols) > 1:
        joined = [scores.get(first + second, -math.inf) for first, second in itertools.pairwise(symbols)]
        highest = max(joined)
        if highest == -math.inf:
            return None
        place = joined.index(highest)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        found.scores.append(highest)
        found.left.append(symbols[0])
        found.right.append(symbols[-1])
    return found


class MergeTable(NamedTuple):
    """The Merges of all tokens as arrays; symbols are numbered, those on the left and on the right apart.

    `counts` (V,) of merges; `scores`, `left` and `right` (V, most + 1) as in Merges, a score of -inf behind
    the last merge. The symbols that right symbol r can be joined with are partners[starts[r]:starts[r + 1]],
    with `gains` as scores; the tokens with left symbol l are users[firsts[l]:firsts[l + 1]].
    """

    counts: np.ndarray
    scores: np.ndarray
    left: np.ndarray
    right: np.ndarray
    starts: np.ndarray
    partners: np.ndarray
    gains: np.ndarray
    firsts: np.ndarray
    users: np.ndarray


def grouped(rows: Iterable[tuple], columns: int, groups: int) -> tuple[np.ndarray, ...]:
    """(where each of `groups` starts, and the end; the columns) of `rows`: a group and `columns` numbers."""
    table = np.array(sorted(rows), np.float64).reshape(-1, 1 + columns)
    return np.searchsorted(table[:, 0], np.arange(groups + 1)), *table[:, 1:].T


def numbered(symbols: Iterable[str]) -> dict[str, int]:
    """A number for each different symbol."""
    return {symbol: number for number, symbol in enumerate(sorted(set(symbols)))}


def tabulate(found: Mapping[int, Merges], scores: Mapping[str, float], size: int) -> MergeTable:
    """The MergeTable of `size` tokens, of which those in `found` have Merges."""
    lefts = numbered(symbol for merges in found.values() for symbol in merges.left)
    rights = numbered(symbol for merges in found.values() for symbol in merges.right)
    most = max((len(merges.scores) for merges in found.values()), default=0)
    counts = np.zeros(size, np.int64)
    values = np.full((size, most + 1), -np.inf, np.float32)
    left, right = np.zeros((2, size, most + 1), np.int64)
    for token, merges in found.items():
        count = counts[token] = len(merges.scores)
        values[token, :count] = merges.scores
        left[token, : count + 1] = [lefts[symbol] for symbol in merges.left]
        right[token, : count + 1] = [rights[symbol] for symbol in merges.right]
    joins = [
        (rights[text[:cut]], lefts[text[cut:]], score)
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in rights and text[cut:] in lefts
    ]
    uses = {(lefts[symbol], token) for token, merges in found.items() for symbol in merges.left}
    starts, partners, gains = grouped(joins, 2, len(rights))
    firsts, users = grouped(uses, 1, len(lefts))
    return MergeTable(
        counts,
        values,
        left,
        right,
        starts,
        partners.astype(np.int64),
        gains.astype(np.float32),
        firsts,
        users.astype(np.int64),
    )


@numba_jit
def refuse_pairs(tokens, table, counts, scores, left, right, starts, partners, gains, firsts, users):
    """Clear table[a, b // 8] >> b % 8 & 1 for each a of `tokens` and each b that BPE joins with it.

    The arrays after `table` are those of a MergeTable.
    """
    across = np.full((scores.shape[1], len(firsts)), -np.inf, np.float32)  # by merges of a, left symbol of b
    asked = np.full(len(table), -1, np.int64)  # the token for which it was last looked at
    for first in tokens:
        for i in range(counts[first] + 1):
            for k in range(starts[right[first, i]], starts[right[first, i] + 1]):
                across[i, partners[k]] = gains[k]
        for i in range(counts[first] + 1):
            for k in range(starts[right[first, i]], starts[right[first, i] + 1]):
                for use in range(firsts[partners[k]], firsts[partners[k] + 1]):
                    second = users[use]
                    if asked[second] != first:
                        asked[second] = first
                        if is_joined(scores[first], scores[second], left[second], across):
                            table[first, second >> 3] &= ~np.uint8(1 << (second & 7))
        for i in range(counts[first] + 1):
            for k in range(starts[right[first, i]], starts[right[first, i] + 1]):
                across[i, partners[k]] = -np.inf


@numba_inline
def is_joined(of_first, of_second, left_of_second, across):
    """Whether a merge across the border of two tokens comes before all of theirs are made.

    Of both the scores of the merges, -inf behind the last; `across` as in refuse_pairs.
    """
    i = 0
    j = 0
    while True:
        over = across[i, left_of_second[j]]
        # A merge within the first token is further left, and so goes before its equals.
        if over > of_first[i] and over >= of_second[j]:
            return True
        if of_first[i] == -np.inf and of_second[j] == -np.inf:
            return False
        if of_first[i] >= of_second[j]:
            i += 1
        else:
            j += 1


def best_sums(text: str, scores: Mapping[str, float]) -> list[float]:
    """The highest sum of scores of pieces that make the start of `text`, by its length from 0 on."""
    best = [0.0]
    for end in range(1, len(text) + 1):
        best.append(max(best[cut] + scores.get(text[cut:end], -math.inf) for cut in range(end)))
    return best


class Crossings(NamedTuple):
    """How pieces cross the border of two tokens of a unigram model; ends and starts of texts are numbered.

    What a token gives to such a piece costs its score, less the best sum of what is left of it. The ends of
    token a are ends[cuts[a]:cuts[a + 1]], at `end_costs`. The pieces that begin with end e go on with
    starts[joins[e]:joins[e + 1]], and `gains` are their scores. The tokens that begin with start s are
    users[firsts[s]:firsts[s + 1]], at `start_costs`, the least first.
    """

    cuts: np.ndarray
    ends: np.ndarray
    end_costs: np.ndarray
    joins: np.ndarray
    starts: np.ndarray
    gains: np.ndarray
    firsts: np.ndarray
    start_costs: np.ndarray
    users: np.ndarray


def find_crossings(vocabulary: Vocabulary) -> tuple[list[int], Crossings]:
    """The pieces that occur, which are those that their own parts do not beat, and their Crossings."""
    pieces = vocabulary.scores
    unknown = min(pieces.values(), default=0.0) - UNKNOWN_PENALTY
    scores = dict.fromkeys("".join(pieces), unknown) | pieces
    backwards = {text[::-1]: score for text, score in scores.items()}
    halves = [(text[:cut], text[cut:], text) for text in pieces for cut in range(1, len(text))]
    ends = numbered(end for end, _, _ in halves)
    starts = numbered(start for _, start, _ in halves)
    found, of_first, of_second = [], [], []
    for token in vocabulary.of_type("NORMAL").nonzero()[0].tolist():
        text = vocabulary.texts[token]
        score = pieces[text]
        before = best_sums(text, scores)
        if before[-1] > score:
            continue
        behind = best_sums(text[::-1], backwards)
        found.append(token)
        for cut in range(len(text)):
            if text[cut:] in ends:
                of_first.append((token, ends[text[cut:]], score - before[cut]))
            start = text[: len(text) - cut]
            if start in starts:
                # Half a point off: of equal sums, which are whole, that with the longest last piece is taken.
                of_second.append((starts[start], score - behind[cut] - 0.5 * (cut == 0), token))
    joined = [(ends[end], starts[start], pieces[text]) for end, start, text in halves]
    return found, Crossings(
        *grouped(of_first, 2, len(vocabulary.texts)),
        *grouped(joined, 2, len(ends)),
        *grouped(of_second, 2, len(starts)),
    )


@numba_jit
def refuse_crossed(tokens, table, cuts, ends, end_costs, joins, starts, gains, firsts, start_costs, users):
    """As refuse_pairs for a unigram model; the arrays after `table` are those of Crossings."""
    for first in tokens:
        for i in range(cuts[first], cuts[first + 1]):
            end = int(ends[i])
            for k in range(joins[end], joins[end + 1]):
                start = int(starts[k])
                for use in range(firsts[start], firsts[start + 1]):
                    if end_costs[i] + start_costs[use] >= gains[k]:
                        break
                    second = int(users[use])
                    table[first, second >> 3] &= ~np.uint8(1 << (second & 7))


def find_joins(vocabulary: Vocabulary) -> tuple[list[int], MergeTable]:
    """The pieces that BPE makes of their own text, which are those that occur, and their MergeTable."""
    found = {}
    for token in vocabulary.of_type("NORMAL").nonzero()[0].tolist():
        merges = find_merges(vocabulary.texts[token], vocabulary.scores)
        if merges is not None:
            found[token] = merges
    return sorted(found), tabulate(found, vocabulary.scores, len(vocabulary.texts))


def pair_table(vocabulary: Vocabulary) -> np.ndarray:
    """(V, V / 8) uint8: for each last token the ones that the tokenizer leaves apart from it."""
    if vocabulary.model == UNIGRAM:
        refuse_some, (found, arrays) = refuse_crossed, find_crossings(vocabulary)
    else:
        refuse_some, (found, arrays) = refuse_pairs, find_joins(vocabulary)
    occurs = vocabulary.of_type("BYTE", "UNKNOWN", "USER_DEFINED")
    occurs[[BOS, *found]] = True
    table = np.tile(pack_bits(occurs), (len(occurs), 1))
    parts = np.array_split(np.array(found, np.int64), usable_cores())
    parallel_map(lambda part: refuse_some(part, table, *arrays), parts)
    return table


# === CANONICAL ===
# In: as PAIRS. Out: `Canonical`, which says for every place of a text what token can come next. A tokenizer
# writes one of many spellings of a text, so after some tokens others never come: those that it would have
# joined otherwise, half a character, a case operator without its word. With CANONICAL_MASK=1 their logits get
# lost before the softmax, in every score (`refuse`). What is refused follows from the tokens before, and all
# that remains sums to 1.
#
# It is exact: no rule refuses what the tokenizer can write, whatever the text. `find_refused` proves it on
# shards, and a run does so on training tokens before it starts. A rule that most texts keep and some do not
# is no rule: where one is added to `grammar`, all that the normaliser makes of a text has to be thought of.

REFUSED_LOGIT = -1e4  # its softcap is -LOGIT_SOFTCAP: no share of the sum, and still a finite loss
PROOF_TOKENS = 1 << 24  # of training, in which a run looks for what is refused
TITLE, ALLCAPS, CAPNEXT, ESC, LOWER = "\ue001\ue002\ue003\ue004\ue005"  # the case operators
# What the normaliser may make of that after which LOWER stands: the end of a sentence, a quote or a bracket.
SENTENCE_TAILS = tuple(".!?\"')]\u2019\u201d")


def refuse(logits: Tensor, mask: TokenMask) -> Tensor:
    """`logits` (N, V) with REFUSED_LOGIT in place of those of the tokens that cannot come."""
    packed = mask.table[mask.rows.flatten()]
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    return torch.where(bits.flatten(1)[:, : logits.size(1)] > 0, logits, REFUSED_LOGIT)


# States. After most tokens what may come depends on the last one alone. Not so inside a character that is
# spelled in bytes, and after an operator that stands in the text itself, behind ESC. Their states are found
# from left to right, and have rows of their own.


class ByteState(NamedTuple):
    """A character that lacks `missing` bytes; `prefix` are those so far, or none if the next may be any."""

    prefix: bytes
    missing: int


def next_bytes(state: ByteState, spelled: set[bytes]) -> dict[int, ByteState | None]:
    """The bytes that may come in `state`, and the state after each, None where the character is complete.

    Characters that are `spelled` by a piece are not written in bytes.
    """
    found: dict[int, ByteState | None] = {}
    for byte in range(0x80, 0xC0):
        text = state.prefix + bytes([byte])
        if state.prefix and not is_utf8(text + b"\x80" * (state.missing - 1)):
            continue  # too long a form of a short character, or half a surrogate pair
        if state.missing > 1:
            known = state.prefix and any(other.startswith(text) for other in spelled)
            found[byte] = ByteState(text if known else b"", state.missing - 1)
        elif text not in spelled:
            found[byte] = None
    return found


def is_utf8(text: bytes) -> bool:
    """Whether `text` is well-formed UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def first_bytes(spelled: set[bytes]) -> dict[int, ByteState | None]:
    """As next_bytes at the start of a character."""
    found: dict[int, ByteState | None] = {byte: None for byte in range(0x80) if bytes([byte]) not in spelled}
    for byte in range(0xC2, 0xF5):
        found[byte] = ByteState(bytes([byte]), 1 + (byte >= 0xE0) + (byte >= 0xF0))
    return found


def byte_states(spelled: set[bytes]) -> list[dict[int, int]]:
    """By state, the bytes that may come and the number of the state after each; 0 is no character begun."""
    numbers: dict[ByteState | None, int] = {None: 0}
    moves = [first_bytes(spelled)]
    for found in moves:
        for state in found.values():
            if state not in numbers:
                numbers[state] = len(numbers)
                moves.append(next_bytes(state, spelled))
    return [{byte: numbers[state] for byte, state in found.items()} for found in moves]


# The kinds of token that move a state: other ones, ESC, other operators, and the byte pieces by their value.
PLAIN, ESCAPES, OPERATES, BYTES = 0, 1, 2, 3
# The states: none, behind ESC, behind what it escapes, and the unfinished characters.
NOWHERE, ESCAPING, ESCAPED, SPELLING = 0, 1, 2, 3


def state_steps(moves: list[dict[int, int]]) -> np.ndarray:
    """The state (states, kinds) after a token of each kind, `moves` being those of byte_states."""
    steps = np.zeros((SPELLING - 1 + len(moves), BYTES + 256), np.int64)
    for state in range(len(steps)):
        found = moves[0] | (moves[state - SPELLING + 1] if state >= SPELLING else {})
        for byte, number in found.items():
            steps[state, BYTES + byte] = number and number + SPELLING - 1
    steps[:, ESCAPES] = ESCAPING
    steps[ESCAPING, [ESCAPES, OPERATES]] = ESCAPED
    return steps


@numba_jit
def fill_rows(tokens, row, kinds, steps, rows):
    """Enter the row of the table after each of `tokens`, which come in `row`: a token's own, or a state's."""
    size = len(kinds)
    state = max(0, row - size + 1)
    for place in range(len(tokens)):
        state = steps[state, kinds[tokens[place]]]
        rows[place] = size + state - 1 if state else tokens[place]


# Rules for single tokens: spaces, and the case operators, which stand before letters. `grammar` has them all.


def begins_word(text: str) -> bool:
    """Whether `text` may follow an operator: spaces, and a letter if there is more.

    The normaliser joins a letter and the accents behind it, and the operator is of the letter.
    """
    word = text.lstrip(WORD_START)
    return not word or is_letter(word[0])


def is_letter(character: str) -> bool:
    """Whether it is an ASCII letter, with or without accents."""
    return unicodedata.normalize("NFD", character)[0] in string.ascii_letters


def case_version(vocabulary: Vocabulary) -> int:
    """The version of CaseOps (lossless_caps.py) whose operators the tokenizer has, 0 if it has none."""
    marked = vocabulary.of_type("USER_DEFINED").nonzero()[0]
    operators = {vocabulary.texts[token] for token in marked}
    if not operators.issuperset((TITLE, ALLCAPS, CAPNEXT, ESC)):
        return 0
    return 3 if LOWER in operators else 1


def grammar(vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(last tokens, tokens that cannot come after them), both (V,) bool, of every rule.

    Tokens without a text (bytes, what is unknown, BOS) are refused by none.
    """
    where = vocabulary.where
    begins = np.arange(len(vocabulary.texts)) == BOS
    spaced = where(lambda text: text.startswith(WORD_START))
    if vocabulary.dummy_prefix:
        yield begins, where(bool) & ~spaced
    elif vocabulary.joins_spaces:
        yield begins, spaced
    if vocabulary.joins_spaces:
        yield where(lambda text: text.endswith(WORD_START)), spaced

    version = case_version(vocabulary)
    if version and vocabulary.joins_spaces:
        no_letter = where(lambda text: not is_letter(text[0]))
        no_word = where(lambda text: not begins_word(text))
        # Version 1 has its operators behind the space.
        yield where(lambda text: text in (TITLE, ALLCAPS)), no_word if version == 3 else no_letter
        yield where(lambda text: text == CAPNEXT), no_letter
    if version == 3 and vocabulary.joins_spaces:
        yield where(lambda text: text == LOWER), no_word
        within = where(lambda text: not text.endswith((*SENTENCE_TAILS, WORD_START)))
        yield within, where(lambda text: text == LOWER)
        yield where(lambda text: not is_letter(text[-1])), where(lambda text: text == CAPNEXT)


def pack_bits(columns: np.ndarray) -> np.ndarray:
    """bool (..., V) as uint8 (..., V / 8), the first in the lowest bit."""
    return np.packbits(columns, axis=-1, bitorder="little")


class Canonical:
    """Which tokens can come at every place of a text, from the tokenizer in `path` alone; Stop as
    read_vocabulary.

    `table` (V + states - 1, V / 8) uint8 has a row of bits for each last token and behind these for each
    state. Byte pieces, the unknown token, user-defined symbols and BOS may come after all that can, unless a
    state or a rule says otherwise; other control tokens, and pieces that no text is encoded to, nowhere. BOS
    may come in every state: a text may be cut.
    """

    def __init__(self, path: Path):
        vocabulary = read_vocabulary(path)
        size = len(vocabulary.texts)
        self.vocabulary = vocabulary
        self.kinds = vocabulary.bytes + BYTES
        self.kinds[vocabulary.bytes < 0] = PLAIN
        if case_version(vocabulary):
            self.kinds[vocabulary.where(lambda text: text in (TITLE, ALLCAPS, CAPNEXT, LOWER))] = OPERATES
            self.kinds[vocabulary.where(lambda text: text == ESC)] = ESCAPES
        spelled = {text.encode() for text in vocabulary.texts if len(text) == 1}
        moves = byte_states(spelled)
        self.steps = state_steps(moves)

        self.begins = np.arange(size) == BOS
        table = pair_table(vocabulary)
        self.table = np.concatenate([table, self.state_rows(moves, table[BOS])])
        never = (vocabulary.bytes >= 0) & ~np.isin(vocabulary.bytes, list(moves[0]))
        self.table[: size + SPELLING - 1] &= ~pack_bits(never)
        for last, refused in grammar(vocabulary):
            self.table[:size][last] &= ~pack_bits(refused)

    def state_rows(self, moves: list[dict[int, int]], everything: np.ndarray) -> np.ndarray:
        """The rows of the states but NOWHERE; `everything` (V / 8,) has all tokens that occur."""
        rows = np.tile(everything, (len(self.steps) - 1, 1))
        if case_version(self.vocabulary) == 3:
            rows[ESCAPING - 1] = pack_bits(self.begins | (self.kinds == ESCAPES) | (self.kinds == OPERATES))
        for number, found in enumerate(moves[1:]):
            rows[SPELLING - 1 + number] = pack_bits(self.begins | np.isin(self.vocabulary.bytes, list(found)))
        return rows

    def rows(self, tokens: np.ndarray, row: int = BOS) -> np.ndarray:
        """By place of a text (N,) that comes in `row`, the row that says what can come next, (N,) int32."""
        rows = np.empty(len(tokens), np.int32)
        fill_rows(tokens.astype(np.int32), row, self.kinds, self.steps, rows)
        return rows

    def find_refused(self, tokens: np.ndarray, row: int = BOS) -> tuple[int, int, int]:
        """(how many of `tokens`, which come in `row`, are refused, the place of the first, the last row)."""
        rows = np.append(np.int32(row), self.rows(tokens, row))
        bits = self.table[rows[:-1], tokens >> 3] >> (tokens & 7) & 1
        wrong = np.flatnonzero(bits == 0)
        return len(wrong), int(wrong[0]) if len(wrong) else -1, int(rows[-1])


def open_canonical(run: Run, data: Dataset) -> None:
    """Make the mask of a run that has CANONICAL_MASK=1 and none yet; Stop if training tokens are refused.

    No validation token is looked at: that none is refused follows from how the mask is made.
    """
    if not run.config.canonical_mask or run.canonical is not None:
        return
    began = run.now()
    canonical = Canonical(data.tokenizer)
    built = run.now() - began
    size = len(canonical.kinds)
    share = 1 - np.bitwise_count(canonical.table[:size]).sum() / size**2
    seen = 0
    row = BOS
    for path, tokens in zip(data.train_files, data.train, strict=True):
        part = data.check_ids(tokens[: PROOF_TOKENS - seen], path)
        refused, place, row = canonical.find_refused(part, row)
        if refused:
            raise Stop(
                f"{path}: {refused} of {len(part)} tokens, the first at {place}, cannot be what "
                f"{data.tokenizer} has written; set CANONICAL_MASK=0, or {AGAIN}"
            )
        seen += len(part)
    proof = f"none of {seen} training tokens is refused" if seen else "no training shards here to prove it on"
    run.log(f"canonical mask: {share:.1%} of all pairs cannot occur, {proof} (built in {built:.1f}s)")
    run.canonical = canonical


# === SLOTS ===
# In: the lengths of documents. Out: what the mixture needs to score them side by side in slots that never
# wait: the plan of turns, the cache of keys and values, an optimiser whose rows begin at any time. Each of
# eight streams has TTT_BATCH_SIZE slots, and a slot takes the next document as soon as its own ends. Which
# document is in which slot at which `Turn` follows from lengths alone, so it is the same for any number of
# ranks. All turns have one shape, but for the length of the cache that they read, of which there are few.

CACHE_LENGTHS = 4  # each half the next, the last TTT_EVAL_SEQ_LEN less a chunk


def plan_caches(config: Config) -> list[int]:
    """The lengths of cache that a forward may read, the shortest first; all but the longest in eights."""
    most = config.ttt_eval_seq_len - config.ttt_mixture_chunk
    return sorted({min(most, 8 * -(-most >> 3 + halvings)) for halvings in range(CACHE_LENGTHS)})


class Turn(NamedTuple):
    """What the slots of a stream do in one forward.

    `documents` (R, 2) are those in the slots, zeros where there is none, `place` (R,) their targets before
    the chunk, `plan` (R, 3) the windows of the chunk (see plan_windows). `opens` and `ends` (N,) are the
    slots in which a document begins and ends, `cached` is the length of the cache that is read.
    """

    documents: np.ndarray
    place: np.ndarray
    plan: np.ndarray
    opens: np.ndarray
    ends: np.ndarray
    cached: int


def plan_turns(config: Config, documents: np.ndarray) -> Iterator[Turn]:
    """The turns in which a stream scores `documents` (N, 2) in their order, from their lengths alone."""
    chunk = config.ttt_mixture_chunk
    caches = plan_caches(config)
    held = np.zeros((config.ttt_batch_size, 2), np.int64)
    place = np.zeros(len(held), np.int64)
    taken = 0
    while True:
        opens = np.flatnonzero(held[:, 1] == 0)[: len(documents) - taken]
        held[opens] = documents[taken : taken + len(opens)]
        place[opens] = 0
        taken += len(opens)
        if not held.any():
            return
        first = held[:, 0] + place
        plan = np.stack([first, np.minimum(first + chunk + 1, held[:, 1]), first + 1], 1)
        plan[held[:, 1] == 0] = 0
        ended = (held[:, 1] > 0) & (plan[:, 1] == held[:, 1])
        deepest = min(int(place.max()), caches[-1])
        cached = next(length for length in caches if length >= deepest)
        yield Turn(held.copy(), place.copy(), plan, opens, np.flatnonzero(ended), cached)
        place += chunk
        held[ended] = 0
        place[held[:, 1] == 0] = 0


def deal_documents(documents: np.ndarray) -> list[np.ndarray]:
    """The `documents` (N, 2) of each stream: one after the other to the stream with the fewest tokens."""
    work = [(0, stream) for stream in range(STREAMS)]
    dealt: list[list[int]] = [[] for _ in range(STREAMS)]
    for number, (first, end) in enumerate(documents):
        tokens, stream = heapq.heappop(work)
        dealt[stream].append(number)
        heapq.heappush(work, (tokens + int(end - first), stream))
    return [documents[numbers] for numbers in dealt]


class KeyCache:
    """The last keys and values of every row, by visit; token p of a document lies at place p % length."""

    def __init__(self, model: GPT, rows: int, longest: int, chunk: int, device: torch.device):
        config = model.config
        visits = range(len(model.routes[model.loops]))
        heads = (config.num_kv_heads, config.model_dim // config.num_heads)

        def make(places: int) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(rows, places, *heads, dtype=model.dtype, device=device) for _ in visits)

        self.keys = make(longest)
        self.values = make(longest)
        self.fresh_keys = make(chunk)
        self.fresh_values = make(chunk)
        self.rows = torch.arange(rows, device=device)[:, None]
        self.chunk = torch.arange(chunk, device=device)

    def past(self, position: Tensor, previous: Tensor, cached: int) -> Past:
        """What a chunk goes on from that reads `cached` places; see Past."""
        keys, values = (tuple(full[:, :cached] for full in kind) for kind in (self.keys, self.values))
        return Past(position, previous, keys, values, self.fresh_keys, self.fresh_values)

    def keep(self, past: Past) -> None:
        """Put the keys and values that a forward has left in `past` into the cache."""
        places = (past.position[:, None] + self.chunk) % self.keys[0].size(1)
        for full, fresh in zip(
            (*self.keys, *self.values), (*past.fresh_keys, *past.fresh_values), strict=True
        ):
            full[self.rows, places] = fresh


class RowAdam(torch.optim.Optimizer):
    """AdamW (see adapter_optimizer) in which each row has a learning rate and an age of its own.

    Rows are along dim 1 of every parameter of `lora`.
    """

    def __init__(self, config: Config, lora: LoRA, compiled: bool):
        super().__init__(lora.parameters(), {})
        self.parameters = list(lora.parameters())
        self.betas = (config.ttt_beta1, config.ttt_beta2)
        self.decay = config.ttt_weight_decay
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters if config.ttt_beta1]
        rows = self.parameters[0].size(1)
        self.rates = torch.zeros(rows, device=self.parameters[0].device)
        self.ages = torch.zeros_like(self.rates)
        self.move = torch.compile(move_rows, dynamic=False, fullgraph=True) if compiled else move_rows

    def open(self, rows: Tensor, rates: Tensor) -> None:
        """Begin anew in `rows` (N,) at `rates` (N,)."""
        self.rates[rows] = rates
        self.ages[rows] = 0
        for kept in (*self.squares, *self.means):
            kept.index_fill_(1, rows, 0)

    @torch.no_grad()
    def step(self) -> None:
        """One step of all rows, and no gradients after it."""
        self.ages += 1
        first, second = self.betas
        # The corrections of both moments are part of the rate, but for the eps.
        rates = self.rates * (1 - second**self.ages).sqrt() / (1 - first**self.ages)
        rates, keep = (rows.view(1, -1, 1, 1) for rows in (rates, 1 - self.decay * self.rates))
        gradients = [parameter.grad for parameter in self.parameters]
        self.move(self.parameters, gradients, self.squares, self.means, rates, keep, first, second)
        self.zero_grad()


def move_rows(
    parameters: list[Tensor],
    gradients: list[Tensor],
    squares: list[Tensor],
    means: list[Tensor],
    rates: Tensor,
    keep: Tensor,
    first: float,
    second: float,
) -> None:
    """A step of AdamW in place: `rates` and what to `keep` of weights by row; no means if `first` is 0."""
    every = zip(parameters, gradients, squares, strict=True)
    for number, (parameter, gradient, square) in enumerate(every):
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        if means:
            gradient = means[number].mul_(first).add_(gradient, alpha=1 - first)
        parameter.mul_(keep).sub_(gradient / square.sqrt().add_(1e-10) * rates)


# === MIXTURE ===
# In: as ADAPTATION. Out: every target scored once by a mixture of causal experts. Only the tokens of a turn's
# chunks run; what they attend to comes from a cache of keys and values that were written when earlier chunks
# were scored. The experts are the network with adapters that learn at several rates, all rows of one forward,
# and copies of what followed the longest match of the last tokens, in the document and in those that ended
# before. All weights are Bayes', with a share that goes back to where they start. What is learnt from losses
# is handed on within a stream. Nothing here waits for the device.

# A copy is looked for by so many of the last tokens, the most first.
DOCUMENT_ORDERS = np.array([16, 8, 5, 3, 2, 1])
HISTORY_ORDERS = np.array([16, 10, 6])
LONGEST_MATCH = 32
# The class of a match by its length, 0 to LONGEST_MATCH; 0 is none.
MATCH_CLASSES = np.searchsorted([1, 2, 3, 4, 5, 7, 10, 16, 24, 32], np.arange(LONGEST_MATCH + 1), "right")
# Borders of the class of a copy by the probability that the network gives to it.
GUESS_BORDERS = (0.003, 0.02, 0.1, 0.3, 0.6, 0.85)
TRUSTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)  # how much of the probability a copy may have
FIRST_DOUBT = 3.0  # before a class of copies is known, a trust weighs exp(-FIRST_DOUBT * trust)
FARTHEST_SHIFT = math.log(64.0)  # of all rates, either way
SHIFT_CARRY = 0.3  # how far they move with each document
TABLE_BITS = 22  # slots of a table of contexts, for each order


@numba_inline
def context_slot(tokens, end, order, slots):
    """The slot of the `order` tokens before `end` in a table of `slots`, a power of two."""
    code = np.uint64(order)
    for place in range(end - order, end):
        code = (code ^ np.uint64(tokens[place])) * np.uint64(0x9E3779B97F4A7C15)
        code ^= code >> np.uint64(29)
    return np.int64(code & np.uint64(slots - 1))


@numba_inline
def match_length(tokens, here, there, most):
    """How many tokens before `here` are those before `there`, at most `most`."""
    length = 0
    while length < most and tokens[here - 1 - length] == tokens[there - 1 - length]:
        length += 1
    return length


@numba_jit
def find_in_document(tokens, first, end, orders, table, copies, lengths):
    """For every place of a document after the first, the token after the longest match, and its length.

    `table` (orders, slots) holds, by the hash of the last tokens, the place after their latest occurrence; a
    place is entered once its own token has been looked for. What is left of other documents does not count.
    """
    for place in range(first + 1, end):
        for row in range(len(orders)):
            if place - first < orders[row]:
                continue
            slot = context_slot(tokens, place, orders[row], table.shape[1])
            found = table[row, slot]
            if lengths[place] == 0 and first < found < place:
                length = match_length(tokens, place, found, min(LONGEST_MATCH, found - first))
                if length >= orders[row]:
                    copies[place] = tokens[found]
                    lengths[place] = length
            table[row, slot] = place


@numba_jit
def find_in_history(tokens, first, end, orders, table, copies, lengths):
    """As find_in_document from the documents that are entered; the length is the order of the context."""
    for place in range(first + 1, end):
        for row in range(len(orders)):
            if place - first < orders[row]:
                continue
            found = table[row, context_slot(tokens, place, orders[row], table.shape[1])]
            if found > 0 and match_length(tokens, place, found, orders[row]) == orders[row]:
                copies[place] = tokens[found]
                lengths[place] = orders[row]
                break


@numba_jit
def enter_contexts(tokens, first, end, orders, table):
    """Enter a document that was scored into `table`, see find_in_document."""
    for place in range(first + 1, end):
        for row in range(len(orders)):
            if place - first >= orders[row]:
                table[row, context_slot(tokens, place, orders[row], table.shape[1])] = place


class Copies:
    """For every target, what followed the longest match of the tokens before it.

    From its document (0) and from those scored before it began (1): `tokens` and `lengths` (2, N), a length
    of 0 where there is no match. Scored before it are all documents of earlier phases, and those of its
    stream that ended at an earlier turn: streams run side by side, none waits for another within a phase.
    """

    def __init__(self, text: np.ndarray, which: str):
        self.text = text
        self.which = which
        self.tokens = np.zeros((2, len(text)), np.uint16)
        self.lengths = np.zeros((2, len(text)), np.uint8)
        bits = min(TABLE_BITS, len(text).bit_length() + 1)
        self.document_table = np.zeros((len(DOCUMENT_ORDERS), 1 << min(bits, 16)), np.int64)
        self.phases_table = np.zeros(
            (len(HISTORY_ORDERS), 1 << bits), np.int64
        )  # of the phases that are over
        self.history_table = self.phases_table.copy()  # and of the stream that is being scored
        self.events: collections.deque[tuple[int, int, int, int]] = collections.deque()

    def begin(self, turns: list[Turn]) -> None:
        """Begin a phase of one stream with its `turns`."""
        self.history_table[:] = self.phases_table
        events = []
        for number, turn in enumerate(turns):
            events += [(number, 1, *turn.documents[slot]) for slot in turn.opens]
            if self.which == "all":
                events += [(number + 1, 0, *turn.documents[slot]) for slot in turn.ends]
        self.events = collections.deque(sorted(events))

    def advance(self, turn: int) -> None:
        """Find the copies of documents up to those that begin at a `turn`, when all turns before are scored.

        Not all at once, so that it happens while the device is busy with the turns before.
        """
        while self.events and self.events[0][0] <= turn:
            _, opens, first, end = self.events.popleft()
            if opens:
                self.find(first, end)
            else:
                self.enter(first, end, self.history_table)

    def finish(self, documents: np.ndarray) -> None:
        """End a phase that has scored `documents` (N, 2), of all streams: every rank enters all of them.

        Tokens are all that is needed, so nothing is sent from rank to rank.
        """
        if self.which == "all":
            for first, end in documents:
                self.enter(first, end, self.phases_table)

    def enter(self, first: int, end: int, table: np.ndarray) -> None:
        """Let later documents copy from one that has ended."""
        enter_contexts(self.text, first, end, HISTORY_ORDERS, table)

    def find(self, first: int, end: int) -> None:
        """Find the copies of a document."""
        where = (self.text, first, end)
        if self.which != "none":
            found = (self.tokens[0], self.lengths[0])
            find_in_document(*where, DOCUMENT_ORDERS, self.document_table, *found)
        if self.which == "all":
            found = (self.tokens[1], self.lengths[1])
            find_in_history(*where, HISTORY_ORDERS, self.history_table, *found)


def mix_experts(log_weights: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (R, K, T) of a mixture before each target, and those (R, K) after all, by Bayes' rule.

    `log_p` (R, K, T) are the targets' under every expert, 0 for all where there is no target. All are
    logarithms in fp64.
    """
    sums = log_weights[:, :, None] + log_p.cumsum(2)
    before = torch.cat((log_weights[:, :, None], sums[:, :, :-1]), 2).log_softmax(1)
    return before, sums[:, :, -1].log_softmax(1)


def mix_copies(
    log_p: Tensor, hit: Tensor, match: Tensor, trusts: Tensor, log_trust: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (R, T) of targets after copies have got their part, and the trust after them.

    `log_p` (R, T) are those before, `hit` (R, T) says which copy is the target, `match` (R, T) is its class,
    0 where there is none. `log_trust` (classes, G) are the weights of `trusts` (G,) by class: each hands its
    part of the probability to the copy. A chunk counts from the next one on.
    """
    given = ((1 - trusts) * log_p.exp()[..., None] + trusts * hit[..., None]).clamp_min(1e-300).log()
    mixed = torch.where(match > 0, (log_trust[match] + given).logsumexp(2), log_p)
    # As a product, which sums in a fixed order on every device.
    members = F.one_hot(match.flatten(), len(log_trust)).to(log_p.dtype)
    members[:, 0] = 0
    return mixed, (log_trust + members.T @ given.flatten(0, 1)).log_softmax(1)


class MixedChunk(NamedTuple):
    """A chunk of each of several documents, a row each, in host memory or on the device.

    `chosen`, `places` and `weight` are as in ChunkBatch, `scored` (R, T) marks the targets; `position` (R,)
    and `previous` are those of Past; the guesses of the batch are copies, `match` (2, R, T) their classes.
    `opens` and `ends` (N,) are the rows whose document begins and ends.
    """

    batch: Batch
    scored: Tensor
    chosen: Tensor
    places: Tensor
    weight: Tensor
    position: Tensor
    previous: Tensor
    match: Tensor
    opens: Tensor
    ends: Tensor


def mixed_chunk(copies: Copies, turn: Turn, chunk: int) -> MixedChunk:
    """The chunks of a turn, `chunk` targets wide."""
    tokens = copies.text
    rows = len(turn.plan)
    batch, scored, places = window_batch(tokens, turn.plan, rows, chunk, 0)
    goes_on = turn.plan[:, 1] < turn.documents[:, 1]
    back = np.array([2, 1])
    before = tokens[np.maximum(turn.plan[:, :1] - back, 0)].astype(np.int64) * (turn.place[:, None] >= back)

    inside = scored.numpy()
    guesses = np.zeros((2, *inside.shape), np.int64)
    guesses[:, inside] = copies.tokens[:, places.numpy()]
    match = np.zeros((2, *inside.shape), np.int64)
    match[:, inside] = MATCH_CLASSES[copies.lengths[:, places.numpy()]]
    return MixedChunk(
        batch._replace(guesses=torch.from_numpy(guesses)),
        scored,
        scored.flatten().nonzero()[:, 0],
        places,
        learning_weight(scored, goes_on),
        torch.from_numpy(turn.place),
        torch.from_numpy(before),
        torch.from_numpy(match),
        torch.from_numpy(turn.opens),
        torch.from_numpy(turn.ends),
    )


def give_back(log_weights: Tensor, log_prior: Tensor, share: float) -> Tensor:
    """The weights with a share from the prior, in logarithms (fixed share): none is ever lost."""
    return torch.lerp(log_weights.exp(), log_prior.exp(), share).log()


class Weights(NamedTuple):
    """Logarithms, fp64: the prior (K,) of the adapters in a document, the trust (2, classes, G) in copies.

    `shift` () is that of the factor on all rates.
    """

    adapters: Tensor
    trust: Tensor
    shift: Tensor


class Mixer:
    """The weights of adapters and of copies in the slots of one stream at a time.

    `rates` (K,) fp64 are those of the adapters. All of them move together, document by document, to where the
    weights are: their geometric mean goes to the rate that was found best.
    """

    def __init__(self, config: Config, rates: Tensor):
        device = rates.device
        learns = rates > 0
        self.rates = rates
        self.log_rates = torch.where(learns, rates, 1.0).log()
        self.learns = learns.double()
        self.share = config.ttt_mixture_share
        self.carry = config.ttt_mixture_carry
        self.borders = torch.tensor(GUESS_BORDERS, dtype=torch.float64, device=device).log()
        uniform = torch.zeros_like(rates).log_softmax(0)
        classes = 1 + int(MATCH_CLASSES.max()) * (len(GUESS_BORDERS) + 1)
        self.trusts = torch.tensor(TRUSTS, dtype=torch.float64, device=device)
        self.first_trust = (-FIRST_DOUBT * self.trusts).log_softmax(0).repeat(2, classes, 1)
        self.streams = [Weights(uniform, self.first_trust, rates.new_zeros(()))] * STREAMS
        self.within = uniform.repeat(config.ttt_batch_size, 1)
        self.shifts = rates.new_zeros(config.ttt_batch_size)

    def take(self, stream: int) -> None:
        """Go on with the slots of `stream`."""
        self.prior, self.trust, self.shift = self.streams[stream]

    def leave(self, stream: int) -> None:
        """Keep what the documents of `stream` have left."""
        self.streams[stream] = Weights(self.prior, self.trust, self.shift)

    def open(self, slots: Tensor) -> Tensor:
        """Begin documents in `slots` (N,); the rates (K,) of their adapters."""
        self.within = self.within.index_copy(0, slots, self.prior.expand(len(slots), -1))
        self.shifts = self.shifts.index_copy(0, slots, self.shift.expand(len(slots)))
        return self.rates * self.shift.exp()

    def mix(self, log_p: Tensor, chunk: MixedChunk) -> Tensor:
        """Log-probabilities (R, T) of the targets of a chunk; what they teach counts from the next one on.

        `log_p` (3, R, K, T) in fp64 are those of targets and copies under every adapter.
        """
        scored = chunk.scored
        before, after = mix_experts(self.within, log_p[0] * scored[:, None])
        mixed, *guessed = (before + log_p).logsumexp(2)
        learnt = []
        for source, guess in enumerate(guessed):
            likely = torch.bucketize(guess, self.borders)
            match = chunk.match[source]
            match = (match > 0) * (1 + (match - 1) * (len(self.borders) + 1) + likely)
            hit = chunk.batch.guesses[source] == chunk.batch.targets
            mixed, trust = mix_copies(mixed, hit, match, self.trusts, self.trust[source])
            learnt.append(trust)
        self.trust = give_back(torch.stack(learnt), self.first_trust, self.share)
        goes_on = scored.any(1, keepdim=True)
        self.within = torch.where(goes_on, give_back(after, self.prior, self.share), after)
        return mixed

    def close(self, slots: Tensor) -> None:
        """End the documents in `slots` (N,): the next ones start from where the weights are."""
        carry, shift_carry = (1 - (1 - part) ** len(slots) for part in (self.carry, SHIFT_CARRY))
        ended = self.within[slots].exp().mean(0)
        self.prior = torch.lerp(self.prior.exp(), ended, carry).log()
        count = self.learns.sum().clamp_min(1)
        found = ended * self.learns
        away = (found * self.log_rates).sum() - found.sum() * (self.learns * self.log_rates).sum() / count
        goal = (self.shifts[slots].mean() + away).clamp(-FARTHEST_SHIFT, FARTHEST_SHIFT)
        self.shift = torch.lerp(self.shift, goal, torch.full_like(goal, shift_carry))


class Mixture:
    """The experts of one rank: adapters with their caches, copies, and what mixes them."""

    def __init__(
        self, run: Run, model: GPT, forward: Callable[..., Tensor], tally: Tally, compiled: bool = False
    ):
        config = run.config
        self.run = run
        self.forward = forward
        self.tally = tally
        rates = [config.ttt_lora_lr * float(rate) for rate in config.ttt_mixture_rates.split(",")]
        self.count = len(rates)
        rows = config.ttt_batch_size * self.count
        self.lora = LoRA(config, rows, run.device, config.ttt_mixture_rank)
        first = LoRA(config, self.count, run.device, config.ttt_mixture_rank)
        first.reset(0)
        self.first = [parameter.data for parameter in first.parameters()]  # with which every document begins
        for parameter, start in zip(self.lora.parameters(), self.first, strict=True):
            parameter.data.copy_(start.repeat(1, config.ttt_batch_size, 1, 1))
        self.optimizer = RowAdam(config, self.lora, compiled)
        self.cache = KeyCache(model, rows, plan_caches(config)[-1], config.ttt_mixture_chunk, run.device)
        self.copies = Copies(tally.validation.tokens, config.ttt_mixture_copies)
        self.mixer = Mixer(config, torch.tensor(rates, dtype=torch.float64, device=run.device))

    def score_phase(self, batches: list[np.ndarray], phase: int, first_seed: int) -> None:
        """Score this rank's streams of the `batches` (documents (N, 2) each), in their order."""
        documents = np.concatenate(batches)
        dealt = deal_documents(documents)
        plans = {stream: list(plan_turns(self.run.config, dealt[stream])) for stream in self.run.streams}
        turns = [(stream, number) for stream, plan in plans.items() for number in range(len(plan))]
        for stream, number in self.run.progress(f"val:ttt phase {phase + 1}", turns):
            if number == 0:
                self.copies.begin(plans[stream])
            self.copies.advance(number)
            self.mixer.take(stream)
            self.take_turn(plans[stream][number])
            self.mixer.leave(stream)
        self.copies.finish(documents)

    def take_turn(self, turn: Turn) -> None:
        """Score the chunks of a turn, then learn from them."""
        chunk = to_device(mixed_chunk(self.copies, turn, self.run.config.ttt_mixture_chunk), self.run)
        chunk = chunk._replace(batch=self.tally.masked(chunk.batch, chunk.chosen, chunk.places))
        self.open(chunk.opens)
        self.run.count_tokens(self.count * chunk.batch.inputs.numel(), learns=True)
        losses, past = self.run_chunk(chunk, turn.cached)
        scores = self.mixer.mix(-losses.detach().double(), chunk)
        self.tally.add(-scores.flatten()[chunk.chosen], chunk.places)
        self.cache.keep(past)
        (losses[0] * chunk.weight[:, None]).sum().backward()
        self.optimizer.step()
        if len(chunk.ends):
            self.mixer.close(chunk.ends)

    def open(self, slots: Tensor) -> None:
        """Begin documents in `slots` (N,)."""
        if len(slots) == 0:
            return
        rates = self.mixer.open(slots).float()
        rows = (slots[:, None] * self.count + torch.arange(self.count, device=slots.device)).flatten()
        for parameter, first in zip(self.lora.parameters(), self.first, strict=True):
            parameter.data[:, rows] = first.repeat(1, len(slots), 1, 1)
        self.optimizer.open(rows, rates.repeat(len(slots)))

    def run_chunk(self, chunk: MixedChunk, cached: int) -> tuple[Tensor, Past]:
        """The losses (3, R, K, T) of targets and copies for every rate, and what is left for the cache."""
        count = self.count
        batch = chunk.batch
        position = chunk.position.repeat_interleave(count)
        past = self.cache.past(position, chunk.previous.repeat_interleave(count, 0), cached)
        rows = Batch(
            batch.inputs.repeat_interleave(count, 0),
            batch.targets.repeat_interleave(count, 0),
            past=past,
            guesses=batch.guesses.repeat_interleave(count, 1),
            mask=batch.mask and batch.mask._replace(rows=batch.mask.rows.repeat_interleave(count, 0)),
        )
        losses = self.forward(rows, lora=self.lora)
        return losses.unflatten(1, (len(chunk.scored), count)), past


def score_mixture(
    run: Run, model: nn.Module, forward: Callable[..., Tensor], tally: Tally, compiled: bool = False
) -> None:
    """Score documents by a mixture of experts; between phases all weights learn as in doc_lora.

    `forward` takes adapters and caches, `model` learns (see Learner); `compiled` is for the adapters' steps.
    """
    mixture = Mixture(run, model, forward, tally, compiled)
    score_phases(run, model, tally, mixture.score_phase)


# === BUILD ===
# In: the settings. Out: `Built`, the model with its first weights and its forward, compiled where that pays,
# and `train_step`, what happens in one step of training. A reader may change what is compiled
# (`choose_compile`) or captured as a CUDA graph (`StepGraphs`).


class Built(NamedTuple):
    """The model with the initial weights of SEED, its forward, and whether that is compiled."""

    model: GPT
    forward: Callable[[Batch], Tensor]
    compiled: bool


def choose_compile(config: Config, run: Run, attend: Attend) -> bool:
    """Whether the forward is compiled; logs it with the reason, Stop if COMPILE=on cannot be had."""
    compiled = wants_compile(config, run)
    reason = f"COMPILE={config.compile}, {run.device.type}"
    if compiled and config.loader == "packed" and attend is attend_sdpa:
        # It reads where documents end, and no graph may depend on the values of a tensor.
        reason = "LOADER=packed with attention sdpa cuts rows by document, which no graph can hold"
        if config.compile == "on":
            raise Stop(f"COMPILE=on: {reason}; set COMPILE=auto, LOADER=shuffled or another ATTENTION")
        compiled = False
    state = "on" if compiled else "off"
    run.log(f"compile: {state} ({reason})")
    return compiled


def check_cuda_graphs(config: Config, run: Run, compiled: bool) -> None:
    """Stop if CUDA_GRAPHS=1 cannot be had here; logs that it is."""
    if not config.cuda_graphs:
        return
    if not run.is_cuda:
        raise Stop("CUDA_GRAPHS=1: there is no GPU; unset CUDA_GRAPHS")
    if not compiled:
        raise Stop("CUDA_GRAPHS=1: the forward is not compiled, as the log says; set COMPILE=on or unset it")
    run.log("cuda graphs: on (forward and backward of each micro-batch, and the update of the weights)")


def operator_name(target: Any, *operands: Any) -> str:
    """How an operator is described where its operands are not to be."""
    return f"target: {target}"


def set_compiler_options() -> None:
    """What torch.compile must know of this program, whatever it compiles."""
    import torch._inductor.config as inductor
    import torch._inductor.exc as inductor_errors

    # Inductor describes an operator that it cannot lower by its operands, and these by theirs: a text that
    # doubles with each addition in between. Before torch 2.13 every operator of ours is described once.
    inductor_errors.OperatorIssue.operator_str = staticmethod(operator_name)
    torch._dynamo.config.recompile_limit = 64  # graphs of one function: by shape, loop state, gradients
    # Else a graph of dynamic lengths makes symbols of FlashAttention's float defaults, and fails at layer 2.
    torch._dynamo.config.specialize_float = True
    # Parameter sums inside the backward's chains make 6 kernels spill registers (bench/gpu_compile.py, torch
    # 2.14); apart from them none does, for 1 % more bytes. Before torch 2.10 there is no such option.
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False


def check_compiler(run: Run) -> None:
    """Stop unless torch.compile makes something that runs here: it needs compilers, on a GPU as well."""

    def negate(x: Tensor) -> Tensor:
        return -x

    try:
        torch.compile(negate, dynamic=False, fullgraph=True)(torch.ones(1, device=run.device))
    except Exception as error:  # whatever Inductor, Triton and their compilers raise
        raise Stop(
            f"COMPILE={run.config.compile}: nothing can be compiled here ({describe_error(error)}); install "
            "gcc, g++ and Python's headers (apt install build-essential python3-dev), or set COMPILE=off"
        ) from None


def build(run: Run) -> Built:
    """The model of this process; one for all stages, so that it is compiled once."""
    config = run.config
    torch.manual_seed(config.seed)
    if wants_compile(config, run):
        set_compiler_options()
        check_compiler(run)
    attend = pick_attention(config, run)
    compiled = choose_compile(config, run, attend)
    check_cuda_graphs(config, run, compiled)
    fused = pick_kernels(config, run)
    feed_forward = pick_mlp(config, run, fused)
    model = GPT(config, attend, fused, run.dtype, feed_forward).to(run.device)
    for loops, route in model.routes.items():
        kind = " looped" if loops else ""
        run.log(f"route{kind}: {show_route(route)}")
    count = sum(parameter.numel() for parameter in model.parameters())
    run.log(f"model_params:{count} matrices:{len(list_matrices(model.table))}")
    if not compiled:
        return Built(model, model, compiled)
    forward = torch.compile(model, dynamic=False, fullgraph=True)
    forward.register_forward_pre_hook(open_starts)
    return Built(model, forward, compiled)


def open_starts(_: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Before a compiled forward of a Batch: let one graph hold every number of segment starts."""
    starts = inputs[0].starts
    if starts is not None:
        torch._dynamo.maybe_mark_dynamic(starts, 0)


def learn(forward: Callable[[Batch], Tensor], batch: Batch, count: int) -> Tensor:
    """Forward and backward of one of `count` micro-batches; its part of their mean loss (0-d)."""
    loss = forward(batch).mean() / count
    loss.backward()
    return loss.detach()


class StepGraphs:
    """A step as replays of CUDA graphs: one for each micro-batch, then one for the update of all weights.

    The host copies batches in, fills the numbers of the step and launches: no guard of torch.compile is
    looked at, no kernel is launched alone. There is a graph for each loop state and shape of micro-batch and
    for each phase of the optimiser (its collectives, clipping and average included). Each is recorded where
    it is first met: in warm-up, which goes through all that is foreseen. That work runs as ever the first
    time, so that what is loaded, tuned or allocated then is no part of it, and is recorded after, which
    computes nothing. That nothing in it waits for the GPU is proved by the recording, which fails otherwise.

    Weights, states, gradients and what else one graph leaves for another lie outside of the memory that all
    graphs share: they may change, but not move. Gradients add up in tensors that the update clears; no
    parameter has one between the graphs. Nothing in `learn` is random or talks to other ranks. Not measured
    on a GPU.
    """

    def __init__(
        self, run: Run, model: GPT, forward: Callable[[Batch], Tensor], optimizers: Optimizers
    ) -> None:
        self.model = model
        self.forward = forward
        self.optimizers = optimizers
        self.gradients = [(parameter, torch.zeros_like(parameter)) for parameter in model.parameters()]
        self.loss = torch.zeros((), device=run.device)
        self.stream = torch.cuda.Stream(run.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.batches: dict[Any, Batch] = {}
        self.graphs: dict[Any, torch.cuda.CUDAGraph] = {}

    def step(self, batches: list[Batch], rates: tuple[float, float, float], progress: float) -> Tensor:
        """What `train_step` does; `rates` as for Optimizers.set_rates."""
        self.loss.zero_()
        for batch in batches:
            self.learn(batch, len(batches))
        self.optimizers.set_rates(*rates)
        mixed = self.optimizers.muon.is_mixed(progress)
        self.replay(mixed, functools.partial(self.update, mixed))
        return self.loss.clone()

    def learn(self, batch: Batch, count: int) -> None:
        """`learn`, its loss and gradients added to those of the step."""
        shapes = tuple(value.shape if isinstance(value, Tensor) else value for value in batch)
        key = (self.model.loops, count, shapes)
        if key not in self.batches:
            self.batches[key] = tree_map_only(Tensor, torch.clone, batch)
        own = self.batches[key]
        for place, given in zip(own, batch, strict=True):
            if isinstance(given, Tensor):
                place.copy_(given)
        self.replay(key, functools.partial(self.add_gradients, own, count))

    def add_gradients(self, batch: Batch, count: int) -> None:
        """The work of a micro-batch's graph."""
        self.give_gradients()
        self.loss.add_(learn(self.forward, batch, count))
        for parameter, _ in self.gradients:
            parameter.grad = None

    def update(self, mixed: bool) -> None:
        """The work of an update's graph."""
        self.give_gradients()
        self.optimizers.update(mixed)
        torch._foreach_zero_([gradient for _, gradient in self.gradients])

    def give_gradients(self) -> None:
        """Let each parameter have its gradient, to which autograd adds in place."""
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def replay(self, key: Any, work: Callable[[], None]) -> None:
        """Do `work`: itself the first time, which is recorded then, by replay ever after."""
        if key in self.graphs:
            self.graphs[key].replay()
            return
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            work()
        here.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: that of the Feed pins memory, that of NCCL asks for events.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            work()
        self.graphs[key] = graph


def step_graphs(
    run: Run, model: GPT, forward: Callable[[Batch], Tensor], optimizers: Optimizers
) -> StepGraphs | None:
    """The graphs of a training that CUDA_GRAPHS=1 asks for, or None."""
    return StepGraphs(run, model, forward, optimizers) if run.config.cuda_graphs else None


def train_step(
    run: Run,
    forward: Callable[[Batch], Tensor],
    optimizers: Optimizers,
    batches: list[Batch],
    progress: float,
    step: int,
    graphs: StepGraphs | None = None,
) -> Tensor:
    """Forward, backward and update over this rank's micro-batches; their mean loss (0-d, on the device).

    With `graphs`, all of it is replayed.
    """
    config = run.config
    rates = (
        learning_rate_scale(config, progress),
        muon_momentum(config, step),
        muon_weight_decay(config, progress),
    )
    if graphs is not None:
        return graphs.step(batches, rates, progress)
    total = torch.zeros((), device=run.device)
    for batch in batches:
        total += learn(forward, batch, len(batches))
    optimizers.step(*rates, progress)
    return total


# === TRAIN ===
# In: the data and a freshly built model. Out: checkpoint.pt in the run folder with the averaged weights. The
# clock starts after `warm_up` and stops at MAX_WALLCLOCK_SECONDS less the reserve for calibration; everything
# that follows the progress of the run (learning rate, loops, weight decay) reads one number between 0 and 1.
# A killed run goes on from its last checkpoint with the same data and the same schedule. What happens in one
# step is `train_step`.


class Agreement:
    """What the ranks must decide alike after each step: how much time is spent, is a loss not finite.

    On a GPU the host queues a step, waits until the step before is done, and reads its clock then. Both facts
    are of that step, so training ends at most one step late, and the GPU never waits for the host. They are
    compared between the hosts: in the GPU's queue they would come back after the step just queued. On a CPU
    both facts are of the step itself.
    """

    def __init__(self, run: Run):
        self.run = run
        self.waiting: list[tuple[Tensor, torch.cuda.Event]] = []

    def reach(self, clock: Callable[[], float], loss: Tensor, late: bool) -> tuple[float, bool]:
        """(most seconds of `clock`, is a loss not finite) over ranks; `late`: a GPU may answer as above."""
        if self.run.is_cuda:
            loss = self.copied(loss, late)
        not_finite = not math.isfinite(loss.item())
        seconds, failed = self.run.max_over_ranks(clock(), not_finite)
        return seconds, bool(failed)

    def copied(self, loss: Tensor, late: bool) -> Tensor:
        """`loss` in host memory, or that of the step before if `late`; waits only for what it returns."""
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True)
        copy.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting = [*self.waiting, (copy, event)][-2:]
        copy, event = self.waiting[0 if late else -1]
        event.synchronize()
        return copy


def load_checkpoint(run: Run, data: Dataset) -> dict[str, Any] | None:
    """checkpoint.pt of the run folder, None if there is none.

    Stop if it is damaged or of other settings or data.
    """
    path = run.folder / "checkpoint.pt"
    shards = data.training_digest
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
    if different:
        raise Stop(f"{path}: made with other settings ({different}); set them back or choose another RUN_ID")
    if data.train_files and fingerprint != shards:  # they may be gone after training
        raise Stop(
            f"{path}: of other training data ({fingerprint}, here {shards}); "
            "put them back, or choose another RUN_ID"
        )
    return saved


def to_cpu(state: Any) -> Any:
    """A copy of a nested state with its tensors on the CPU."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def padded_batches(config: Config, feed: Feed, device: torch.device) -> list[Batch]:
    """A packed batch with every padded number of segment starts that training may meet: graphs to be made.

    From the fewest that a batch can have to half as many again as the first WARMUP_STEPS steps have.
    """
    batch = feed.get(0)[0]
    total = batch.inputs.numel()
    seen = [int((one.starts < total).sum()) for step in range(config.warmup_steps) for one in feed.load(step)]
    fewest = pad_starts(np.arange(0, total, batch.longest), total)
    most = pad_starts(np.zeros(max(seen, default=0) * 3 // 2), total)
    batches = []
    for size in range(len(fewest), max(len(fewest), len(most)) + 1, STARTS_BLOCK):
        starts = F.pad(fewest, (0, size - len(fewest)), value=total)
        batches.append(batch._replace(starts=starts.to(device)))
    return batches


def turning_points(config: Config, loops: int) -> list[float]:
    """Where, in this loop state, a step begins to be compiled otherwise: values of progress, its first on."""
    begin, end = loop_spans(config)[loops]
    switches = [until for _, until in read_schedule(config.train_seq_schedule)]
    if config.muon_mixture:
        switches.append(config.muon_mixture_start)
    return [begin, *sorted({switch for switch in switches if begin < switch < end})]


def warm_up(
    run: Run, built: Built, optimizers: Optimizers, feed: Feed, graphs: StepGraphs | None = None
) -> None:
    """Compile and allocate before the clock: WARMUP_STEPS steps per loop state; then restore all state."""
    began = time.monotonic()
    config = run.config
    cached = count_cached_files(config)
    model, forward, compiled = built
    work = functools.partial(learn, forward) if graphs is None else graphs.learn
    weights = to_cpu(model.state_dict())
    fresh = to_cpu(optimizers.state())
    padded = []
    if compiled and config.loader == "packed" and config.warmup_steps > 0:
        padded = padded_batches(config, feed, run.device)
    momentum_is_final = config.muon_momentum_warmup_steps
    for loops in loop_states(config):
        state_began = time.monotonic()
        model.loops = loops
        for batch in padded:
            work(batch, len(feed.get(0)))
        first, *later = turning_points(config, loops)
        steps = [(step, first) for step in range(config.warmup_steps)]
        if steps:
            steps += [(0, progress) for progress in later]
        for step, progress in steps:
            batches = feed.get(step, longest_segment(config, progress))
            train_step(run, forward, optimizers, batches, progress, momentum_is_final, graphs)
        if compiled:  # minutes if nothing is in the cache: show that it goes on
            state = "on" if loops else "off"
            run.log(f"warm-up: loops {state} after {time.monotonic() - state_began:.1f}s")
    model.looped = False
    model.load_state_dict(weights)
    optimizers.load(fresh)
    optimizers.restart_average()
    seconds = time.monotonic() - began
    line = (
        f"warm-up: {config.warmup_steps} steps per loop state in {seconds:.1f}s, untimed; all state restored"
    )
    if config.compile_cache:
        line += f"; compile cache: {cached} files before, {count_cached_files(config)} after"
    run.log(line)


def count_cached_files(config: Config) -> int:
    """How many files lie under COMPILE_CACHE: few before a cold start, all before a warm one."""
    if not config.compile_cache:
        return 0
    return sum(path.is_file() for path in Path(config.compile_cache).expanduser().rglob("*"))


def measure_reserve(run: Run, model: GPT, data: Dataset) -> float:
    """Seconds of the budget to keep for calibration: 1.3 times what few forwards per rank suggest, and one.

    With TUNE_STEPS also for rounding and tuning. The slowest rank decides. The factor and the second are for
    what a sample cannot show (not measured on a GPU); the first forward, with what is loaded or compiled on
    first use, is not counted.
    """
    forwards, _ = calibration_forwards(run.config)
    model.loops = run.config.num_loops
    seconds = []
    for count in (1, 1, 3):
        began = run.now()
        moments = collect_moments(run, model, data, count * run.world_size)
        seconds.append(run.now() - began)
    later = measure_tuning(run, model, data, moments) if run.config.tune_steps else 0.0
    model.looped = False
    _, one, three = seconds
    share = -(-forwards // run.world_size)  # forwards of a rank
    estimate = one + (share - 1) * max(0.0, three - one) / 2 + later
    return run.max_over_ranks(1.3 * estimate + 1.0)[0]


def round_sample(
    config: Config,
    table: dict[str, ParameterSpec],
    weights: dict[str, Tensor],
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
) -> tuple[dict[str, Quantized], float, float]:
    """What `quantize` does for one size, with one step size for all `weights`, for about 3 bits each.

    Also the seconds of posing the problems, and of rounding and coding.
    """
    began = time.monotonic()
    problems = pose_problems(config, table, weights, moments, (0.0, 0.0, 0.0))
    small = fp16_tensors(table, weights)
    if config.quantizer == "sdclip":
        return clip_matrices(config, table, problems) | small, 0.0, time.monotonic() - began
    posed = time.monotonic()
    count = sum(problem.weight.numel() for problem in problems.values())
    delta = guess_delta(problems, 3 * count / 8, config.trellis_states)
    rounded = round_matrices(problems, delta, config.trellis_states, BIT_PRICE) | small
    encode_artifact(config, rounded, True)
    return rounded, posed - began, time.monotonic() - posed


def measure_tuning(
    run: Run, model: GPT, data: Dataset, moments: dict[tuple[str, int], tuple[Tensor, Tensor]]
) -> float:
    """Seconds that rounding (rank 0: QUICK_FIT's trials) and TUNE_STEPS steps take; `model` is kept.

    A first weight may be 0, which rounds and codes faster than any other: noise is added for the sample.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: w.float() + 0.02 * torch.randn(w.shape, generator=generator)
        for name, w in to_cpu(model.state_dict()).items()
    }
    rounded: dict[str, Quantized] = {}

    def round_once() -> tuple[float, float]:
        tensors, posing, rounding = round_sample(run.config, model.table, weights, moments)
        rounded.update(tensors)
        return posing, rounding

    run.on_main_rank(round_once)  # compiles
    posing, rounding = run.on_main_rank(round_once)
    # Every matrix but the first group's is posed and rounded twice, the last group for every size.
    turns = 2 if run.config.tune_matrices else 1
    seconds = turns * (posing + QUICK_FIT.trials * rounding)
    tuning = Tuning(run, model, data, weights)
    tuning.load(spread_weights(run, model, rounded, model.table))
    tuning.choose(sum(rounding_groups(model.table)[1:], ()) if run.config.tune_matrices else ())
    times = []
    for step in range(3):
        began = run.now()
        tuning.step(step, 0.0)
        times.append(run.now() - began)
    # Two looks at the loss take less than a step.
    return seconds + (run.config.tune_steps + 1) * sum(times[1:]) / 2


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process: one per shape."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class CheckpointWriter:
    """Writes checkpoint.pt in a thread of rank 0 while training goes on, one at a time."""

    def __init__(self, run: Run):
        self.run = run
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def write(self, content: dict[str, Any] | None) -> None:
        """Start writing `content`, which nobody may change any more; waits for the checkpoint before it.

        Every rank calls it, those other than 0 with None.
        """
        self.wait()
        if content is not None:
            save = functools.partial(torch.save, content)
            self.pending = self.thread.submit(write_atomically, self.run.folder / "checkpoint.pt", save)

    def wait(self) -> None:
        """Return, on every rank, when the last checkpoint is on disk; Stop if it could not be written."""
        self.run.on_main_rank(self.finish_pending)

    def finish_pending(self) -> None:
        """The same on rank 0."""
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a checkpoint that is being written come to its end when something stops the training.

        Nothing is raised, for what stopped the training is to be told, and no other rank is waited for.
        """
        self.thread.shutdown()
        if self.pending is not None and self.pending.exception() is not None:
            self.run.log(f"warning: {self.pending.exception()}")


class Training:
    """The state of a training run between two steps, and what is done with it."""

    def __init__(self, run: Run, data: Dataset, built: Built):
        self.run = run
        self.config = run.config
        self.model, self.forward, compiled = built
        parameters = self.model.named_parameters()
        self.average = {name: parameter.detach().float().clone() for name, parameter in parameters}
        self.optimizers = Optimizers(run, self.model, compiled, self.average)
        self.feed = Feed(run, LOADERS[run.config.loader](run.config, data))
        self.identity = {"settings": run.config.chosen("training"), "data": data.training_digest}
        self.validation: Validation | None = None
        self.writer = CheckpointWriter(run)
        self.agreement = Agreement(run)
        self.graphs = step_graphs(run, self.model, self.forward, self.optimizers)
        warm_up(run, built, self.optimizers, self.feed, self.graphs)
        self.reserve = self.config.gptq_reserve_seconds
        if self.reserve < 0:
            self.reserve = measure_reserve(run, self.model, data)
        self.step = 0
        self.first_step = 0  # of this process
        self.seconds_before = 0.0  # on the clock of the processes that this one resumes
        self.elapsed = 0.0
        self.started = 0.0
        self.operations = 0  # of all steps and ranks
        # Of a step at most: with the loops, and with every segment as long as it may be.
        most_pairs = self.config.train_batch_tokens * self.config.train_seq_len
        self.dearest = self.count_operations(self.config.num_loops, most_pairs)
        self.graphs_before_clock = 0
        self.recorded_before_clock = 0

    @property
    def recorded(self) -> int:
        """How many CUDA graphs there are."""
        return len(self.graphs.graphs) if self.graphs else 0

    def count_operations(self, loops: int, pairs: float) -> int:
        """Those of a step with so many loops, and attention pairs over all ranks."""
        return step_operations(self.config, loops, self.config.train_batch_tokens, int(pairs))

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(saved["model"])
        self.optimizers.load(saved["optimizers"])
        for name, weight in saved["average"].items():
            self.average[name].copy_(weight)  # not in its place: a CUDA graph moves this tensor
        self.step = saved["step"]
        self.operations = saved["operations"]
        self.first_step = self.step
        self.seconds_before = saved["train_seconds"]
        self.reserve = saved["reserve"]  # as measured at first: the schedule goes on as it was
        self.model.loops = saved["loops"]
        self.run.log(f"train: resumed at step {self.step} after {self.seconds_before:.1f}s of training")
        # Records of later steps before this one are void.
        self.run.metric("resume", step=self.step, seconds=self.seconds_before)

    def start_clock(self, data: Dataset) -> None:
        """From here on every second counts."""
        limit = self.config.max_wallclock_seconds
        how = "measured" if self.config.gptq_reserve_seconds < 0 else "GPTQ_RESERVE_SECONDS"
        what = "calibration, rounding and tuning" if self.config.tune_steps else "calibration"
        self.run.log(f"{what}: {self.reserve:.1f}s of the {limit:g}s are kept for it ({how})")
        if self.reserve >= limit:
            raise Stop(
                f"MAX_WALLCLOCK_SECONDS={limit:g}: calibration alone would take {self.reserve:.1f}s of it; "
                "raise it, lower GPTQ_CALIBRATION_BATCHES or TUNE_STEPS, or set GPTQ_RESERVE_SECONDS"
            )
        plain, *looped = (self.count_operations(loops, 0) for loops in loop_states(self.config))
        kinds = "".join(f", looped {count:.4g}" for count in looped)
        self.run.log(f"operations of a step: {plain:.4g}{kinds}, without scores of attention")
        if self.config.val_loss_every:
            self.validation = load_validation(data)
        self.elapsed = self.seconds_before
        self.started = self.run.now()
        self.graphs_before_clock = compiled_graphs()
        self.recorded_before_clock = self.recorded
        self.run.ledger("train_clock_start", seconds=self.seconds_before)
        if self.validation:
            self.run.ledger("validation_read")

    @property
    def budget(self) -> float:
        """Seconds for the steps: what calibration leaves."""
        return self.config.max_wallclock_seconds - self.reserve

    def clock(self) -> float:
        """Seconds spent on training until now, as this rank's host sees it."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def goes_on(self) -> bool:
        """Whether there are steps, operations and seconds left."""
        return self.has_work and self.elapsed < self.budget

    @property
    def has_work(self) -> bool:
        """Whether there are steps left, and operations for the dearest of them if these are the budget."""
        limit = self.config.train_operations or math.inf
        return self.step < self.config.iterations and self.operations + self.dearest <= limit

    @property
    def steps_left(self) -> float:
        """How many steps the settings leave, if those to come are as dear as the dearest."""
        left = float(self.config.iterations - self.step)
        if self.config.train_operations:
            left = min(left, (self.config.train_operations - self.operations) // self.dearest)
        return left

    @property
    def progress(self) -> float:
        """What the schedules follow: the part of the steps or of the budget that is used, 0 to 1."""
        if self.config.schedule == "steps":
            return self.step / self.config.iterations
        if self.config.schedule == "operations":
            return self.operations / self.config.train_operations
        return self.elapsed / self.budget

    def take_step(self) -> None:
        """One step with all that belongs to it: loops, average, agreement, log, validation, checkpoint."""
        config = self.config
        run = self.run
        progress = self.progress
        loops = loops_at(config, progress)
        if loops > self.model.loops:
            self.model.loops = loops
            run.log(f"loops on at step {self.step} after {self.elapsed:.1f}s")
        batches = self.feed.get(self.step, longest_segment(config, progress))
        loss = train_step(run, self.forward, self.optimizers, batches, progress, self.step, self.graphs)
        self.step += 1
        self.operations += self.count_operations(self.model.loops, run.sum_on_hosts(self.feed.pairs))
        last = not self.has_work
        saves = config.checkpoint_every > 0 and self.step % config.checkpoint_every == 0 and not last
        self.elapsed, not_finite = self.agreement.reach(self.clock, loss, late=not (saves or last))
        if not_finite:
            raise Stop(
                f"train_loss is not finite at step {self.step}; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR "
                f"(nothing of this step was saved in {run.folder})"
            )
        if self.step % config.train_log_every == 0 or self.step <= 10 or last:
            self.log_step(loss, learning_rate_scale(config, progress))
        if self.validation and self.step % config.val_loss_every == 0:
            self.validate(self.validation)
        if saves:
            self.writer.write(self.checkpoint())

    def log_step(self, loss: Tensor, rate: float) -> None:
        """The line and the record of one step; speeds are averages over the steps of this process."""
        config = self.config
        mean = self.run.sum_over_ranks(loss.double()).item() / self.run.world_size
        here = self.run.now() - self.started
        seconds = self.seconds_before + here
        step_seconds = here / (self.step - self.first_step)
        left = min(step_seconds * self.steps_left, max(self.budget - seconds, 0.0))
        speed = config.train_batch_tokens / step_seconds
        self.run.log(
            f"step:{self.step}/{config.iterations} train_loss:{mean:.4f} lr:{rate:.3f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * step_seconds:.2f}ms tok/s:{speed:.0f} "
            f"left:{left:.0f}s"
        )
        times = {"seconds": seconds, "step_ms": 1000 * step_seconds, "speed": speed}
        self.run.metric("train", step=self.step, train_loss=mean, rate=rate, **times)

    def validate(self, validation: Validation) -> None:
        """A diagnostic score of the live weights, off the clock."""
        paused = self.run.now()
        graphs = compiled_graphs()
        how = functools.partial(score_sliding, self.run, self.forward, self.config.eval_seq_len)
        measure(self.run, validation, f"step{self.step}", how)
        self.started += self.run.now() - paused
        self.graphs_before_clock += compiled_graphs() - graphs

    def checkpoint(self) -> dict[str, Any] | None:
        """All that `resume` needs, in host memory; None except on rank 0, which alone writes it."""
        optimizers = self.optimizers.state()  # every rank gives its part of Muon's momenta
        if not self.run.is_main:
            return None
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "average": self.average}
        return {**self.content(complete=False, seconds=self.elapsed), **to_cpu(state)}

    def content(self, complete: bool, seconds: float) -> dict[str, Any]:
        """What every checkpoint.pt holds besides tensors; `seconds` of training."""
        place = {"step": self.step, "train_seconds": seconds, "operations": self.operations}
        place |= {"loops": self.model.loops, "looped": self.model.looped}
        return {**self.identity, "complete": complete, "reserve": self.reserve, **place}

    def finish(self) -> None:
        """Stop the clock, write the averaged weights and the facts of the training."""
        config = self.config
        run = self.run
        seconds = self.seconds_before + run.now() - self.started
        self.writer.wait()
        mebibytes = peak_memory_mebibytes(run)
        before = self.graphs_before_clock
        late = torch.tensor(compiled_graphs() - before, device=run.device)
        inside = int(run.sum_over_ranks(late))
        step_ms = 1000 * seconds / max(self.step, 1)
        facts = {
            "steps": self.step,
            "operations": self.operations,
            "train_seconds": seconds,
            "step_ms": step_ms,
            "tokens_per_second": self.step * config.train_batch_tokens / seconds,
            "peak_memory_mib": mebibytes,
            "graphs_before_clock": before,
            "graphs_inside_clock": inside,
        }
        warning = "warning: " if inside else ""
        run.log(f"{warning}compile: {before} graphs before the clock, {inside} inside it")
        if self.graphs:
            before = self.recorded_before_clock
            inside = self.recorded - before
            facts["recorded_inside_clock"] = inside
            warning = "warning: " if inside else ""
            run.log(f"{warning}cuda graphs: {before} recorded before the clock, {inside} inside it")
        limit = "MAX_WALLCLOCK_SECONDS" if self.has_work else "TRAIN_OPERATIONS"
        if self.step >= config.iterations:
            limit = "ITERATIONS"
        run.log(
            f"train: {self.step} steps in {seconds:.1f}s, {step_ms:.1f}ms per step, "
            f"{self.operations:.4g} operations, peak memory {mebibytes} MiB, stopped by {limit}"
        )
        run.on_main_rank(functools.partial(self.save_trained, seconds, facts))
        run.complete = "train"
        record_stage(run, "train", facts)

    def save_trained(self, seconds: float, facts: dict[str, Any]) -> None:
        """Write the averaged weights and facts of the finished training as checkpoint.pt. Rank 0 only."""
        content = {**self.content(complete=True, seconds=seconds), "average": to_cpu(self.average)}
        parameters = self.model.named_parameters()
        content["last"] = {name: parameter.detach().float().cpu() for name, parameter in parameters}
        content["facts"] = facts
        save = functools.partial(torch.save, content)
        write_atomically(self.run.folder / "checkpoint.pt", save)


def peak_memory_mebibytes(run: Run) -> int:
    """The most memory that was in use at once: of the GPU, or of the process."""
    if run.is_cuda:
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # Linux counts in KiB


def train(run: Run, data: Dataset, built: Built) -> None:
    """Train from the last checkpoint, or the start, to the end of the budget; averaged weights go to disk."""
    saved = load_checkpoint(run, data)
    if saved and saved["complete"]:
        path = run.folder / "checkpoint.pt"
        steps = saved["step"]
        run.log(f"train: {path} holds the finished training of {steps} steps; going on from there")
        run.complete = "train"
        if run.is_main and "train" not in read_json(run.folder / "stages.json"):
            record_stage(run, "train", saved["facts"])
        return
    training = Training(run, data, built)
    try:
        if saved:
            training.resume(saved)
        training.start_clock(data)
        while training.goes_on:
            training.take_step()
        training.finish()
    finally:
        training.writer.close()


# === PREFLIGHT ===
# In: the settings and this machine. Out: Stop, in the first seconds, for what would fail at the end of a run
# (`preflight`); and one line for each property of the machine that decides how many steps the budget gives,
# with the remedy where it is bad (`inspect_machine`). `python train_gpt.py --preflight` prints all of them
# and tries some steps; a run on GPUs starts with all but those. The limits below which a remedy is shown are
# assumptions, not measured.


SAMPLE_SECONDS = 60.0  # that --preflight spends in training steps
# The oldest driver (its major version) that runs programs of a CUDA version: NVIDIA's compatibility table.
LEAST_DRIVER = {"12": 525, "13": 580}
# Dense bf16 TFLOP/s by a part of the GPU's name, the first that fits, from the makers' data sheets.
DATA_SHEET_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312}
LEAST_ALL_REDUCE = 100e9  # bytes per second, bus bandwidth: PCIe gives less, NVLink several times as much
LEAST_DISK = 100e6  # bytes per second
LEAST_SHARED_MEMORY = 2**30  # NCCL's buffers; a container has 64 MiB if nothing else was asked for


def check_compressor(compressor: str) -> None:
    """Stop unless `compressor` is installed and gives back what it packed."""
    sample = bytes(range(256)) * 4
    try:
        again = compress(compress(sample, compressor), compressor, undo=True)
    except ImportError:
        raise Stop(f"COMPRESSOR={compressor}: not installed; pip install it or set COMPRESSOR=lzma") from None
    if again != sample:
        raise Stop(f"COMPRESSOR={compressor}: does not give back what it packed; set COMPRESSOR=lzma")


def packing_loss(bits: float) -> float:
    """About how many bits per byte rate_distortion costs the contest's model at so many `bits` a weight.

    A fifth of what public runs lose at 3.5 bits (0.0086, PR #1855), 1.85 times as much per 3/8 bit less.
    """
    return 0.0086 / 5 * 1.85 ** ((3.5 - bits) / 0.375)


LEAST_BITS = 2.0  # a weight: below it more parameters take more by packing than they give


def warn_of_few_bits(run: Run, limit: int) -> None:
    """Log a warning if an artifact of `limit` bytes leaves the matrices too few bits."""
    config = run.config
    specs = parameter_table(config).values()
    matrices = sum(math.prod(spec.shape) for spec in specs if spec.quantizer != "fp16")
    small = sum(math.prod(spec.shape) for spec in specs if spec.quantizer == "fp16")
    bits = 8 * (limit - 2 * small) / matrices
    if config.quantizer == "rate_distortion" and not config.artifact and bits < LEAST_BITS:
        run.log(
            f"warning: {limit} bytes leave {bits:.2f} bits for each of {matrices} weights, which costs about "
            f"{packing_loss(bits):+.3f} BPB; lower MLP_MULT or MODEL_DIM"
        )


def preflight(run: Run) -> None:
    """Find in the first seconds what would otherwise fail at the end: compressor, disk, size. Rank 0 only."""
    config = run.config
    check_compressor(config.compressor)
    counts = [(math.prod(spec.shape), spec.quantizer) for spec in parameter_table(config).values()]
    needed = 24 * sum(count for count, _ in counts) + 2**26
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise Stop(
            f"OUT_DIR={config.out_dir}: {free >> 20} MiB free, a run of this model needs {needed >> 20} MiB; "
            "free disk space or set OUT_DIR elsewhere"
        )
    code = len(pack_source(Path(__file__).read_bytes())[0])
    least = sum(count * least_bits(config, quantizer) / 8 for count, quantizer in counts)
    left = config.artifact_cap_bytes - code
    limit = min(config.artifact_target_bytes or config.artifact_cap_bytes, left)
    if not config.artifact and least > limit:
        raise Stop(
            f"ARTIFACT_CAP_BYTES={config.artifact_cap_bytes}, "
            f"ARTIFACT_TARGET_BYTES={config.artifact_target_bytes}: {limit} left with the packed code, "
            f"{least:.0f} needed; lower MODEL_DIM"
        )
    warn_of_few_bits(run, limit)


class Finding(NamedTuple):
    """One property of the machine: its name, how it stands, and what to do if that is bad (else empty).

    `idle`: there are GPUs, of which torch can use none.
    """

    what: str
    state: str
    remedy: str = ""
    idle: bool = False


def report(run: Run, finding: Finding) -> None:
    """Log a finding in one line."""
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    run.log(f"preflight {finding.what}: {finding.state}{remedy}")


def query_driver() -> tuple[list[list[str]], str]:
    """[driver version, name] of every GPU that nvidia-smi lists; or none, and why."""
    if not shutil.which("nvidia-smi"):
        return [], "no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        shown = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {type(error).__name__}"
    rows = [line.split(", ", 1) for line in shown.stdout.splitlines() if ", " in line]
    if shown.returncode or not rows:
        answer = (shown.stdout + shown.stderr).strip().splitlines() or ["nothing"]
        return [], f"nvidia-smi answers {answer[0]!r}"
    return rows, ""


def find_driver(run: Run) -> Finding:
    """The GPUs and the driver, against the CUDA version that this torch was built for."""
    gpus, trouble = query_driver()
    build = torch.version.cuda
    goal = f"CUDA {build}" if build else "the CPU"
    wheel = f"torch {torch.__version__}, built for {goal}"
    if not gpus:
        device = torch.cuda.get_device_name(run.device) if run.is_cuda else "none, the CPU trains"
        broken = not run.is_cuda and trouble != "no nvidia-smi"
        remedy = "install the driver, or start the container with --gpus all" if broken else ""
        return Finding("GPU", f"{device} ({trouble}; {wheel})", remedy)
    version, name = gpus[0]
    major = re.match(r"\d+", version)
    needed = LEAST_DRIVER.get(build.split(".")[0], 0) if build else 0
    remedy = ""
    if not build:
        remedy = (
            "this torch cannot use it: start with a Python whose torch is a CUDA build (PYTHON=... ./run.sh)"
        )
    elif major and int(major[0]) < needed:
        remedy = f"CUDA {build} needs driver {needed} or later: update it, or install torch for an older CUDA"
    elif not run.is_cuda:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        remedy = f"torch sees no GPU: check CUDA_VISIBLE_DEVICES ({visible}) and the container's --gpus"
    state = f"{len(gpus)} x {name}, driver {version} ({wheel})"
    return Finding("GPU", state, remedy, idle=not run.is_cuda)


def worst_of_ranks(run: Run, value: float) -> float:
    """The least `value` of all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=run.device)
    if run.world_size > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor.item()


def least_seconds(run: Run, work: Callable[[], Any]) -> float:
    """The shortest of five times that `work` takes on the device, after one that is not counted."""
    times = []
    for _ in range(6):
        began = run.now()
        work()
        times.append(run.now() - began)
    return min(times[1:])


def find_memory(run: Run) -> Finding:
    """The free memory of the fullest GPU."""
    free, total = torch.cuda.mem_get_info(run.device)
    held = torch.cuda.memory_reserved(run.device)  # by this process
    share = worst_of_ranks(run, (free + held) / total)
    remedy = "" if share > 0.9 else "another process holds the rest: nvidia-smi shows which"
    return Finding("memory", f"{share * total / 2**30:.1f} of {total / 2**30:.1f} GiB free", remedy)


def matmul_peak(run: Run) -> float:
    """FLOP/s of a square matrix product in the run's data type on the slowest rank."""
    size = 8192 if run.is_cuda else 512
    # Random, not constant: the clock of a GPU follows its power, and that the bits that change.
    left, right = (torch.randn(size, size, device=run.device, dtype=run.dtype) for _ in range(2))
    return worst_of_ranks(run, 2 * size**3 / least_seconds(run, lambda: left @ right))


def find_matmul(run: Run, peak: float) -> Finding:
    """The measured matmul peak beside the data sheet's, if that is known."""
    name = torch.cuda.get_device_name(run.device) if run.is_cuda else ""
    promised = next((tflops for part, tflops in DATA_SHEET_TFLOPS.items() if part in name), None)
    kind = str(run.dtype).removeprefix("torch.")
    state = f"{peak / 1e12:.3g} TFLOP/s in {kind}"
    remedy = ""
    if promised and run.dtype == torch.bfloat16:
        state += f", the data sheet says {promised}"
        if peak < promised / 2 * 1e12:
            remedy = "the GPU is throttled or shared: nvidia-smi -q -d PERFORMANCE; or take another machine"
    return Finding("matmul", state, remedy)


def find_all_reduce(run: Run) -> Finding:
    """The bandwidth of an all-reduce over all ranks, as every byte crosses a link (NCCL's bus bandwidth)."""
    size = 2**28 if run.is_cuda else 2**20
    content = torch.zeros(size // 4, device=run.device)
    seconds = least_seconds(run, lambda: dist.all_reduce(content))
    bandwidth = worst_of_ranks(run, 2 * (run.world_size - 1) / run.world_size * size / seconds)
    remedy = ""
    if run.is_cuda and bandwidth < LEAST_ALL_REDUCE:
        remedy = "not NVLink: see nvidia-smi topo -m, unset NCCL_P2P_DISABLE; or take another machine"
    return Finding("all-reduce", f"{bandwidth / 1e9:.3g} GB/s over {run.world_size} ranks", remedy)


def find_disk(run: Run) -> Finding:
    """How fast OUT_DIR takes 64 MiB. Rank 0 only."""
    path = Path(run.config.out_dir) / f".preflight-{os.getpid()}"
    content = os.urandom(2**26)
    began = time.monotonic()
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rate = len(content) / (time.monotonic() - began)
    except OSError as error:
        return Finding("disk", f"OUT_DIR={run.config.out_dir}: {error.strerror}", "set OUT_DIR elsewhere")
    finally:
        path.unlink(missing_ok=True)
    remedy = "" if rate > LEAST_DISK else "checkpoints will be late: set OUT_DIR to a local disk"
    return Finding("disk", f"{rate / 1e6:.0f} MB/s written to OUT_DIR", remedy)


def find_shared_memory(run: Run, folder: str = "/dev/shm") -> Finding:
    """The size of the shared memory, through which the ranks of one machine talk."""
    if not os.path.isdir(folder):
        return Finding("shared memory", f"no {folder}")
    size = shutil.disk_usage(folder).total
    small = size < LEAST_SHARED_MEMORY and (run.world_size > 1 or torch.cuda.device_count() > 1)
    remedy = "several ranks need more: docker run --shm-size=8g (or --ipc=host)" if small else ""
    return Finding("shared memory", f"{size >> 20} MiB in {folder}", remedy)


def inspect_driver(run: Run, whole: bool) -> None:
    """Log what became of the GPUs. Stop where a run, not the `whole` report, would leave them idle unasked.

    Rank 0 only.
    """
    finding = find_driver(run)
    hidden = re.match(r"\s*(-|,|$)", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    if finding.idle and not hidden and not whole:
        raise Stop(f"GPU: {finding.state}; {finding.remedy}; or train on the CPU: CUDA_VISIBLE_DEVICES=")
    report(run, finding)


def inspect_machine(run: Run, whole: bool) -> float:
    """Log what this machine will give, on all ranks together; the matmul peak in FLOP/s (0: not measured).

    Without a GPU and unless `whole`, only what became of the GPU.
    """
    run.on_main_rank(functools.partial(inspect_driver, run, whole))
    if not (whole or run.is_cuda):
        return 0.0
    if run.is_cuda:
        report(run, find_memory(run))
    peak = matmul_peak(run)
    report(run, find_matmul(run, peak))
    if run.world_size > 1:
        report(run, find_all_reduce(run))
    if run.is_main:
        report(run, find_disk(run))
        report(run, find_shared_memory(run))
    return peak


def average_pace(config: Config, seconds: Mapping[int, float]) -> float:
    """Steps per second over a whole run, from the seconds of one step by loop state."""
    # Of the time or of the steps, as SCHEDULE says.
    shares = {loops: end - begin for loops, (begin, end) in loop_spans(config).items()}
    if config.schedule == "steps":
        return 1 / sum(share * seconds[loops] for loops, share in shares.items())
    return sum(share / seconds[loops] for loops, share in shares.items())


def sample_steps(run: Run, data: Dataset) -> tuple[dict[int, float], float]:
    """(seconds of one training step by loop state, seconds kept for calibration), after the warm-up.

    The steps take SAMPLE_SECONDS in all.
    """
    config = run.config
    built = build(run)
    optimizers = Optimizers(run, built.model, built.compiled)
    feed = Feed(run, LOADERS[config.loader](config, data))
    graphs = step_graphs(run, built.model, built.forward, optimizers)
    warm_up(run, built, optimizers, feed, graphs)
    reserve = config.gptq_reserve_seconds
    if reserve < 0:
        reserve = measure_reserve(run, built.model, data)
    seconds = {}
    for loops in loop_states(config):
        built.model.loops = loops
        began = run.now()
        count = 0
        goes_on = True
        while goes_on:
            train_step(run, built.forward, optimizers, feed.get(count), 0.0, count, graphs)
            count += 1
            spent = run.now() - began
            # The ranks stop together, when the first of them has used its part and after 50 steps.
            left = worst_of_ranks(run, SAMPLE_SECONDS / len(loop_states(config)) - spent * (1 + 1 / count))
            goes_on = left > 0 and count < 50
        seconds[loops] = spent / count
    return seconds, reserve


def find_steps(run: Run, data: Dataset, peak: float) -> Finding:
    """The steps that MAX_WALLCLOCK_SECONDS will give, by a sample, and their share of the matmul peak."""
    config = run.config
    budget = config.max_wallclock_seconds - max(config.gptq_reserve_seconds, 0.0)  # -1: not yet measured
    # Without the scores of attention, which depend on the lengths of documents.
    floors = {
        loops: step_operations(config, loops, config.train_batch_tokens, 0) / (peak * run.world_size)
        for loops in loop_states(config)
    }
    fastest = average_pace(config, floors)
    if sum(floors.values()) > SAMPLE_SECONDS / 4:
        slowest = max(floors.values())
        remedy = "train on GPUs, or set TRAIN_BATCH_TOKENS and the model smaller"
        return Finding(
            "steps",
            f"not tried: a step takes {slowest:.0f}s or more, {budget * fastest:.0f} in {budget:.0f}s",
            remedy,
        )
    seconds, reserve = sample_steps(run, data)
    budget = config.max_wallclock_seconds - reserve
    pace = average_pace(config, seconds)
    kinds = {loops: " looped" if loops else "" for loops in seconds}
    times = ", ".join(f"{1000 * spent:.1f}ms{kinds[loops]}" for loops, spent in seconds.items())
    remedy = ""
    if run.is_cuda and pace < fastest / 4:
        remedy = "slow: mend what the lines above say, or see which attention and kernels the log names"
    share = f"{100 * pace / fastest:.0f}% of what the matmul peak would give without attention"
    return Finding("steps", f"{budget * pace:.0f} in {budget:.0f}s ({times}), {share}", remedy)


def report_machine(config: Config) -> None:
    """`--preflight`: log what this machine will give to a run of these settings; nothing of it is kept."""
    # Two steps of warm-up are enough to compile.
    run = Run(dataclasses.replace(config, warmup_steps=min(config.warmup_steps, 2)))
    run.folder = Path(config.out_dir)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"OUT_DIR={config.out_dir}: {error.strerror}; set it to a writable folder") from None
    peak = inspect_machine(run, whole=True)
    run.on_main_rank(lambda: preflight(run))
    data = Dataset(config, need_training=True)
    report(run, within_memory(functools.partial(find_steps, run, data, peak)))
    run.close()


# === STAGES ===
# The stages train -> quantise -> evaluate, each of which leaves its result in the run folder and its facts in
# stages.json, from which `summarize` makes summary.json. Whatever can be refused is refused by `preflight`,
# in the first seconds.


def record_stage(run: Run, stage: str, facts: dict[str, Any]) -> None:
    """Keep the facts of a finished stage in stages.json, from which summary.json is made. Rank 0 only."""
    run.metric(stage, **facts)
    if run.is_main:
        path = run.folder / "stages.json"
        write_atomically(path, json.dumps(read_json(path) | {stage: facts}, indent=1).encode())


def train_on_validation(
    run: Run, data: Dataset, built: Built, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What PREQUANT_TTT makes of `weights` on the validation text, in fp32; scored before and after."""
    model, forward, compiled = built

    def learn(tally: Tally) -> None:
        prequant_ttt(run, forward, tally.validation)

    plain = functools.partial(score_sliding, run, forward, run.config.eval_seq_len)
    if compiled:
        rehearse(run, {"plain": plain, "prequant_ttt": learn})
        model.load_state_dict(weights)
    began = run.now()
    validation = load_validation(data)
    run.ledger("validation_read")
    before = measure(run, validation, "before prequant_ttt", plain)
    prequant_ttt(run, forward, validation)
    after = measure(run, validation, "prequant_ttt", plain)
    weights = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    facts = {"before_bpb": before.bpb, "after_bpb": after.bpb, "prequant_ttt_seconds": run.now() - began}
    record_stage(run, "prequant_ttt", facts)
    return weights


def quantize_stage(run: Run, data: Dataset, built: Built) -> None:
    """Calibration, rounding, packing: checkpoint.pt -> final_model.ptz and packed_train_gpt.py."""
    model = built.model
    saved = load_checkpoint(run, data)
    if not saved or not saved["complete"]:
        path = run.folder / "checkpoint.pt"
        raise Stop(f"STAGE=quantize: {path} holds no finished training; run STAGE=train first")
    run.complete = "train"
    weights = {name: weight.to(run.device) for name, weight in blend_average(run.config, saved).items()}
    model.load_state_dict(weights)
    model.looped = saved["looped"]
    if run.config.prequant_ttt_enabled:
        weights = train_on_validation(run, data, built, weights)
    began = run.now()
    moments = collect_moments(run, model, data)
    times = {"hessian_seconds": run.now() - began}
    tensors: dict[str, Quantized] = {}  # of rank 0

    def round_weights() -> None:
        tensors.update(round_run(run, model, weights, moments))

    if not run.config.tune_steps:
        run.ledger("train_read_last")
        times["budgeted_seconds"] = saved["train_seconds"] + times["hessian_seconds"]
    rounding = run.now()
    run.on_main_rank(round_weights)
    times["gptq_seconds"] = run.now() - rounding
    if run.config.tune_steps:
        goal = run.on_main_rank(functools.partial(artifact_goal, run))
        times |= tune(run, model, data, weights, tensors, moments, goal)
        run.ledger("train_read_last")
        times["budgeted_seconds"] = saved["train_seconds"] + run.now() - began
    facts = run.on_main_rank(lambda: pack_run(run, model, tensors, times))
    record_stage(run, "quantize", facts)
    run.complete = "quantize"


def round_run(
    run: Run,
    model: GPT,
    weights: dict[str, Tensor],
    moments: dict[tuple[str, int], tuple[Tensor, Tensor]],
) -> dict[str, Quantized]:
    """Write the packed script, and round the weights to what it leaves of the cap. Rank 0 only."""
    packed, _ = pack_source(Path(__file__).read_bytes())
    write_atomically(run.folder / "packed_train_gpt.py", packed)
    return quantize(run, model.table, weights, artifact_goal(run), model.looped, moments)


def artifact_goal(run: Run) -> int:
    """The bytes that the artifact fills beside the packed script in the run's folder."""
    config = run.config
    left = config.artifact_cap_bytes - (run.folder / "packed_train_gpt.py").stat().st_size
    return min(config.artifact_target_bytes or config.artifact_cap_bytes, left)


def pack_run(run: Run, model: GPT, tensors: dict[str, Quantized], times: dict[str, float]) -> dict[str, Any]:
    """Seal the artifact; returns its facts and those of the packed script with `times`. Rank 0 only."""
    config = run.config
    packed, how = pack_source(Path(__file__).read_bytes())
    code_bytes = len(packed)
    rounded = run.now()
    artifact_bytes, digest = seal_artifact(run, tensors, model.looped)
    run.ledger("artifact_sealed", sha256=digest)
    sealed = run.now()
    matrices = sum(tensor.scales is not None for tensor in tensors.values())
    calibration = times["hessian_seconds"]
    rounding = times["gptq_seconds"]
    run.log(
        f"quantised {matrices} matrices ({config.quantizer}), {len(tensors) - matrices} tensors in fp16: "
        f"calibration {calibration:.1f}s, rounding {rounding:.1f}s, "
        f"sealing {sealed - rounded:.1f}s; read back, all equal; code {how}"
    )
    limit = config.max_wallclock_seconds
    budgeted = times["budgeted_seconds"]
    spent = "training, calibration, rounding and tuning" if config.tune_steps else "training and calibration"
    run.log(f"{spent}: {budgeted:.1f}s of {limit:g}s")
    total = artifact_bytes + code_bytes
    cap = config.artifact_cap_bytes
    run.log(f"artifact bytes:{artifact_bytes} code:{code_bytes} total:{total} cap:{cap} left:{cap - total}")
    return {
        "artifact_bytes": artifact_bytes,
        "code_bytes": code_bytes,
        "artifact_sha256": digest,
        "pack_seconds": sealed - rounded,
        **times,
    }


def evaluation_modes(run: Run, built: Built) -> dict[str, Callable[[Tally], None]]:
    """The scores that the settings ask for, name -> what fills a Tally; the last is the one that counts."""
    config = run.config
    model, forward, compiled = built
    modes: dict[str, Callable[[Tally], None]] = {
        "quantized": functools.partial(score_sliding, run, forward, config.eval_seq_len)
    }
    if config.sliding_window_enabled:
        modes["sliding"] = functools.partial(score_sliding, run, forward, config.eval_stride)
    if config.ttt_enabled and config.ttt_mode == "chunk_sgd":
        modes["ttt"] = functools.partial(chunk_sgd, run, forward, forward)
    elif config.ttt_enabled and config.ttt_mode == "mixture":
        modes["ttt"] = functools.partial(score_mixture, run, forward, forward, compiled=compiled)
    elif config.ttt_enabled:
        # The context grows with the documents, so this one graph has dynamic lengths.
        adapted = torch.compile(model, dynamic=True, fullgraph=True) if compiled else model
        modes["ttt"] = functools.partial(doc_lora, run, forward, adapted)
    return modes


def check_tensors(path: Path, table: dict[str, ParameterSpec], tensors: dict[str, Quantized]) -> None:
    """Stop unless the tensors of an artifact are those of a model with this `table`, in types and shapes."""
    wanted: dict[str, list[list]] = {}
    for name, spec in table.items():
        if spec.quantizer == "fp16":
            wanted[name] = [[(torch.float16, spec.shape)]]
    for matrix in list_matrices(table):
        rows, columns = shape = table[matrix.parameter].shape[-2:]
        clipped = [(torch.int8, shape), (torch.float16, (rows,))]
        coded = [(torch.int32, shape), (torch.int32, (rows + columns,)), (torch.float32, (1,))]
        wanted[matrix.name] = [clipped, coded]
    for name in sorted(wanted.keys() | tensors.keys()):
        found = [(part.dtype, tuple(part.shape)) for part in tensors.get(name, ()) if part is not None]
        if found not in wanted.get(name, []):
            raise Stop(
                f"{path}: {name} has the parts {found} instead of one of {wanted.get(name, [])}; "
                "make it again with STAGE=quantize"
            )


def load_weights(model: GPT, weights: dict[str, Tensor]) -> None:
    """Put `weights` into the model; a hash embedding, which is in no file, is zero again."""
    if model.hash_embed is not None:
        weights = weights | {"hash_embed": torch.zeros_like(model.hash_embed)}
    model.load_state_dict(weights)


def evaluate_stage(run: Run, data: Dataset, built: Built) -> None:
    """Score the sealed artifact from its bytes on disk in every mode that is set; writes summary.json."""
    config = run.config
    model = built.model
    path = Path(config.artifact or run.folder / "final_model.ptz")
    manifest, tensors, digest = decode_artifact(path)
    run.log(f"artifact: {path} sha256:{digest} (before the first validation token is read)")
    if not config.artifact:
        run.complete = "quantize"
    different = describe_other_model(manifest["model"], config)
    if different:
        raise Stop(f"{path}: made with other settings ({different}); set them to those of the artifact")
    check_tensors(path, model.table, tensors)
    open_canonical(run, data)
    modes = evaluation_modes(run, built)
    model.looped = manifest["looped"]
    if config.ttt_enabled and config.hash_embed_enabled:
        # Zero until it is learnt, and there from the rehearsal on: a parameter more is another graph.
        rows = torch.zeros(config.hash_embed_size, config.model_dim, device=run.device)
        model.hash_embed = nn.Parameter(rows)
    if built.compiled:
        rehearse(run, modes)
    graphs = compiled_graphs()

    began = start_evaluation_clock(run)
    validation = load_validation(data)
    run.log(
        f"val_tokens:{len(validation.tokens) - 1} val_bytes:{validation.bytes[1:].sum()} "
        f"val_bpb:{validation.source}:enabled"
    )
    load_weights(model, assemble_weights(model.table, tensors))
    bpb = {}
    for mode, how in modes.items():
        final = measure(run, validation, mode, how)
        bpb[mode] = final.bpb
    run.ledger("eval_clock_end")
    seconds = run.now() - began
    passes = count_passes(run, final.tokens)

    late = warn_of_late_graphs(run, graphs)
    if run.is_main and final.losses is not None:
        save_document_sums(run.folder / "documents.npz", validation, final.losses)
    if config.eval_prequant:
        bpb = score_unquantized(run, data, model, validation, modes["quantized"]) | bpb
        load_weights(model, assemble_weights(model.table, tensors))
    facts = {
        "val_bpb": final.bpb,
        "val_loss": final.loss,
        "val_tokens": final.tokens,
        "val_bytes": final.bytes,
        "bpb": bpb,
        "eval_seconds": seconds,
        "eval_passes": passes,
        "graphs_inside_eval_clock": late,
        "artifact_bytes": path.stat().st_size,
        "artifact_sha256": digest,
    }
    record_stage(run, "evaluate", facts)
    run.on_main_rank(lambda: summarize(run, data))


def start_evaluation_clock(run: Run) -> float:
    """The time from which evaluation counts, with its passes; validation tokens are read from now on."""
    run.token_thirds = 0
    began = run.now()
    run.ledger("eval_clock_start")
    run.ledger("validation_read")
    return began


def count_passes(run: Run, tokens: float) -> float:
    """Forwards and backwards, over all ranks, for each of the scored `tokens`."""
    passes = run.sum_on_hosts(run.token_thirds) / 3 / tokens
    run.log(f"evaluation: {passes:.2f} forwards and backwards per token")
    return passes


def warn_of_late_graphs(run: Run, before: int) -> int:
    """How many graphs the ranks have compiled since there were `before`; a warning if any."""
    late = int(run.sum_over_ranks(torch.tensor(compiled_graphs() - before, device=run.device)))
    if late:
        run.log(f"warning: compile: {late} graphs inside the evaluation clock that the rehearsal has not met")
    return late


def score_unquantized(
    run: Run, data: Dataset, model: GPT, validation: Validation, how: Callable[[Tally], None]
) -> dict[str, float]:
    """The BPB of the weights before quantisation, if this run has them: a diagnostic, off the clock."""
    saved = None if run.config.artifact else load_checkpoint(run, data)
    if not saved or not saved["complete"]:
        run.log("val:prequant not measured: the unquantised weights are not here")
        return {}
    load_weights(model, blend_average(run.config, saved))
    return {"prequant": measure(run, validation, "prequant", how).bpb}


def judge(config: Config, facts: dict[str, Any], adapted: bool, own_artifact: bool) -> dict[str, Any]:
    """What the run itself can say about its compliance: limits, the four conditions, and whether all hold."""
    limits = {
        "train": (facts.get("budgeted_seconds"), config.max_wallclock_seconds),
        "size": (facts["total_bytes"], config.artifact_cap_bytes),
        "eval": (facts["eval_seconds"], config.eval_budget_seconds),
    }
    if config.eval_budget_passes:
        limits["passes"] = (facts["eval_passes"], config.eval_budget_passes)
    if config.train_operations:
        limits["operations"] = (facts.get("operations"), config.train_operations)
    broken = []
    for name, (value, limit) in limits.items():
        if value is None:
            broken.append(f"{name}: not measured here")
        elif value > limit:
            broken.append(f"{name}: {value} of {limit} used")
    order = "every target is counted as scored before SGD learns it; adapters learn recorded losses"
    if adapted:
        order = "PREQUANT_TTT_ENABLED=1: trained on validation tokens before scoring them"
        broken.append(order)
    if not own_artifact:
        broken.append("artifact: not the one that this run sealed")
    unproven = {"holds": None, "evidence": "not probed by the run itself: python compliance.py RUN_FOLDER"}
    targets, size = facts["val_tokens"], facts["val_bytes"]
    once = f"{targets:.0f} targets counted as scored exactly once, {size:.0f} bytes"
    conditions = {
        "causal": unproven,
        "normalised": unproven,
        "score before update": {"holds": not adapted, "evidence": order},
        "single pass": {"holds": True, "evidence": once},
    }
    reason = "; ".join(broken) or "training, evaluation and size are within their limits"
    return {"legal": not broken, "reason": reason, "limits": limits, "conditions": conditions}


def summarize(run: Run, data: Dataset) -> None:
    """Log the last lines and write summary.json from the stages' facts. Rank 0 only."""
    stages = read_json(run.folder / "stages.json")
    quantized = stages.get("quantize", {})
    adapted = stages.get("prequant_ttt", {})
    facts = stages.get("train", {}) | quantized | stages["evaluate"]
    facts["eval_seconds"] += adapted.get("prequant_ttt_seconds", 0.0)
    facts["total_bytes"] = facts["artifact_bytes"] + facts["code_bytes"] if "code_bytes" in facts else None
    own_artifact = quantized.get("artifact_sha256") == facts["artifact_sha256"]
    verdict = judge(run.config, facts, bool(adapted), own_artifact)
    facts |= {
        "seed": run.config.seed,
        "world_size": run.world_size,
        "overrides": run.config.overrides(),
        "versions": versions(run),
        "data": data.fingerprint,
        "compliance": verdict,
    }
    for name, bpb in data.manifest.get("references", {}).items():
        gain = 100 * (facts["val_bpb"] / bpb - 1)
        run.log(f"reference {name} val_bpb:{bpb:.5f}, this model {gain:+.1f}%")
    run.log(
        f"results: {run.folder}/ summary.json train.log metrics.jsonl final_model.ptz packed_train_gpt.py"
    )
    legal = "legal" if verdict["legal"] else "NOT LEGAL"
    reason = verdict["reason"]
    run.log(f"compliance: {legal} ({reason})")
    run.log(describe_score(**{"train_seconds": math.nan, **facts}))
    # Last of all files: a run that is stopped before it is evaluated again, one that has it is finished.
    write_atomically(run.folder / "summary.json", json.dumps(facts, indent=1).encode())
    announce(run.folder, "scored")


def describe_score(
    *,
    val_loss: float,
    val_bpb: float,
    total_bytes: int | None,
    train_seconds: float,
    eval_seconds: float,
    **others: Any,
) -> str:
    """The last line of a run, from the facts of summary.json."""
    return (
        f"final val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} total_bytes:{total_bytes} "
        f"train_time:{train_seconds:.1f}s eval_time:{eval_seconds:.1f}s"
    )


# === MAIN ===
# In: the environment. Out: a finished run, or one line that says what stopped it and, once training is done,
# the command that goes on (`describe_saved`). `run_stages` has the order in which everything happens.


def pairs(values: Mapping[str, Any], mark: str) -> str:
    """`values` in one line, names and values separated by `mark`."""
    return " ".join(f"{name}{mark}{value}" for name, value in values.items())


def log_header(run: Run, data: Dataset) -> None:
    """What runs where on which data, and the settings that differ from the defaults."""
    config = run.config
    micro_steps = len(run.streams)
    run.log(f"run: {run.folder} stage:{config.stage} world_size:{run.world_size} micro_steps:{micro_steps}")
    run.log("versions: " + pairs(versions(run), ":"))
    run.log("data: " + pairs(data.fingerprint, ":"))
    if not data.fingerprint["standard"]:
        documents = data.manifest.get("docs_val", "")
        run.log(f"warning: these {documents} validation documents are not the contest's 50,000")
    overrides = {name: format_value(value) for name, value in config.overrides().items()}
    run.log("overrides: " + (pairs(overrides, "=") or "none"))
    for name, spec in parameter_table(config).items():
        shape = "x".join(map(str, spec.shape))
        run.log(f"  {name:<24}{shape:<16}{spec.optimizer:<8}{spec.quantizer}", console=False)
    if run.is_cuda:
        run.log(f"allocator: {describe_allocator(os.environ)}")
    warn_of_unread_settings(run)


def warn_of_unread_settings(run: Run) -> None:
    """Log variables that look like settings but are none, and settings that only another mode reads."""
    config = run.config
    fields = dataclasses.fields(config)
    known = [*(field.name.upper() for field in fields), *ALIASES, *FIXED]
    for name in sorted(set(os.environ) - set(known) - NOT_OURS):
        family = name.split("_")[0] + "_"
        near, _ = find_near_miss(name, config.variables())
        if near or ("_" in name and sum(other.startswith(family) for other in known) > 1):
            hint = f" (the nearest is {near})" if near else ""
            run.log(
                f"warning: {name} is set, but no setting of this program has that name{hint}; "
                "it changes nothing"
            )
    reader = {field.name.upper(): field.metadata["meaning"].split(": ")[0] for field in fields}
    others = {"sdclip", "rate_distortion", "chunk_sgd", "doc_lora", "mixture"}
    others -= {config.quantizer, config.ttt_mode}
    for name in config.overrides():
        if set(reader[name].split(", ")) <= others:
            run.log(f"warning: {name} is set, but only {reader[name]} reads it; it changes nothing")


def announce(folder: Path, state: str) -> None:
    """Tell the launcher, in the file RUN_FOLDER_FILE if it names one, which folder it is. Rank 0 only."""
    path = os.environ.get("RUN_FOLDER_FILE")
    if path:
        write_atomically(Path(path), f"{state} {folder.resolve()}\n".encode())


STAGES = {"train": train, "quantize": quantize_stage, "evaluate": evaluate_stage}


def is_sealed(run: Run) -> bool:
    """Whether the run folder holds the artifact that this run has packed, unharmed."""
    path = run.folder / "final_model.ptz"
    if run.complete != "quantize" or not path.exists():
        return False
    try:
        promised = read_json(run.folder / "stages.json").get("quantize", {}).get("artifact_sha256")
    except Stop:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == promised


def describe_saved(run: Run) -> str:
    """The line that says how to go on without training again. Rank 0 only."""
    config = run.config
    stage = config.stage
    if is_sealed(run):
        stage = "evaluate"
    elif stage == "evaluate":
        stage = "quantize"
    # What the shell sets may differ from a default that this run was given, so those are repeated too.
    names = config.overrides().keys() | (os.environ.keys() & set(config.variables()))
    others = {name: getattr(config, name.lower()) for name in config.variables() if name in names}
    settings = {"RUN_ID": run.folder.name, "STAGE": stage}
    settings |= {name: value for name, value in others.items() if name not in settings}
    words = [f"{name}={shlex.quote(format_value(value))}" for name, value in settings.items()]
    words.append(shlex.quote(sys.executable))
    if run.world_size > 1:
        here = torch.cuda.device_count() if run.is_cuda else run.world_size  # of several nodes: this one
        count = min(here, run.world_size)
        words.append(f"-m torch.distributed.run --standalone --nproc_per_node={count}")
    words.append(shlex.quote(os.path.relpath(__file__)))
    command = " ".join(words)
    return f"saved: training is in {run.folder}; go on with: {command}"


def describe_end(run: Run, error: BaseException) -> str:
    """What ends a run that `error` stops after its training: the error and that line; else empty.

    The traceback of an unexpected error is printed.
    """
    if not run.complete or not run.is_main:
        return ""
    saved = describe_saved(run)
    if isinstance(error, Stop):
        return f"{error}\n{saved}"
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted\n{saved}"
    traceback.print_exception(error)
    return saved


def on_termination(run: Run, number: int, frame: Any) -> None:
    """Let SIGTERM end this process as ever, after that line if training is complete.

    Written past Python's buffers, which the signal may have met in use.
    """
    if run.complete and run.is_main:
        os.write(2, describe_saved(run).encode() + b"\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def main(config: Config) -> None:
    """Run the stages of `config.stage`."""
    run = Run(config)
    before = signal.signal(signal.SIGTERM, functools.partial(on_termination, run))
    try:
        within_memory(functools.partial(run_stages, run))
    except (Exception, Stop, KeyboardInterrupt) as error:
        message = describe_end(run, error)
        if not message:
            raise
        raise Stop(message) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    run.close()


# Settings that may differ between nodes: where things lie, and what rank 0 alone reads.
PLACES = {"RUN_ID", "OUT_DIR", "ARTIFACT", "DATA_DIR", "DATASETS_DIR", "TOKENIZER_PATH", "COMPILE_CACHE"}


def check_ranks_agree(run: Run, settings: Mapping[str, Any]) -> None:
    """Stop if a rank has other settings, data or code than rank 0: every node reads its own environment."""
    if run.world_size == 1:
        return
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    ours = {name: value for name, value in settings.items() if name not in PLACES}
    ours["source_sha256"] = source[:16]
    everyone: list[Any] = [None] * run.world_size
    dist.all_gather_object(everyone, ours, group=run.host_group)
    for rank, theirs in enumerate(everyone):
        different = describe_differences(theirs, everyone[0])
        if different:
            message = (
                f"rank {rank} was started otherwise than rank 0 ({different}); "
                "give every node the same variables, data and script"
            )
            raise Stop(message if run.is_main else 1)


# Launchers that start a program many times, and say how often, but leave it to it to find the others.
PLAIN_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def check_launcher(run: Run) -> None:
    """Stop, or warn where it may be meant, if a launcher has started this program as many separate runs."""
    for name, launcher in PLAIN_LAUNCHERS.items():
        count = os.environ.get(name, "1")
        if "WORLD_SIZE" in os.environ or count == "1":
            continue
        message = (
            f"{name}={count}: {launcher} has started this program {count} times, each without WORLD_SIZE and "
            f"so a run of its own; let {launcher} start torchrun once on each node, or unset {name}"
        )
        # Runs that see one GPU each may be several runs on purpose.
        if run.is_cuda and torch.cuda.device_count() > 1:
            raise Stop(message)
        run.log(f"warning: {message}")


def run_stages(run: Run) -> None:
    """Read the data, open the run folder, refuse what cannot work, then do the stages one by one."""
    config = run.config
    data = Dataset(config, need_training=config.stage != "evaluate")
    settings = config.chosen("nothing", "training", "artifact", "score")
    settings["data"] = data.fingerprint["shards"]
    settings["training_data"] = data.training_digest
    check_ranks_agree(run, settings)
    run.folder = run.on_main_rank(lambda: run.open(find_run_folder(config, data.training_digest)))
    run.on_main_rank(lambda: announce(run.folder, "started"))
    run.ledger("start")
    run.on_main_rank(lambda: preflight(run))
    check_launcher(run)
    log_header(run, data)
    open_canonical(run, data)
    inspect_machine(run, whole=False)
    content = json.dumps(settings, indent=1).encode()
    run.on_main_rank(lambda: write_atomically(run.folder / "config.json", content))
    built = build(run)
    for stage, work in STAGES.items():
        if config.stage in ("all", stage):
            work(run, data, built)


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--preflight"]:
            report_machine(CONFIG)
        else:
            main(CONFIG)
    except KeyboardInterrupt:
        raise Stop("interrupted; the same command goes on from the last checkpoint") from None
