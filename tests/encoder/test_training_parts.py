"""The parts of training that take values and give values: metrics, gate, loss, pairs, clocks, card."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from encoder.train import report as report_module
from encoder.train.data import (
    Batches,
    Pair,
    judged_documents,
    positives_by_query,
    read_pairs,
    split_by_query,
    write_pairs,
)
from encoder.train.gate import judge
from encoder.train.inputs import Inputs
from encoder.train.loss import BatchShape, blocked_candidates, gradient_of_rows, info_nce
from encoder.train.metrics import Quality, quality, ranks_of_relevant
from encoder.train.report import Report, commit, draw_curves, model_card, read_history
from encoder.train.server import Clocks
from encoder.train.settings import TrainSettings, parse
from encoder.train.trainer import learning_rate
from shoal.errors import SettingsError
from shoal.ranking import bootstrap_mean

# -- metrics --------------------------------------------------------------------------------------


def test_figures_of_a_small_ranking_by_hand():
    # The one document of query 0 is third; those of query 1 are first and fourth.
    found = quality([np.array([2]), np.array([0, 3])])
    assert found.recall_at_10.tolist() == [1.0, 1.0]
    assert found.reciprocal_rank == pytest.approx([1 / 3, 1.0])
    ideal = 1 + 1 / math.log2(3)
    assert found.ndcg_at_10 == pytest.approx([1 / 2, (1 + 1 / math.log2(5)) / ideal])


def test_what_is_below_the_tenth_place_counts_for_mrr_only():
    found = quality([np.array([10])])
    assert (found.recall_at_10[0], found.ndcg_at_10[0]) == (0, 0)
    assert found.reciprocal_rank[0] == pytest.approx(1 / 11)


def test_ranks_are_those_of_a_plain_sort():
    dice = np.random.default_rng(11)
    queries = dice.normal(size=(300, 8)).astype(np.float32)
    documents = dice.normal(size=(50, 8)).astype(np.float32)
    relevant = [frozenset(dice.choice(50, 3, replace=False).tolist()) for _ in range(300)]
    ranks = ranks_of_relevant(queries, documents, relevant)
    for row in range(300):
        order = np.argsort(-(documents @ queries[row]))
        assert ranks[row].tolist() == [i for i, d in enumerate(order) if d in relevant[row]]


def test_a_model_that_says_the_same_to_everything_finds_nothing():
    same = np.ones((20, 4), np.float32)
    ranks = ranks_of_relevant(same[:1], same, [frozenset({0})])
    assert ranks[0].tolist() == [19]


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    dice = np.random.default_rng(2)
    covered = 0
    for seed in range(60):
        interval = bootstrap_mean(dice.normal(0.5, 1.0, 100), seed)
        covered += interval.low <= 0.5 <= interval.high
    assert 52 <= covered <= 60


def test_bootstrap_of_one_seed_is_one_interval():
    values = np.random.default_rng(1).random(50)
    assert bootstrap_mean(values, 7) == bootstrap_mean(values, 7)
    assert bootstrap_mean(np.full(9, 0.25), 1).low == 0.25


# -- gate -----------------------------------------------------------------------------------------


def of_ndcg(values: np.ndarray) -> Quality:
    return Quality(values, values, values)


def test_gate_wants_a_gain_that_is_not_chance():
    dice = np.random.default_rng(4)
    before = dice.random(300)
    better = judge(of_ndcg(before), of_ndcg(before + dice.normal(0.05, 0.1, 300)), seed=1)
    noise = judge(of_ndcg(before), of_ndcg(before + dice.normal(0.001, 0.1, 300)), seed=1)
    worse = judge(of_ndcg(before), of_ndcg(before - 0.1), seed=1)
    assert better.accepted
    assert "gains" in better.sentence()
    assert not noise.accepted
    assert "chance" in noise.sentence()
    assert not worse.accepted
    assert "worse" in worse.sentence()
    assert not judge(of_ndcg(before), of_ndcg(before), seed=1).accepted


# -- loss -----------------------------------------------------------------------------------------


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(shape), dim=-1)


def test_loss_is_the_formula():
    torch.manual_seed(0)
    queries, documents = unit(3, 5), unit(4, 5)
    expected = 0.0
    for i in range(3):
        scores = [math.exp(20 * float(queries[i] @ documents[j])) for j in range(4)]
        expected -= math.log(scores[i] / sum(scores)) / 3
    none = torch.zeros(3, 4, dtype=torch.bool)
    assert float(info_nce(queries, documents, none, scale=20)) == pytest.approx(expected, rel=1e-5)


def test_blocked_candidates_do_not_count():
    torch.manual_seed(0)
    queries, documents = unit(3, 5), unit(4, 5)
    blocked = torch.zeros(3, 4, dtype=torch.bool)
    blocked[:, 3] = True
    without = info_nce(queries, documents[:3], blocked[:, :3], scale=20)
    assert float(info_nce(queries, documents, blocked, scale=20)) == pytest.approx(float(without))


def test_known_answers_are_no_negatives():
    known = {"a": {"A", "A2"}, "b": {"B"}}
    blocked = blocked_candidates(["a", "b", "a"], ["A", "B", "A2", "A"], known)
    assert blocked.tolist() == [
        [False, False, True, True],
        [False, False, False, False],
        [True, False, False, True],
    ]


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_of_rows_is_autograds(symmetric):
    torch.manual_seed(1)
    shape = BatchShape(3, 2)
    own = unit(shape.rows, 6)
    blocked = torch.zeros(3, 9, dtype=torch.bool)
    found = gradient_of_rows(own, shape, blocked, scale=20, symmetric=symmetric, group=None)
    leaf = own.clone().requires_grad_()
    loss = info_nce(leaf[:3], leaf[3:], blocked, scale=20, symmetric=symmetric)
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(found.rows, leaf.grad)
    assert float(found.loss) == pytest.approx(float(loss.detach()))


def test_learning_rate_starts_small_and_ends_above_zero():
    rates = [learning_rate(s, peak=1.0, warmup_steps=4, steps=10) for s in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert rates[-1] > 0
    assert learning_rate(0, peak=1.0, warmup_steps=0, steps=10) == 1.0


# -- pairs ----------------------------------------------------------------------------------------

SOME = [Pair("q one", "p one", ("n one", "n two")), Pair("q, two", 'p "two"')]


def test_pairs_come_from_all_kinds_of_files(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", SOME)
    assert read_pairs(tmp_path / "pairs.jsonl") == SOME
    (tmp_path / "pairs.csv").write_text(
        'query,positive,negatives\nq one,p one,"[""n one"", ""n two""]"\n"q, two","p ""two""",\n'
    )
    assert read_pairs(tmp_path / "pairs.csv") == SOME
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "query": [p.query for p in SOME],
            "positive": [p.positive for p in SOME],
            "negatives": [list(p.negatives) or None for p in SOME],
            "other": [1, 2],
        }
    )
    parquet.write_table(table, tmp_path / "pairs.parquet")
    assert read_pairs(tmp_path / "pairs.parquet") == SOME


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", "{", "row 1 is not JSON"),
        ("a.jsonl", "[]", "not a JSON object"),
        ("a.jsonl", '{"query": "q"}', "row 1 has no `positive`; its fields are: query"),
        ("a.jsonl", '{"query": "q", "positive": 5}', "`positive` must be a text"),
        ("a.jsonl", '{"query": "q", "positive": " "}', "`positive` must be a text"),
        ("a.jsonl", '{"query": "q", "positive": "p", "negatives": 3}', "neither"),
        ("a.jsonl", "", "no pairs"),
        ("a.jsonl", '{"query": "\\ud83d", "positive": "p"}', "no text in Unicode"),
        ("a.jsonl", "[" * 100_000, "row 1 is not JSON"),
        ("a.csv", "query,positive,negatives\nq,p,[3\n", "no JSON list"),
        ("a.csv", "question,answer\nq,p\n", "no column query and no column positive.*question"),
        ("a.csv", "query,answer\nq,p\n", "no column positive; its columns are: query, answer"),
        ("a.csv", "", "its columns are: none"),
        ("a.csv", "query,positive\nq\n", "row 2 has no `positive`; its fields are: query"),
        ("a.csv", 'query,positive\nq,"p\nq2,p2\n', "not CSV"),
        ("a.parquet", "query", "cannot be read as Parquet"),
        ("a.txt", "q p", "not as .txt"),
    ],
)
def test_wrong_pairs_are_named(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=told):
        read_pairs(tmp_path / name)


def test_pairs_are_replaced_whole_or_not_at_all(tmp_path):
    write_pairs(tmp_path / "a.jsonl", SOME)

    def broken():
        yield Pair("new", "pair")
        raise RuntimeError("the server has gone")

    with pytest.raises(RuntimeError, match="gone"):
        write_pairs(tmp_path / "a.jsonl", broken())
    assert read_pairs(tmp_path / "a.jsonl") == SOME
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(SettingsError, match="could not be written"):
        write_pairs(tmp_path / "no folder" / "a.jsonl", SOME)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes("query,positive\ncafé,p\n".encode("latin-1"))
        with pytest.raises(SettingsError, match="not UTF-8"):
            read_pairs(tmp_path / name)


def test_texts_of_all_scripts_and_the_mark_of_excel(tmp_path):
    pairs = [Pair("Ünïcödé 🧪", "日本語\u2028テキスト", ("‏עברית",)), Pair("q" * 200_000, "p")]
    write_pairs(tmp_path / "a.jsonl", pairs)
    assert read_pairs(tmp_path / "a.jsonl") == pairs
    for name, text in (
        ("a.csv", "query,positive,more\r\nq,p,m\r\n"),
        ("b.jsonl", '{"query": "q", "positive": "p"}\r\n\r\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig", newline="")
        assert read_pairs(tmp_path / name) == [Pair("q", "p")]
    with (tmp_path / "long.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["query", "positive"], ["q" * 200_000, "p"]])
    assert read_pairs(tmp_path / "long.csv") == [pairs[1]]


def test_parquet_says_what_is_wrong_with_it(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for columns, told in (
        ({"query": ["q"], "answer": ["p"]}, "no column positive; its columns are: query, answer"),
        ({"query": ["q", None], "positive": ["p", "p"]}, "row 2: `query` must be a text"),
        ({"query": [1], "positive": ["p"]}, "row 1: `query` must be a text"),
        ({"query": ["q"], "positive": ["p"], "negatives": [["n", None]]}, "`negatives` must be"),
        ({"query": ["q"], "positive": ["p"], "negatives": [7]}, "neither a text nor a list"),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(SettingsError, match=told):
            read_pairs(tmp_path / "a.parquet")
    plain = pyarrow.table({"query": ["q"], "positive": ["p"], "negatives": ["one text"]})
    parquet.write_table(plain, tmp_path / "a.parquet")
    assert read_pairs(tmp_path / "a.parquet") == [Pair("q", "p", ("one text",))]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match="no file"):
        read_pairs(tmp_path / "none.jsonl")


def many() -> list[Pair]:
    return [Pair(f"q{i % 60}", f"p{i % 45}") for i in range(180)]


def test_what_is_held_out_was_never_seen():
    split = split_by_query(many(), queries=10, seed=3)
    assert len({p.query for p in split.held_out}) == 10
    assert not {p.query for p in split.held_out} & {p.query for p in split.train}
    assert not {p.positive for p in split.held_out} & {p.positive for p in split.train}


def test_what_is_held_out_is_seen_in_no_place():
    both = [Pair(f"a{i}", f"b{i}", (f"b{(i + 1) % 40}", "n")) for i in range(40)]
    both += [Pair(p.positive, p.query) for p in both]  # questions that mean the same
    split = split_by_query(both, queries=10, seed=3)
    unseen = {text for p in split.held_out for text in (p.query, p.positive)}
    for pair in split.train:
        assert unseen.isdisjoint({pair.query, pair.positive, *pair.negatives})
    assert {len(p.negatives) for p in split.train} == {0, 1, 2}


def test_the_split_depends_on_texts_and_seed_only():
    chosen = {p.query for p in split_by_query(many(), queries=10, seed=3).held_out}
    assert {p.query for p in split_by_query(many()[::-1], queries=10, seed=3).held_out} == chosen
    assert {p.query for p in split_by_query(many(), queries=10, seed=4).held_out} != chosen


def test_too_few_queries_are_told():
    with pytest.raises(SettingsError, match="too few to hold out 31"):
        split_by_query(many(), queries=31, seed=3)


def test_one_pair_is_too_few_whatever_is_held_out():
    with pytest.raises(SettingsError, match="1 different queries, too few"):
        split_by_query([Pair("q", "p")] * 5, queries=1, seed=3)
    two = [Pair("q", "p"), Pair("q2", "p2")]
    split = split_by_query(two, queries=1, seed=3)
    with pytest.raises(SettingsError, match="--batch-pairs a smaller number"):
        Batches(split.train, batch_pairs=2, negatives_per_pair=0, seed=1)
    with pytest.raises(SettingsError, match="shares its query or positive"):
        split_by_query([Pair("q", "p"), Pair("q2", "p")], queries=1, seed=3)


def test_pairs_that_are_there_twice_are_no_negatives_of_each_other():
    pair = Pair("q", "p")
    pairs = [pair, pair, Pair("q", "other p"), Pair("r", "p")]
    known = positives_by_query(pairs)
    blocked = blocked_candidates([p.query for p in pairs], [p.positive for p in pairs], known)
    assert blocked.tolist() == [
        [False, True, True, True],
        [True, False, True, True],
        [True, True, False, True],
        [True, True, False, False],
    ]
    split = split_by_query([*pairs, Pair("s", "t")] * 3, queries=1, seed=2)
    judged = judged_documents(split, documents_max=1, seed=2)
    assert len(judged.documents) == len(set(judged.documents))


def test_judged_queries_know_all_their_documents():
    split = split_by_query(many(), queries=10, seed=3)
    judged = judged_documents(split, documents_max=30, seed=3)
    assert len(judged.documents) == 30 == len(set(judged.documents))
    wanted = positives_by_query(split.held_out)
    for query, places in zip(judged.queries, judged.relevant, strict=True):
        assert {judged.documents[place] for place in places} == wanted[query]


def test_every_pair_once_an_epoch_whatever_step_is_asked_for_first():
    pairs = [Pair(f"q{i}", f"p{i}") for i in range(40)]
    batches = Batches(pairs, batch_pairs=8, negatives_per_pair=2, seed=5)
    epochs = [[batches.at(step) for step in range(e * 5, e * 5 + 5)] for e in range(2)]
    for epoch in epochs:
        assert sorted(p.query for batch in epoch for p in batch) == sorted(p.query for p in pairs)
    assert epochs[0] != epochs[1]
    again = Batches(pairs, batch_pairs=8, negatives_per_pair=2, seed=5)
    assert again.at(7) == epochs[1][2]  # no step before it was asked for
    assert all(len(p.negatives) == 2 for p in again.at(7))


def test_own_negatives_come_first():
    pairs = [Pair(f"q{i}", f"p{i}", (f"n{i}", f"m{i}", f"o{i}")) for i in range(8)]
    for pair in Batches(pairs, batch_pairs=8, negatives_per_pair=2, seed=5).at(0):
        assert len(set(pair.negatives)) == 2
        assert all(text[1:] == pair.query[1:] for text in pair.negatives)


# -- clocks of the parameter server ---------------------------------------------------------------


def test_nobody_gets_further_ahead_than_the_bound():
    dice = np.random.default_rng(8)
    for staleness in (0, 1, 3):
        clocks = Clocks([1, 2, 3], staleness=staleness, start=0, until=20)
        done, running = dict.fromkeys([1, 2, 3], 0), {1, 2, 3}
        while not clocks.met:
            assert running, "everybody waits for everybody"
            worker = int(dice.choice(sorted(running)))
            done[worker] += 1
            running.discard(worker)
            running.update(clocks.finished(worker))
            assert max(done[w] for w in running) - min(done.values()) <= staleness
        assert min(done.values()) == 20


def test_all_meet_at_one_step_whenever_they_are_called_together():
    seed = 9
    print("seed", seed)
    dice = np.random.default_rng(seed)
    for called_at in range(1, 40):
        clocks = Clocks([1, 2, 3], staleness=2, start=0, until=12)
        done = dict.fromkeys([1, 2, 3], 0)
        told = dict.fromkeys([1, 2, 3], 12)  # until when, with the last answer
        running = {1, 2, 3}
        for message in range(1, 200):
            if clocks.met:
                break
            worker = int(dice.choice(sorted(running)))
            done[worker] += 1
            running.discard(worker)
            going = clocks.finished(worker)
            if message >= called_at:
                clocks.call_together()
            told |= dict.fromkeys(going, clocks.until)
            running |= {w for w in going if done[w] < told[w]}
        assert set(done.values()) == set(told.values()) == {clocks.until}
        assert clocks.until <= 12
        assert called_at > 6 or clocks.until < 12


# -- settings, curves, card -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--dp 3 --batch-pairs 64", "multiple"),
        ("--dp 2 --tp 2 --compress fp16", "DDP"),
        ("--dp 2 --tp 2 --shard ddp", "fsdp does"),
        ("--mode parameter-server", "--dp 2 or more"),
        ("--pp 0", "1 or more"),
        ("--max-tokens 2", "8 or more"),
        ("--seed -1", "0 or more"),
        (f"--seed {2**32}", "or less"),
        ("--lr 0", "more than 0"),
        ("--lr nan", "more than 0"),
        ("--dropout 1", "less than 1"),
        ("--local-period 0", "1 or more"),
        ("--staleness -1", "0 or more"),
        ("--batch-pairs 1", "nothing to tell apart"),
        ("--batch-pairs 2 --dp 2 --mode local-sgd", "nothing to tell apart"),
        ("--name ..", "plain name"),
        ("--name .", "plain name"),
        ("--name /etc", "plain name"),
        ("--name a/b", "plain name"),
        ("--name checkpoints", "plain name"),
    ],
)
def test_settings_that_do_not_fit_say_what_would(tmp_path, flags, told):
    with pytest.raises(SettingsError, match=told):
        parse(["--pairs", "p.jsonl", "--out", str(tmp_path), *flags.split()])


def test_a_gate_wants_enough_queries(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    line = '{{"query": "word {0}", "positive": "meaning {0}", "negatives": ["other {0}"]}}\n'
    pairs.write_text("".join(line.format(n) for n in range(60)))
    settings = parse(
        [
            "--pairs",
            str(pairs),
            "--out",
            str(tmp_path / "o"),
            "--held-out",
            "19",
            "--batch-pairs",
            "8",
        ]
    )
    inputs = Inputs.read(settings)
    assert "41 pairs have negatives" in (inputs.unused(settings) or "")
    assert inputs.unused(replace(settings, negatives=1)) is None
    with pytest.raises(SettingsError, match="by 19 held-out queries: it wants 20"):
        Inputs.read(replace(settings, gate=True))
    Inputs.read(replace(settings, gate=True, held_out=20))


def test_flags_reach_their_settings(tmp_path):
    settings = parse(["--pairs", "p.jsonl", "--out", str(tmp_path), "--symmetric", "--lr", "1e-4"])
    assert isinstance(settings, TrainSettings)
    assert (settings.symmetric, settings.lr, settings.gate) == (True, 1e-4, False)


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    report = Report(tmp_path, steps=3, start=0, shown=False)
    report.step(1, loss=1.0)
    with open("/dev/full", "w") as full:  # writing to it fails as on a full disk
        os.dup2(full.fileno(), report._file.fileno())
    report.step(2, loss=1.0)
    report.step(3, loss=1.0)
    report.close()
    report.close()
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert [line["step"] for line in read_history(tmp_path / "history.jsonl")] == [1]


def test_without_a_terminal_a_line_tells_now_and_then_how_far_a_run_is(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("encoder.train.report.LINE_EVERY_S", 0)
    report = Report(tmp_path, steps=3, start=0, shown=False)
    report.step(1, loss=1.5)
    report.close()
    assert "Step 1 of 3: loss 1.5000" in capsys.readouterr().err


def test_a_run_that_begins_anew_leaves_no_line_of_an_earlier_one(tmp_path):
    for start, kept in ((0, []), (0, []), (1, [1])):
        report = Report(tmp_path, steps=3, start=start, shown=False)
        assert [line["step"] for line in read_history(tmp_path / "history.jsonl")] == kept
        for step in range(start + 1, 4):
            report.step(step, loss=1.0)
        report.close()


def test_curves_of_a_history_that_a_crash_cut_off(tmp_path):
    lines = [
        {"step": 0, "kind": "held-out", "recall@10": 0.1, "ndcg@10": 0.1, "mrr": 0.1},
        {"step": 1, "kind": "train", "loss": 2.0},
    ]
    file = tmp_path / "history.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "ki')
    assert read_history(file) == lines
    pytest.importorskip("matplotlib")
    assert draw_curves({"": [file]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_commit_of_a_project_that_shoal_is_installed_in_is_not_shoals(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    commit_it = ["commit", "-q", "--allow-empty", "-m", "of somebody"]
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    subprocess.run(["git", "-C", str(tmp_path), *who, *commit_it], check=True)
    place = tmp_path / ".venv/site-packages/encoder/train/report.py"
    monkeypatch.setattr(report_module, "__file__", str(place))
    place.parent.mkdir(parents=True)
    assert "commit" not in commit()
    monkeypatch.setattr(report_module, "__file__", str(tmp_path / "encoder/train/report.py"))
    assert "commit" in commit()


def test_the_card_says_data_seed_and_commit_and_how_to_do_it_again(tmp_path):
    interval = bootstrap_mean(np.array([0.1, 0.2]), 1)
    settings = TrainSettings(
        "bundled", tmp_path / "my pairs.jsonl", tmp_path, seed=42, symmetric=True, name="notes"
    )
    card = model_card(
        settings,
        data={"pairs": 17, "file": "a|b"},
        before={"ndcg@10": interval},
        after={"ndcg@10": interval},
        verdict="Accepted.",
    )
    for part in (
        *("# notes\n", "seed 42", "| pairs | 17 |", "| file | a\\|b |", "shoal 0"),
        *("| nDCG@10 | 0.1500 [", "base_model: sentence-transformers/all-MiniLM-L6-v2"),
        "shoal encoder train --pairs 'my pairs.jsonl' --symmetric --seed 42",
    ):
        assert part in card
    assert str(tmp_path) not in card
    again = parse([*settings.flags(without=["pairs"]), "--pairs", str(settings.pairs)])
    assert replace(again, out=tmp_path) == settings


def test_the_card_says_where_local_sgd_averaged(tmp_path):
    given = {"dp": 2, "eval_every": 7, "checkpoint_every": 9}
    for mode, told in (("local-sgd", True), ("sync", False)):
        settings = TrainSettings("bundled", tmp_path / "p.jsonl", tmp_path, mode=mode, **given)
        card = model_card(settings, data={}, before={}, after={}, verdict="Accepted.")
        assert ("--eval-every 7 --checkpoint-every 9" in card) is told
