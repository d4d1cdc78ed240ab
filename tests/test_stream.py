"""Streams equal plain stacks, whatever the chunk; they survive small memories and end at deadlines."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from rounding import assert_alike, close
from torch.func import grad, jvp, vmap

import esegeta as eg
from esegeta import zoo
from esegeta.engine import levels, likeness, memory, progress, stream
from esegeta.engine.gradient import gradient

CHUNKS = [1, 2, 3, 7, 100, None]


def wave(t):
    return torch.stack([t.sin(), t**2, t.exp()])


def nodes(n=10):
    return (torch.arange(1, n + 1, dtype=torch.float64) * 0.6180339887498949) % 1


# ------------------------------------------------------------------ equal to plain stacks


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("n", [1, 2, 10, 17])
def test_every_fold_is_that_of_the_stack(chunk, n):
    t, w = nodes(n), nodes(n + 100)[100:]
    stack = torch.stack([wave(s) for s in t])
    with eg.execution(chunk=chunk):
        close(stream.integral(wave, t, w, label="test"), torch.einsum("n,nc->c", w, stack))
        close(stream.mean(wave, t, label="test"), stack.mean(0))
        centre, spread = stream.moments(wave, t, label="test")
        low, high = stream.extrema(wave, t, label="test")
        tree = stream.mean(lambda node: {"a": node[0] * node[1], "b": (wave(node[0]),)}, (t, w), label="test")
        alone = stream.mean(wave, t, label="test", together=False)
    close(centre, stack.mean(0))
    close(spread, stack.var(0, correction=0))
    assert_alike(low, stack.amin(0))
    assert_alike(high, stack.amax(0))
    close(tree["a"], (t * w).mean())
    close(tree["b"][0], stack.mean(0))
    close(alone, stack.mean(0))


@pytest.mark.parametrize("chunk", [1, 3, 4, 5])
def test_moments_do_not_cancel(chunk):
    values = 1e9 + nodes(11)
    with eg.execution(chunk=chunk):
        centre, spread = stream.moments(lambda t: t, values, label="test")
    torch.testing.assert_close(spread, values.var(correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(centre - 1e9, (values - 1e9).mean(), rtol=0, atol=1e-6)


def test_the_fold_gets_every_node_once_and_in_order():
    seen = []
    with eg.execution(chunk=3):
        total = stream.fold(
            lambda node: node["i"] * 2,
            {"i": torch.arange(8), "j": torch.arange(8) + 10},
            lambda state, values, piece: (
                seen.append((values.tolist(), piece["i"].tolist(), piece["j"].tolist())),
                state + int(values.sum()),
            )[1],
            0,
            label="test",
        )
    assert total == 56
    assert seen == [
        ([0, 2, 4], [0, 1, 2], [10, 11, 12]),
        ([6, 8, 10], [3, 4, 5], [13, 14, 15]),
        ([12, 14], [6, 7], [16, 17]),
    ]


def test_nodes_that_cannot_share_a_call_come_one_at_a_time():
    seen = []

    def fn(node):
        assert not levels.wrapped(node)
        seen.append(node.item())  # impossible inside of a map
        return node * 2.0

    assert stream.mean(fn, torch.arange(4), label="test", together=False).item() == 3
    assert seen == [0, 1, 2, 3]


def test_sums_of_half_precision_values_do_not_stop_growing():
    ones, each = torch.ones(1000, dtype=torch.bfloat16), torch.full((1000,), 1e-3)
    found = []
    for chunk in (1000, 1):
        with eg.execution(chunk=chunk):
            found.append(float(stream.mean(lambda t: t * 1, ones, label="test")))
            found.append(float(stream.integral(lambda t: t * 1, ones, each, label="test")))
    assert found == pytest.approx([1, 1, 1, 1], rel=0.01)


def test_integrals_of_integers():
    total = stream.integral(lambda t: (t > 0).long(), torch.ones(4), torch.full((4,), 0.25), label="test")
    assert float(total) == 1


# ------------------------------------------------------------------ inside of transforms, one inside another


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_streams_inside_of_maps_and_derivatives(chunk):
    t, w = nodes(6), nodes(7)[1:]
    x = torch.rand(4, 3, dtype=torch.float64)

    def streamed(x):
        return stream.integral(lambda t: (t * x).sin(), t, w, label="test").sum()

    def plain(x):
        return (w[:, None] * (t[:, None] * x).sin()).sum()

    def spread(x):
        return stream.moments(lambda t: (t * x).sin(), t, label="test")[1].sum()

    with eg.execution(chunk=chunk):
        close(vmap(streamed)(x), vmap(plain)(x))
        close(vmap(grad(streamed))(x), vmap(grad(plain))(x))
        close(jvp(grad(streamed), (x[0],), (x[1],))[1], jvp(grad(plain), (x[0],), (x[1],))[1])
        plain_spread = lambda x: (t[:, None] * x).sin().var(0, correction=0).sum()
        close(vmap(grad(spread))(x), vmap(grad(plain_spread))(x))
        z = x[0].clone().requires_grad_()
        close(torch.autograd.grad(streamed(z), z)[0], grad(plain)(x[0]))
        inner = lambda z: stream.mean(lambda t: gradient(lambda y: (t * y).sin().sum())(z), t, label="test")
        direct = lambda z: (t[:, None] * (t[:, None] * z).cos()).mean(0)
        close(vmap(inner)(x), torch.stack([direct(z) for z in x]))
        close(torch.func.jacrev(inner)(x[0]), torch.func.jacrev(direct)(x[0]))


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_streams_inside_of_streams(chunk):
    t, s = nodes(5), nodes(4)
    with eg.execution(chunk=chunk):
        got = stream.mean(
            lambda a: stream.integral(lambda b: (a * b).sin(), s, s, label="in"), t, label="out"
        )
    close(got, (torch.sin(t[:, None] * s) * s).sum(1).mean())


def test_a_chunk_counts_the_examples_of_the_maps_around():
    seen = []
    fn = lambda t: (seen.append(levels.mapped()), t * 1.0)[1]
    with eg.execution(chunk=12):
        vmap(lambda x: stream.mean(lambda t: fn(t) * x, torch.arange(10.0), label="test"))(torch.ones(4))
    assert seen == [12, 12, 12, 4]
    seen.clear()
    with eg.execution(chunk=2):  # less than the map itself: one node at a time
        vmap(lambda x: stream.mean(lambda t: fn(t) * x, torch.arange(3.0), label="test"))(torch.ones(4))
    assert seen == [4, 4, 4]


# ------------------------------------------------------------------ chunks from measurements


def sizes_of(elements, n=64, **settings):
    seen = []

    def fn(t):
        seen.append(levels.mapped())
        return (t * torch.ones(elements)).sin().sum()

    with eg.execution(**settings):
        stream.mean(fn, torch.arange(float(n)), label="test")
    assert sum(seen) == n
    return seen


def test_small_work_goes_in_large_chunks_and_large_work_in_the_least(monkeypatch):
    assert sizes_of(10) == [2, 62]
    monkeypatch.setattr("esegeta.engine.memory.CPU_TARGET", 100_000)
    assert sizes_of(100_000, 8) == [2, 2, 2, 2]
    medium = sizes_of(1000)
    assert medium[0] == 2
    assert 2 < medium[1] < 30


def test_memory_is_respected():
    assert sizes_of(1000, 4, memory=1) == [2, 1, 1]
    few, many = sizes_of(1000, memory="64 KiB"), sizes_of(1000, memory="256 KiB")
    assert few[0] == many[0] == 2
    assert few[1] * 3 < many[1]
    # A node allocates at most four rows of 4000 bytes.
    assert many[1] * 4 * 4000 >= 2**17
    assert many[1] * 4000 <= 2**18
    assert sizes_of(10, chunk=7) == [7] * 9 + [1]


# ------------------------------------------------------------------ out of memory


def limited(most):
    seen = []

    def fn(t):
        seen.append(levels.mapped())
        if levels.mapped() > most:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return wave(t)

    return fn, seen


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_halves_the_chunk(error):
    t = nodes(13)

    def fn(node):
        if levels.mapped() > 3:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return wave(node)

    with (
        eg.execution(chunk=8) as run,
        pytest.warns(eg.ExecutionWarning, match=r"^test: out of memory with \d at once") as w,
    ):
        got = stream.integral(fn, t, t, label="test")
    close(got, (torch.stack([wave(s) for s in t]) * t[:, None]).sum(0))
    assert [(e["event"], e["size"]) for e in run.events] == [("out of memory", 8), ("out of memory", 4)]
    assert len(w) == 2


def test_the_chunk_stays_small_after_a_failure():
    fn, seen = limited(3)
    with eg.execution(chunk=8), pytest.warns(eg.ExecutionWarning):
        stream.moments(fn, nodes(9), label="test")
    assert seen == [8, 4, 2, 2, 2, 2, 1]


def test_the_first_measured_chunk_may_fail_too():
    fn, seen = limited(1)
    with pytest.warns(eg.ExecutionWarning, match="with 2 at once, going on with 1"):
        close(stream.mean(fn, nodes(3), label="test"), torch.stack([wave(s) for s in nodes(3)]).mean(0))
    assert seen == [2, 1, 1, 1]


def test_one_step_that_does_not_fit_is_an_error():
    fn, _ = limited(0)
    with (
        pytest.warns(eg.ExecutionWarning),
        pytest.raises(
            torch.OutOfMemoryError, match=r"test: one step alone does not fit into memory. Use smaller"
        ),
    ):
        stream.mean(fn, nodes(4), label="test")


def test_other_errors_come_through_at_once():
    def fn(t):
        raise RuntimeError("mine")

    with eg.execution(chunk=4) as run, pytest.raises(RuntimeError, match=r"^mine$"):
        stream.mean(fn, nodes(4), label="test")
    assert run.events == []


def test_an_inner_stream_that_cannot_shrink_makes_the_outer_one_shrink():
    s = nodes(2)

    def outer(a):
        def inner(b):
            if levels.mapped() > 2:
                raise torch.OutOfMemoryError
            return a * b

        return stream.integral(inner, s, s, label="in")

    with eg.execution(chunk=4), pytest.warns(eg.ExecutionWarning):
        got = stream.mean(outer, nodes(8), label="out")
    close(got, nodes(8).mean() * (s * s).sum())


# ------------------------------------------------------------------ deadlines


def slow(seconds):
    def fn(t):
        time.sleep(seconds)
        return wave(t)

    return fn


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_mean_ends_at_the_deadline_with_the_mean_of_what_it_has(chunk):
    t = nodes(100)
    with (
        eg.execution(deadline=0.1, chunk=chunk) as run,
        pytest.warns(
            eg.ExecutionWarning,
            match=r"^test: the deadline passed; the result is that of the first \d+ of 100",
        ),
    ):
        got = stream.mean(slow(0.03), t, label="test")
    (event,) = run.events
    assert (event["event"], event["total"]) == ("partial", 100)
    assert 0 < event["done"] < 20
    assert event["done"] % chunk == 0
    close(got, torch.stack([wave(s) for s in t[: event["done"]]]).mean(0))


def test_moments_and_extrema_end_at_the_deadline_too():
    t = nodes(50)
    with eg.execution(deadline=0.1, chunk=1) as run, pytest.warns(eg.ExecutionWarning):
        centre, spread = stream.moments(slow(0.03), t, label="test")
    seen = torch.stack([wave(s) for s in t[: run.events[0]["done"]]])
    close(centre, seen.mean(0))
    close(spread, seen.var(0, correction=0))
    with eg.execution(deadline=0.1, chunk=1) as run, pytest.warns(eg.ExecutionWarning):
        low, _ = stream.extrema(slow(0.03), t, label="test")
    close(low, torch.stack([wave(s) for s in t[: run.events[0]["done"]]]).amin(0))


def test_partial_extrema_are_not_called_a_mean():
    with eg.execution(deadline=0.1, chunk=1), pytest.warns(eg.ExecutionWarning) as w:
        stream.extrema(slow(0.03), nodes(50), label="test")
    assert "the result is the mean" not in str(w[0].message)


def test_an_integral_cut_short_is_an_error():
    with (
        eg.execution(deadline=0.05, chunk=1),
        pytest.raises(
            eg.DeadlineExceeded, match=r"^test: the deadline passed after \d of 50 steps, .* Allow more time"
        ),
    ):
        stream.integral(slow(0.03), nodes(50), nodes(50), label="test")
    with eg.execution(deadline=0.0), pytest.raises(eg.DeadlineExceeded, match="after 0 of 50 steps"):
        stream.mean(wave, nodes(50), label="test")


def test_a_stream_that_ends_in_time_does_not_mind_the_deadline():
    with eg.execution(deadline=60.0) as run:
        stream.integral(wave, nodes(5), nodes(5), label="test")
    assert run.events == []


# ------------------------------------------------------------------ progress


def reports(work, **settings):
    seen = []
    with eg.execution(progress=lambda label, fraction: seen.append((label, fraction)), **settings):
        work()
    assert progress._bar.get() is None
    return seen


def monotone(fractions):
    return all(a <= b + 1e-12 for a, b in pairwise(fractions))


def test_progress_of_one_loop():
    seen = reports(lambda: stream.mean(wave, nodes(5), label="test"), chunk=2)
    assert seen == [("test", 0.4), ("test", 0.8), ("test", 1.0)]


def test_progress_of_nested_loops():
    inner = lambda a: stream.integral(lambda b: a * b, nodes(3), nodes(3), label="in")
    seen = reports(lambda: stream.mean(inner, nodes(4), label="out"), chunk=1)
    fractions = [f for _, f in seen]
    assert {label for label, _ in seen} == {"out"}
    assert monotone(fractions)
    assert fractions[0] == pytest.approx(1 / 12)
    assert fractions[-1] == 1
    assert len(set(fractions)) >= 12


def test_progress_of_two_loops_inside_of_one():
    def inner(a):
        return sum(stream.mean(lambda b: a * b, nodes(2), label="in") for _ in range(2))

    fractions = [f for _, f in reports(lambda: stream.mean(inner, nodes(2), label="out"), chunk=1)]
    assert fractions[-1] == 1
    assert monotone(fractions)


def test_progress_does_not_go_back_after_a_failure():
    fn, _ = limited(2)
    with pytest.warns(eg.ExecutionWarning):
        fractions = [f for _, f in reports(lambda: stream.mean(fn, nodes(16), label="test"), chunk=8)]
    assert fractions[-1] == 1
    assert monotone(fractions)


def test_an_exception_ends_the_bar():
    def fn(t):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reports(lambda: stream.mean(fn, nodes(3), label="test"))
    assert progress._bar.get() is None


def test_bars_are_drawn_on_request_only(capsys):
    stream.mean(wave, nodes(5), label="quiet")
    assert capsys.readouterr().err == ""
    with eg.execution(progress=True, chunk=1):
        stream.mean(slow(0.12), nodes(2), label="loud")
    err = capsys.readouterr().err
    assert "loud" in err
    assert "100 %" in err
    assert err.endswith("\n")
    with eg.execution(progress=True), eg.execution(progress=False):
        stream.mean(slow(0.12), nodes(2), label="quiet")
    assert capsys.readouterr().err == ""


class Counted:
    """How often the measurement of live memory was switched on."""

    def __init__(self, monkeypatch):
        self.times = 0
        enter = memory.Live.__enter__

        def entering(live):
            self.times += 1
            return enter(live)

        monkeypatch.setattr(memory.Live, "__enter__", entering)

    def by(self, run):
        before = self.times
        run()
        return self.times - before


def test_what_one_stream_occupies_is_measured_once_for_all_that_are_alike(monkeypatch):
    counted = Counted(monkeypatch)
    net = zoo.small_unet(2)
    score = eg.reducers.class_sum(eg.from_module(net), 1)
    xs = eg.random.normal(0, (4, 1, 8, 8))
    explain = lambda xs, key: eg.batched(eg.smooth(eg.gradient(score), samples=4))(xs, key=key)
    first = explain(xs, 1)
    assert counted.times > 0
    assert counted.by(lambda: explain(2 * xs, 2)) == 0  # other values, another key, made anew: alike
    assert torch.equal(explain(xs, 1), first)  # with the same chunks, to the last bit
    assert counted.by(lambda: explain(xs.repeat(1, 1, 2, 2), 1)) > 0  # another shape
    with eg.execution(layout="contiguous"):
        assert counted.by(lambda: explain(xs, 1)) > 0
    hook = net.encoder.conv.register_forward_hook(lambda *_: None)
    assert counted.by(lambda: explain(xs, 1)) > 0  # a hook may keep what it sees
    hook.remove()
    assert counted.by(lambda: explain(xs, 1)) == 0


def test_what_is_remembered_of_streams_is_bounded_and_goes_with_its_objects():
    class Thing:
        def __call__(self, x):
            return x

    known, things = likeness.Memory(), [Thing() for _ in range(2 * likeness._MOST)]
    for thing in things:
        known.remember(likeness.likeness(thing), 7)
    assert len(known._known) == likeness._MOST
    assert known.recall(likeness.likeness(things[-1])) == 7
    assert known.recall(likeness.likeness(things[0])) is None
    del things, thing
    gc.collect()
    assert not known._known


def test_streams_in_many_threads_remember_the_same():
    score = eg.reducers.class_sum(eg.from_module(zoo.small_unet(2)), 1)
    xs = eg.random.normal(0, (4, 1, 8, 8))
    explain = eg.batched(eg.gradient(score))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: explain(xs), range(8)))
    assert all(torch.allclose(a, found[0], rtol=1e-4, atol=1e-6) for a in found)
