"""`python -m bench.quality` on a tiny model and made-up text: what is trained on, the runner, the figures, the table."""

from __future__ import annotations

import math
import random
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.quality import language_model, results, tasks
from bench.quality.diagnose import AttentionMeasure, FfnMeasure, diagnose, sum_blocks
from bench.quality.language_model import Pretrained, Pretraining, Shape, new_model
from bench.quality.plot import plot
from bench.quality.tasks import Budget, Examples, NextToken, Task
from bench.quality.text import Split, documented_functions, library_halves
from bench.quality.tokens import END, IGNORED, cut, pack, pairs, train_tokenizer
from bench.quality.training import Average, Point, Record, example_order, train
from bench.quality.variants import VARIANTS, variant
from tests.planning_device import DEVICE

SHAPE = Shape(vocabulary=320, width=32, hidden=64, layers=1, heads=2, length=64)
BUDGET = Budget(steps=6, batch=2, learning_rate=3e-3, every=3, held_out=4)
SMALL = '{"attention.query_block": 8, "attention.key_block": 8, "attention.density": 0.25}'


def text(seed: int, words: int = 400, factor: int = 7) -> str:
    """Words that can be predicted a little: each is followed by one of two, which `factor` decides."""
    choose = random.Random(seed)
    word, said = 0, []
    for _ in range(words):
        word = (word * factor + choose.choice((1, 2))) % 40
        said.append(f"word{word}")
    return " ".join(said)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pretrained]:
    """A tiny pretrained model; made once, then found in a cache of its own."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        (folder / f"{i}.py").write_text(text(i))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        settings = Pretraining(SHAPE, steps=30, batch=4, learning_rate=1e-2)
        files = sorted(folder.glob("*.py"))
        first = language_model.pretrained(settings, files)
        patch.setattr(language_model, "_train", lambda *_: pytest.fail("trained again instead of read from the cache"))
        again = language_model.pretrained(settings, files)
        assert again.loss == first.loss < math.log(SHAPE.vocabulary)
        assert all(torch.equal(again.weights[name], value) for name, value in first.weights.items())
        yield again


@pytest.fixture(scope="module")
def task(base: Pretrained) -> Task:
    train_ids, held_out_ids = (cut(base.tokenizer, [text(seed, 1200, factor=11)], SHAPE.length) for seed in (10, 11))
    train_examples, held_out = (Examples({"input_ids": ids, "labels": ids}) for ids in (train_ids, held_out_ids))
    # One batch, again and again: it is learned in a few steps.
    train_examples, held_out = train_examples.spread(BUDGET.batch), held_out.spread(BUDGET.held_out)
    return Task("lm", "tiny", train_examples, held_out, lambda: NextToken(tasks.adapted(base.model())))


def record(name: str, seed: int, losses: list[float], step: float, dense_loss: float = 2.0) -> Record:
    points = [Point(5 * i, loss, 0.5) for i, loss in enumerate(losses)]
    steps = 5 * (len(losses) - 1)
    made = Record("lm", "tiny", name, None if name == "dense" else {}, seed, replace(BUDGET, steps=steps), "aot")
    made.points, made.dense_points = points, [Point(steps, dense_loss, 0.4)]
    made.wall_seconds, made.cpu_seconds = [100.0, 50.0, *[step] * (steps - 2)], [2 * step] * steps  # the first two steps compile
    return made


def test_halves_of_the_library_share_no_package(tmp_path: Path) -> None:
    for name, size in (
        ("big/a.py", 900),
        ("big/b.py", 10),
        ("middle/a.py", 500),
        ("small.py", 100),
        ("tiny.py", 5),
        ("big/test/c.py", 9999),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#" * size)
    first, second = library_halves(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in first] == ["big/a.py", "big/b.py", "small.py"]
    assert [p.relative_to(tmp_path).as_posix() for p in second] == ["middle/a.py", "tiny.py"]
    split = Split.of(first)
    assert not set(split.train) & set(split.held_out) and {*split.train, *split.held_out} == set(first)


def test_a_function_loses_its_docstring_to_the_answer() -> None:
    source = textwrap.dedent(
        '''
        class A:
            def f(self, x):
                """Add
                one."""
                return x + 1

            def g(self): "short"; return 1

            def h(self):
                """Only words."""
        '''
    )
    assert list(documented_functions(source)) == [("def f(self, x):\n    return x + 1\n", "Add\none.")]
    assert list(documented_functions("def broken(:")) == []


def test_labels_are_those_of_answers_alone() -> None:
    made: list[tuple[list[int], list[int]]] = [([11, 12], [13, END]), ([21] * 9, [22] * 9), ([31], [32, END]), ([41, 42, 43], [44, END])]
    tokens, labels = pack(made, 8)
    assert tokens.tolist() == [[11, 12, 13, END, 31, 32, END, END], [41, 42, 43, 44, END, END, END, END]]  # the second pair fits nowhere
    i = IGNORED
    assert labels.tolist() == [[i, i, 13, END, i, 32, END, i], [i, i, i, 44, END, i, i, i]]


def test_the_tally_counts_what_is_labelled() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([1, IGNORED, 4, 0, IGNORED, 2])
    loss, right, counted = tasks.tally(logits, labels)
    keep = labels != IGNORED
    assert counted == 4 and right == (logits[keep].argmax(-1) == labels[keep]).sum()
    torch.testing.assert_close(loss, 4 * cross_entropy(logits[keep], labels[keep]))


def test_a_token_is_predicted_from_those_before_it(base: Pretrained) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[IGNORED, IGNORED, IGNORED, 8]])
    model = base.model().eval()
    with torch.no_grad():
        loss, _, counted = NextToken(model)(ids, labels)
        want = cross_entropy(model(input_ids=ids).logits[:, 2], ids[:, 3])
    assert counted == 1
    torch.testing.assert_close(loss, want)


def test_text_survives_its_tokens(base: Pretrained) -> None:
    ((prompt, answer),) = pairs(base.tokenizer, [("naïve ∑ code", "an answer")])
    assert base.tokenizer.decode(prompt) == "naïve ∑ code" and base.tokenizer.decode(answer) == "an answer"
    assert train_tokenizer([text(0)], 300).get_vocab_size() <= 300


def test_every_variant_sees_the_same_order() -> None:
    order = example_order(7, replace(BUDGET, steps=7, batch=2), seed=3)
    assert sorted(order.flatten()[:7].tolist()) == list(range(7)) and sorted(order.flatten()[7:].tolist()) == list(range(7))
    assert torch.equal(order, example_order(7, replace(BUDGET, steps=7, batch=2), seed=3))
    assert not torch.equal(order, example_order(7, replace(BUDGET, steps=7, batch=2), seed=4))


def test_the_average_is_of_the_last_ninth_of_the_steps() -> None:
    parameter = torch.nn.Parameter(torch.tensor([5.0]))
    average = Average([parameter])
    with average.applied():
        assert parameter.item() == 5.0  # no step yet
    for step in range(1, 901):
        parameter.data.fill_(step)
        average.update()
        if step == 1:
            with average.applied():
                assert parameter.item() == 1.0  # nothing of the start
    with pytest.raises(KeyError), average.applied():
        assert parameter.item() == pytest.approx(900 - 900 / 10, rel=1e-3)  # weights as (n / 900)^8: their mean is 9 / 10 of the way
        raise KeyError
    assert parameter.item() == 900.0


def test_runs_and_their_records(task: Task, tmp_path: Path) -> None:
    """Dense and sparse start as one model and learn apart; then the table and the figure of their files."""
    runs = {}
    for given in ("dense", f"sparse={SMALL}"):
        name, options = variant(given)
        runs[name] = Record("lm", "tiny", name, options, 0, BUDGET, "aot")
        assert not results.done(tmp_path, runs[name])
        train(task, runs[name])
        results.save(tmp_path, runs[name])
        assert results.done(tmp_path, runs[name]) and not results.done(tmp_path, replace(runs[name], budget=replace(BUDGET, batch=3)))
    dense, sparse = runs["dense"], runs["sparse"]
    assert [p.step for p in dense.points] == [0, 3, 6] == [p.step for p in sparse.points]
    assert dense.losses[-1] < dense.losses[0] and sparse.losses[-1] < sparse.losses[0]
    assert (sparse.rewritten, dense.rewritten) == (2, 0)
    assert sparse.losses[0] == pytest.approx(dense.losses[0], rel=0.1) and sparse.losses[0] != pytest.approx(dense.losses[0], rel=1e-4)
    assert sparse.dense_points[0].loss == pytest.approx(dense.points[0].loss, rel=1e-5)  # prepared but untrained, evaluated dense
    assert sparse.dense_points[-1].loss != pytest.approx(sparse.points[-1].loss, rel=1e-5)
    assert [r["kind"] for r in sparse.regions] == ["attention", "ffn"] * SHAPE.layers

    loaded = {r.variant: r for r in results.load(tmp_path)}
    assert loaded["sparse"].points[-1].loss == pytest.approx(sparse.points[-1].loss, rel=1e-5)
    assert loaded["sparse"].budget == BUDGET and loaded["dense"].options is None
    printed = results.table(loaded.values(), "wall")
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:] == ["dense", "sparse"]
    assert f"{dense.points[-1].loss:.4f}" in printed
    (figure,) = plot(list(loaded.values()), tmp_path, "cpu")
    assert figure.name == "lm-tiny-6steps.svg" and figure.stat().st_size > 5000


def test_a_planned_run_is_as_fast_as_uniform_densities(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sptc.backend.calibrate", lambda *_: DEVICE)
    deeper = replace(task, objective=lambda: NextToken(new_model(replace(SHAPE, layers=2))))
    name, options = variant("planned")
    run = Record("lm", "tiny", name, options, 0, replace(BUDGET, steps=1), "aot")
    train(deeper, run)
    results.save(tmp_path, run)
    again = Record("lm", "tiny", name, variant("planned")[1], 0, replace(BUDGET, steps=1), "aot")  # its options name no file of the run
    assert results.done(tmp_path, again)
    (saved,) = results.load(tmp_path)
    plan = saved.plan
    assert plan is not None and plan["speedup"] >= plan["uniform_speedup"] > 1
    assert plan["error"] > 0 and plan["uniform_error"] > 0
    kinds = [key.rpartition(":")[2].rstrip("0") for key in plan["densities"]]
    sparse = [kind for kind, density in zip(kinds, plan["densities"].values(), strict=True) if density < 1]
    assert sorted(kinds) == ["attention"] * 2 + ["ffn"] * 2
    assert saved.rewritten == len(sparse) and [region["kind"] for region in saved.regions] == sparse  # in the order of the model
    assert saved.points[0].loss != pytest.approx(saved.dense_points[0].loss, rel=1e-6)
    shares = [sum(region["shares"]) / 16 for region in saved.regions if region["kind"] == "ffn"]
    assert shares == pytest.approx([density for key, density in plan["densities"].items() if "ffn" in key and density < 1], abs=1e-3)


def test_regions_are_measured_against_dense(task: Task) -> None:
    torch.manual_seed(0)
    objective = task.objective()
    batch = task.train.take(slice(0, 2))
    router = {"ffn.selector": "router", "ffn.density": 0.5}
    exact = {"decline": "never", **router, "attention.density": 1.0, "ffn.density": 1.0}
    for measure in diagnose(objective, batch, exact):
        assert measure.error < 1e-5
        if isinstance(measure, AttentionMeasure):
            assert measure.mass == pytest.approx(1, abs=1e-5) and measure.best_error < 1e-5
        else:
            assert set(measure.shares) == {1.0}
    _, options = variant(f"sparse={SMALL}")
    assert options is not None
    measures = diagnose(objective, batch, {**options, **router})
    attention = [m for m in measures if isinstance(m, AttentionMeasure)]
    ffn = [m for m in measures if isinstance(m, FfnMeasure)]
    assert len(attention) == len(ffn) == SHAPE.layers
    for m in attention:
        assert 0 < m.error < 1 and 0 < m.mass < 1
        assert m.mass <= m.best_mass + 1e-6 and m.nearest_mass <= m.best_mass + 1e-6
    for f in ffn:
        assert f.error > 0 and sum(f.shares) == pytest.approx(8, abs=1e-3)  # 8 of 16 blocks are active for a token


def test_sums_over_rectangles() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert sum_blocks(x, 2, 3).tolist() == [[0 + 1 + 2 + 4 + 5 + 6, 3 + 7], [8 + 9 + 10, 11]]


def test_curves_between_points() -> None:
    xs, ys = [0.0, 10.0, 20.0], [4.0, 2.0, 1.0]
    assert [results.interpolate(x, xs, ys) for x in (-1, 0, 5, 10, 15, 20, 30)] == [4, 4, 3, 2, 1.5, 1, 1]


def test_equal_seconds_are_those_of_the_faster() -> None:
    """Compiling does not count: a step is 2 s and 1 s, so sparse ends after 10 s, when dense has done 5 of its 10 steps."""
    dense, sparse = record("dense", 0, [4.0, 3.0, 2.0], step=2.0), record("sparse", 0, [4.0, 3.3, 2.4], step=1.0)
    assert results.seconds_at(dense, "wall") == [0, 10, 20] and results.seconds_at(sparse, "cpu") == [0, 10, 20]
    assert results.at_equal_seconds(sparse, dense, "wall") == pytest.approx(2.4 / 3.0 - 1)
    slow = record("slow", 0, [4.0, 3.0, 1.0], step=4.0)
    assert results.at_equal_seconds(slow, dense, "wall") == pytest.approx(3.0 / 2.0 - 1)


def test_table_compares_seed_by_seed() -> None:
    records = [record("dense", s, [4.0, 3.0, 2.0 + s], 2.0) for s in (0, 1)]
    records += [record("sparse", s, [4.0, 3.0, (2.0 + s) * 1.01], 1.0, dense_loss=2.5) for s in (0, 1)]
    records.append(record("lonely", 7, [4.0, 3.0, 2.0], 1.0))  # no dense run of its seed
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in results.table(records, "wall").splitlines()
        if "|" in line
    }
    assert rows["sparse"][:4] == ["0.003", "2", "2.5250 ± 0.7142", "+1.00 ± 0.00"]
    assert rows["dense"][:4] == ["0.003", "2", "2.5000 ± 0.7071", ""]
    assert rows["lonely"][:4] == ["0.003", "1", "2.0000", ""]
    other = replace(records[0].budget, batch=3)
    assert results.table([*records, replace(records[0], budget=other)], "wall").count("learning rate") == 2


def test_dense_is_taken_at_its_best_rate(tmp_path: Path) -> None:
    def at(rate: float, name: str, loss: float) -> Record:
        made = record(name, 0, [4.0, 3.0, loss], 1.0, dense_loss=loss)
        return replace(made, budget=replace(made.budget, learning_rate=rate, falling=True))

    records = [at(1e-3, "dense", 2.2), at(2e-3, "dense", 2.0), at(3e-3, "dense", 2.1), at(1e-3, "sparse", 2.1), at(3e-3, "sparse", 2.02)]
    lines = [line for line in results.table(records, "wall").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[:2] for row in cells] == [
        *(["dense", rate] for rate in ("0.001", "0.002", "0.003")),
        *(["sparse", r] for r in ("0.001", "0.003")),
    ]
    assert [row[results.HEADERS.index("against dense %")] for row in cells] == ["+10.00", "", "+5.00", "+5.00", "+1.00"]
    assert all(row[-1] == "" for row in cells)  # at equal seconds a rate has not fallen yet
    assert len({results.save(tmp_path, made) for made in records}) == len(records)


def test_variants_on_the_command_line() -> None:
    assert variant("dense") == ("dense", None)
    assert variant("attention-1/4")[1] == {"decline": "never", "attention.density": 0.25, "ffn.enabled": False}
    assert variant('mine={"ffn.density": 0.75}') == ("mine", {"decline": "never", "ffn.density": 0.75})
    for wrong in ("densest", 'dense={"ffn.density": 0.5}', 'a b={"ffn.density": 0.5}', "mine=[1]", 'mine={"ffn.densty": 1}'):
        with pytest.raises(ValueError):
            variant(wrong)
    for name in VARIANTS:
        variant(name)  # every entry of the table is one that the backend takes
