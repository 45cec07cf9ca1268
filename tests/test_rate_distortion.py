"""The rate-distortion packer: trellis, rounding, steps, entropy coder, sensitivities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from helpers.tensors import random_matrix
from helpers.trainer import replace

STATES = [8, 64, 256]
INT32 = st.integers(-(2**31), 2**31 - 1)


def make_problem(rows, columns, seed=0):
    """The rounding problem of a random matrix with correlated inputs and uneven outputs."""
    weight, inputs = random_matrix(rows, columns, seed)
    outputs = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.1
    return t.rounding_problem(weight, inputs, outputs, 0.01, (0.5, 0.5, 1.0))


def decode(data, shapes, states):
    """The matrices in a stream."""
    matrices = [np.zeros(shape, np.int32) for shape in shapes]
    t.code_matrices(matrices, states, data)
    return matrices


def is_legal(integers, states):
    """Whether each column's parities are those that its trellis path from state 0 gives."""
    after = t.trellis(states)[0]
    state = np.zeros(integers.shape[1], np.int64)
    for row in integers:
        if ((row & 1) != (state & 1)).any():
            return False
        state = after[state, row >> 1 & 1]
    return True


def make_legal(integers, states):
    """The integers with their parities set to those of their trellis paths."""
    after = t.trellis(states)[0]
    state = np.zeros(integers.shape[1], np.int64)
    out = integers.copy()
    for row in out:
        row[:] = row & ~1 | (state & 1)
        state = after[state, row >> 1 & 1]
    return out


@pytest.mark.parametrize("states", STATES)
def test_two_ways_lead_into_and_out_of_every_state(states):
    after, before = t.trellis(states)
    assert (np.bincount(after.ravel(), minlength=states) == 2).all()
    assert all(after[before[bit, s], bit] == s for s in range(states) for bit in (0, 1))


@pytest.mark.parametrize("states, seed", [(s, seed) for s in STATES for seed in range(4)])
def test_viterbi_finds_what_trying_all_paths_finds(states, seed):
    generator = np.random.default_rng(seed)
    after, before = t.trellis(states)
    goal = (3 * generator.standard_normal(9)).astype(np.float32)
    price = generator.uniform(0.5, 2, 9).astype(np.float32)
    least = np.inf
    for bits in itertools.product((0, 1), repeat=9):
        state = 0
        cost = 0.0
        for r, bit in enumerate(bits):
            residue = 2 * bit + (state & 1)
            cost += price[r] * (goal[r] - (4 * np.rint((goal[r] - residue) / 4) + residue)) ** 2
            state = after[state, bit]
        least = min(least, cost)
    found = t.viterbi(goal, price, before)
    assert is_legal(found[:, None], states)
    assert (price * (goal - found) ** 2).sum() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("states, least_gain", [(8, 0.8), (64, 1.0), (256, 1.1)])
def test_the_trellis_gains_decibels_on_a_gaussian(states, least_gain):
    goal = (np.random.default_rng(0).standard_normal(20_000) / 0.2).astype(np.float32)
    found = t.viterbi(goal, np.ones_like(goal), t.trellis(states)[1])
    counts = np.unique(found >> 1, return_counts=True)[1] / len(found)
    bits = -(counts * np.log2(counts)).sum()
    error = ((goal - found) ** 2).mean() * 0.04
    assert 10 * np.log10(2 * np.pi * np.e / 12 * 2 ** (-2 * bits) / error) > least_gain


@pytest.mark.parametrize("states", [0, *STATES])
def test_two_threads_round_as_one_does(states):
    problems = {
        f"{rows}x{columns}": make_problem(rows, columns)
        for rows, columns in [(40, 33), (7, 130), (64, 64), (1, 5)]
    }
    one = t.round_matrices(problems, 0.02, states, 0.5, threads=1)
    two = t.round_matrices(problems, 0.02, states, 0.5, threads=2)
    assert list(one) == list(problems)
    assert all(torch.equal(a, b) for name in problems for a, b in zip(one[name], two[name], strict=True))
    assert states == 0 or all(is_legal(quantized.values.numpy(), states) for quantized in one.values())


@pytest.mark.parametrize("count", [0, 1, 7, 8, 21])
@pytest.mark.parametrize("first", [0, 5])
def test_products_are_subtracted_term_after_term_to_the_last_bit(count, first):
    generator = np.random.default_rng(count)
    target, factors, rows = (
        generator.standard_normal(shape).astype(np.float32) for shape in (33, count, (count, first + 33))
    )
    wanted = target.copy()
    for factor, row in zip(factors, rows, strict=True):
        wanted -= factor * row[first:]
    t.subtract_products(target, factors, rows, first)
    assert target.tobytes() == wanted.tobytes()


def test_error_under_the_inputs_falls_with_each_part():
    problem = make_problem(256, 96)
    inputs = random_matrix(256, 96)[1]
    row_exponents = np.full_like(problem.row_exponents, int(problem.row_exponents.mean()))
    column_exponents = np.zeros_like(problem.column_exponents)
    flat = problem._replace(row_exponents=row_exponents, column_exponents=column_exponents)

    def cost(integers, step_size):
        error = problem.weight - torch.from_numpy(integers * step_size).float()
        return float(torch.einsum("ri,ij,rj->", error, inputs, error))

    whole = t.step_sizes(row_exponents, column_exponents, 0.25)
    nearest = np.rint(problem.weight.numpy() / whole).astype(np.int32)
    scalar = cost(t.round_matrix(flat, whole, 0), whole)
    assert scalar < 0.9 * cost(nearest, whole)
    # A trellis with half the step size takes as many bits as scalars: its cosets are twice as wide.
    half = t.step_sizes(row_exponents, column_exponents, 0.125)
    assert cost(t.round_matrix(flat, whole, 64), whole) > scalar
    assert cost(t.round_matrix(flat, half, 64), half) < 0.9 * scalar


@pytest.mark.parametrize("states, most", [(0, 0.85), (64, 0.92)])
def test_errors_fed_to_later_rows_cost_less_under_both_moments(states, most):
    """YAQA's objective on a matrix whose outputs' gradients correlate, at equal bits."""
    weight, inputs = random_matrix(96, 64)
    outputs = random_matrix(1, 96, seed=5)[1]
    found = []
    for known in (outputs.diagonal(), outputs):
        problem = t.rounding_problem(weight, inputs, known, 0.01, (1, 1, 1), 0.05)
        delta = t.guess_delta({"": problem}, 3 * weight.numel() / 8, states)
        step_size = t.step_sizes(problem.row_exponents, problem.column_exponents, delta)
        integers = t.round_matrix(problem, step_size, states, 0.5)
        assert states == 0 or is_legal(integers, states)
        error = weight - torch.from_numpy(integers * step_size).float()
        cost = torch.einsum("ri,rs,sj,ij->", error, outputs, error, inputs)
        bits = 8 * len(t.code_matrices([integers], states)) / weight.numel()
        found.append(float(cost) * 4 ** (bits - 3))
    assert found[1] < most * found[0]


def round_in_turn(w, feedback, row_feedback, states):
    """The integers (C, R) of columns w (C, R) with steps of 1, one column after the other."""
    after, before = t.trellis(states)
    integers = np.zeros(w.shape, np.int32)
    rows = w.shape[1]
    for j, column in enumerate(w):
        given = column.copy()
        column -= feedback[:j, j] @ w[:j]
        taken = given - column
        state = 0
        for first in range(0, rows, t.ROW_BLOCK):
            end = min(first + t.ROW_BLOCK, rows)
            goals = column[first : end + t.ROW_PREVIEW].copy()
            found = t.viterbi(goals, np.ones_like(goals), before, state) if states else np.rint(goals)
            integers[j, first:end] = found[: end - first]
            for integer in integers[j, first:end]:
                state = after[state, integer >> 1 & 1]
            column[first:end] -= integers[j, first:end]
            column[end:] -= (column[first:end] + taken[first:end]) @ row_feedback[first:end, end:]
    return integers


@pytest.mark.parametrize("states", [0, 64])
@pytest.mark.parametrize("columns, rows", [(1, 1), (3, 40), (16, 17), (17, 300), (40, 333), (5, 700)])
def test_columns_side_by_side_are_rounded_as_one_after_the_other(columns, rows, states):
    """Eighths and feedback of whole numbers: every sum is exact, in whatever order it is taken."""
    generator = np.random.default_rng(rows)

    def sparse(size, many):
        upper = np.triu(generator.random((size, size)) < many / size, 1)
        return np.where(upper, generator.choice([-1, 1], (size, size)), 0).astype(np.float32)

    w = (generator.integers(-80, 80, (columns, rows)) / 8).astype(np.float32)
    feedback = sparse(columns, 1) + np.eye(columns, dtype=np.float32)
    row_feedback = sparse(rows, 2) + np.eye(rows, dtype=np.float32)
    after, before = t.trellis(states)
    none = np.zeros(rows, np.float32)
    found = t.round_columns(w.copy(), np.ones_like(w), feedback, row_feedback, none, after, before, 1 << 30)
    wanted = round_in_turn(w.copy(), feedback, row_feedback, states)
    assert np.abs(wanted).max() < 2**20
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("size", [1, 5, 8, 9, 21])
def test_an_upper_triangle_is_inverted_by_blocks_of_any_size(size, monkeypatch):
    monkeypatch.setattr(t, "INVERSE_BLOCK", 8)
    root, inverse = t.upper_root(random_matrix(1, size, seed=size)[1].double())
    assert torch.allclose(root @ inverse, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(inverse, inverse.triu())
    assert inverse.is_contiguous()  # rounding goes along its rows


def test_row_feedback_leaves_blocks_alone_and_undoes_the_root():
    outputs = random_matrix(1, 40, seed=3)[1]
    costs, feedback = t.feed_rows(outputs.double(), 0.1)
    damped = outputs.double() + 0.1 * outputs.diagonal().double().mean() * torch.eye(40)
    for first in range(0, 40, t.ROW_BLOCK):
        block = slice(first, first + t.ROW_BLOCK)
        assert torch.allclose(feedback[block, block], torch.eye(len(feedback[block])), atol=1e-5)
        assert (feedback[block, :first] == 0).all()
    # The cost of E = F^T N is that of N block by block.
    within = feedback.double() @ damped @ feedback.double().T
    assert torch.allclose(within.diagonal(), costs, rtol=1e-4)
    assert within[: t.ROW_BLOCK, t.ROW_BLOCK :].abs().max() < 1e-4 * within.abs().max()


def test_scales_are_powers_of_two_and_eight_constants():
    exponents = np.arange(-400, 400, dtype=np.int32)
    scale = t.step_sizes(np.zeros(1, np.int32), exponents, 1.0)[0]
    assert np.allclose(scale, 2.0 ** (exponents / 8), rtol=1e-7, atol=0)
    assert np.array_equal(scale[8:], 2 * scale[:-8])


def test_the_step_sizes_of_a_matrix_are_its_sensitivities_to_the_powers():
    weight, inputs = random_matrix(12, 7)
    outputs = torch.arange(1.0, 13)
    means = []
    for scale in (1, 16):
        problem = t.rounding_problem(weight, inputs, outputs * scale, 0.01, (0.5, 1, 1))
        means.append(problem.row_exponents.mean())
    # A 16-fold sensitivity makes step sizes two octaves smaller, one with the power of matrices at 0.5.
    assert means[0] - means[1] == t.STEPS_PER_OCTAVE
    problem = t.rounding_problem(weight, 4 * torch.eye(7), outputs, 0.0, (1, 1, 1))
    found = t.step_sizes(problem.row_exponents, problem.column_exponents, 1.0)
    assert np.allclose(found, 0.5 * outputs.numpy()[:, None] ** -0.5, rtol=0.1)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3),
    st.sampled_from([0, *STATES]),
    st.data(),
)
def test_streams_come_back(shapes, states, data):
    matrices = []
    for rows, columns in shapes:
        count = rows * columns
        values = data.draw(st.lists(INT32 | st.integers(-3, 3), min_size=count, max_size=count))
        matrix = np.array(values, np.int32).reshape(rows, columns)
        matrices.append(make_legal(matrix, states) if states else matrix)
    again = decode(t.code_matrices(matrices, states), shapes, states)
    assert all(np.array_equal(a, b) for a, b in zip(matrices, again, strict=True))


@pytest.mark.parametrize("states", [0, 64])
def test_streams_are_little_longer_than_their_entropy(states):
    generator = np.random.default_rng(0)
    integers = np.rint(3 * generator.standard_normal((1024, 512))).astype(np.int32)
    integers = make_legal(integers, states) if states else integers
    bits = 0.0
    for part in [integers[(integers & 1) == parity] for parity in (0, 1)] if states else [integers.ravel()]:
        counts = np.unique(part, return_counts=True)[1]
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    assert len(t.code_matrices([integers], states)) < 1.01 * bits / 8


def test_size_classes_are_quarters_of_an_octave():
    for size in (5, 6, 7):
        octaves = [t.size_class(size << octave) for octave in range(10)]
        assert octaves == list(range(size - 4, t.SIZE_CLASSES, 4))
    assert [t.size_class(size) for size in (0, 4)] == [0, 0]
    assert t.size_class(1 << 40) == t.SIZE_CLASSES - 1


@pytest.mark.parametrize("states", [0, 64])
def test_counts_start_as_geometric_distributions_of_the_size_to_expect(states):
    counts = t.initial_counts(states)
    assert (counts[:, t.SYMBOLS] == counts[:, : t.SYMBOLS].sum(1)).all() and (counts > 0).all()
    assert (counts[2 * t.SIZE_CLASSES :, : t.SYMBOLS] == 1).all()
    magnitude = (np.arange(t.SYMBOLS) + 1) // 2 << (states > 0)
    for middle in (1.125, 1.375, 4.5):  # of the classes that these sixteenths fall into
        extra = counts[t.size_class(int(16 * middle)), : t.SYMBOLS] - 1
        powers = (middle / (middle + 1)) ** magnitude
        exact = 128 * t.COUNT_GAIN * powers / powers.sum()
        assert (np.abs(exact - 0.5 - extra) < 0.51).all()  # rounded down


def test_carries_run_through_the_stream():
    """Symbols at the upper end of the interval leave bytes of 255 that a later carry turns over."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        integers = np.where(generator.random((64, 64)) < 0.02, -99, 0).astype(np.int32)
        integers[:, ::7] = 3
        assert np.array_equal(decode(t.code_matrices([integers], 0), [(64, 64)], 0)[0], integers)


def test_a_guessed_step_size_is_stored_as_any_other():
    """A guess is a number of NumPy, of which torch would make float64, which no artifact may hold."""
    problems = {"a": make_problem(8, 8)}
    rounded = t.round_matrices(problems, t.guess_delta(problems, 24.0, 8), 8, 0.5)["a"]
    assert rounded.delta.dtype == torch.float32


@pytest.mark.parametrize("fit", [t.EXACT_FIT, t.QUICK_FIT])
@pytest.mark.parametrize(
    "curve", [lambda x: 1e6 * 2**-x, lambda x: 4e5 - 1.1e5 * x, lambda x: 1e6 / (1 + 2.0**x)]
)
def test_the_goal_is_met_from_below(curve, fit):
    tried = []

    def size_of(delta):
        tried.append(delta)
        return int(curve(np.log2(delta)))

    delta = t.fit_delta(1.0, 3.3e5, 2e5, size_of, lambda line: None, fit)
    tolerance = fit.tolerance if len(tried) < fit.trials else 0.05
    assert 0 <= 3.3e5 - size_of(delta) <= tolerance * 3.3e5 and len(tried) <= 9


def test_a_quick_fit_goes_on_until_a_file_is_small_enough():
    sizes = iter([9.0, 4.0, 3.5, 3.4, 3.2])
    tried = []

    def size_of(delta):
        tried.append(delta)
        return int(1e5 * next(sizes))

    assert t.fit_delta(1.0, 3.3e5, 2e5, size_of, lambda line: None, t.QUICK_FIT) == tried[4]
    sizes = iter([9.0, 3.15, 3.2])
    tried.clear()
    assert t.fit_delta(1.0, 3.3e5, 2e5, size_of, lambda line: None, t.QUICK_FIT) == min(tried[1:])


def test_moments_are_those_of_inputs_and_of_gradients_of_drawn_labels(config, monkeypatch):
    torch.manual_seed(0)
    config = replace(config, gptq_calibration_batches=1, bigram_rows=50, bigram_width=6)
    run, model, data = t.Run(config), t.GPT(config), t.Dataset(config)
    with torch.no_grad():
        for name in ("qo", "down", "embed", "bigram_rows"):
            model.get_parameter(name).add_(0.3 * torch.randn_like(model.get_parameter(name)))
    model.looped = True
    found = t.collect_moments(run, model, data)
    assert set(found) == {m.key for m in t.list_matrices(model.table)} and model.qo.grad is None
    batch = t.ShuffledLoader(config, data).get(0, 0)
    batch = batch._replace(targets=batch.targets.clone())
    given, inputs, outputs = batch.inputs.clone(), {}, {}

    def tap(site, layer, x, y):
        inputs.setdefault((site, layer), []).append(x.detach().flatten(0, -2))
        outputs.setdefault((site, layer), []).append(y)
        y.retain_grad()
        if site == "head":
            logit = config.logit_softcap * torch.tanh(y.detach().flatten(0, 1) / config.logit_softcap)
            drawn = torch.multinomial(torch.softmax(logit, -1), 1, generator=torch.Generator().manual_seed(0))
            batch.targets.copy_(drawn.view_as(batch.targets))

    model(batch, tap).sum().backward()
    assert torch.equal(batch.inputs, given)
    count = batch.targets.numel()
    for key, (moments, fisher) in found.items():
        x, g = torch.cat(inputs[key]), torch.cat([y.grad.flatten(0, -2) for y in outputs[key]])
        if key[0] == "bigram":  # what becomes of an error in a row of a table, and how often it is read
            x, g = g, torch.stack([(x == row).sum() for row in range(50)]).sqrt()[None]
        assert torch.allclose(moments, x.T @ x / count, rtol=1e-4, atol=1e-5), key
        if key[0] != "head":
            assert torch.allclose(fisher, g.square().sum(0) / count, rtol=1e-3, atol=1e-12), key
    cap, y = config.logit_softcap, outputs["head", 0][0].flatten(0, 1)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: F.log_softmax(cap * torch.tanh(y / cap), 0)))(
        y[:4]
    )
    chance = torch.softmax(cap * torch.tanh(y / cap), -1)
    exact = torch.einsum("nv,nvw->w", chance[:4].detach(), jacobian.square())
    slope = 1 - torch.tanh(y[:4] / cap).square()
    assert torch.allclose(exact, (chance[:4] * (1 - chance[:4]) * slope.square()).sum(0), rtol=1e-3)
    assert torch.allclose(
        found["head", 0][1], (chance * (1 - chance) * (1 - torch.tanh(y / cap) ** 2) ** 2).mean(0)
    )


def test_sdclip_needs_no_gradients(config):
    config = replace(config, quantizer="sdclip")
    torch.manual_seed(0)
    model = t.GPT(config)
    plain = t.collect_moments(t.Run(config), model, t.Dataset(config))
    other = t.collect_moments(t.Run(replace(config, quantizer="rate_distortion")), model, t.Dataset(config))
    assert all(torch.allclose(plain[key][0], other[key][0], rtol=1e-5, atol=1e-6) for key in plain)
    assert all((plain[key][1] == 0).all() for key in plain)
