"""The report: what it says is what the runs measured, runs that differ are not averaged, and what is
damaged ends in one line."""

import dataclasses
import html
import json
from html.parser import HTMLParser

import pytest

from infra.cli import UserError
from infra.runs import read_json
from report import __main__ as report
from report import arms, runs, webpage
from report.solutions import write_rows
from tasks.planted import Planted

CONFIG = dict(task="planted", reward="pav", verifier="v", eval_problems=8, steps=20, seed=0, data=[],
              guards=["anchor"], policy="p", task_args=["prompts=2", "length=3"])
ROW = dict(prompt="A", answer="abc", steps=["ab", "c"], values=[0.25, 0.75, 0.5], reward=1.0,
           finish_reason="length")
HOSTILE = dict(ROW, prompt="<b>", steps=["</span><script>alert(1)</script>", "x"], reward=0.0)


def metrics(points, **more):
    """Rows of metrics.jsonl: (tokens, accuracy, score) an evaluation, one step each."""
    rows = []
    for step, (tokens, accuracy, score) in enumerate(points):
        row = {"step": step, "num_tokens": tokens, "eval/accuracy": accuracy}
        row["eval/verifier_score"] = score
        if step:
            row |= {"reward": accuracy, "entropy": 2.0, "grad_norm": 0.5, "frac_reward_zero_std": 0.0,
                    "completions/mean_length": 12.0, "completions/clipped_ratio": 1.0,
                    "timing/generate": 0.25, "timing/other": 0.5}
        rows.append(row | more)
    return rows


def make_run(root, arm="pav", seed=0, points=((0, 0.0, 0.1), (1000, 0.5, 0.2)), k=1, **change):
    """A finished run as train_rl.py leaves it, with a verifier beside it."""
    run = root / f"seed{seed}" / f"rl_{arm}"
    run.mkdir(parents=True)
    stage = arms.arm_of(arm).verifier or "verifier"
    place = root / f"seed{seed}" / stage
    (place / "step_000010").mkdir(parents=True, exist_ok=True)
    (place / "step_000010/verifier.json").write_text(json.dumps(dict(prover_k=k)))
    summary = dict(sampled_tokens=500, reliability=[(0.3, 0.4, 5)], corr_advantage_exact=0.5)
    (place / "summary.json").write_text(json.dumps(summary))
    of_arm = dict(reward=arms.arm_of(arm).reward) | arms.arm_of(arm).flags
    config = CONFIG | dict(seed=seed, verifier=f"/nowhere/{stage}") | of_arm | change
    (run / "run_config.json").write_text(json.dumps(config))
    (run / "summary.json").write_text("{}")
    lines = "".join(json.dumps(row) + "\n" for row in metrics(points))
    (run / "metrics.jsonl").write_text(lines)
    return run


class Page(HTMLParser):
    """Tags, attributes, text, and the cells of every table row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.rows = [], [], "", []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def test_the_page_holds_what_the_runs_say(tmp_path):
    for seed, accuracy in ((0, 0.75), (1, 0.25)):
        make_run(tmp_path, "pav", seed, [(0, 0.0, 0.1), (1000, accuracy, 0.2)])
    make_run(tmp_path, "outcome", 0)
    write_rows(tmp_path / "seed0/rl_pav/solutions_end.jsonl", [ROW, HOSTILE])
    write_rows(tmp_path / "seed0/rl_pav/solutions_start.jsonl", [HOSTILE])
    write_rows(tmp_path / "seed0/rl_outcome/solutions_end.jsonl", [ROW])
    (tmp_path / "commands.json").write_text(json.dumps({"seed0/rl_pav": ["train_rl.py", "--x"]}))
    report.write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    for word in ("http", "src=", "@import", "url(", "<link", "<iframe"):  # nothing is fetched
        assert word not in text, word
    assert html.escape("</span><script>alert(1)") in text and page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for heading in ("The task", "Learning curves", "being fooled", "Training, step by step",
                    "calibrated", "Where a step", "Solutions, step by step", "How it was made"):
        assert heading in page.text, heading
    for name in ("reward", "entropy", "grad_norm", "completions/mean_length",
                 "completions/clipped_ratio", "frac_reward_zero_std"):
        assert webpage.TRAINING[name] in page.text
    assert "0.7500 s" in page.text and "generate: 0.2500 s" in text  # seconds a step: 0.25 + 0.5
    order = ["PAV, after training", "outcome only, after training", "before training"]
    assert [page.text.index(x) for x in order] == sorted(page.text.index(x) for x in order)
    assert "1 distinct right solution" in page.text and "accuracy 0.750 of 8 samples" in page.text
    assert "answer: abc" in page.text  # what was asked for
    hidden = [(p.prompt, p.answer) for p in Planted(seed=0, prompts=2, planted=3).all]
    assert all(list(pair) in page.rows for pair in hidden) and len(hidden) == 2
    assert "cut off" not in page.text  # planted never trains an EOS
    assert "train_rl.py --x" in page.text and "commit" in page.text


def test_every_row_of_the_table_has_all_cells(tmp_path):
    make_run(tmp_path, "pav")
    make_run(tmp_path, "outcome")
    report.write(tmp_path)
    rows = Page((tmp_path / "report.html").read_text()).rows[:3]
    assert [row[0] for row in rows] == ["arm", "PAV", "outcome only"]
    assert {len(row) for row in rows} == {9} and rows[2][-1] == ""


def test_cut_off_is_said_where_solutions_end_by_themselves():
    assert "cut off" in webpage.card(ROW, 0) and "cut off" not in webpage.card(ROW, 0, False)


def test_the_folder_of_one_run_is_enough(tmp_path, capsys):
    make_run(tmp_path, "outcome")
    run = make_run(tmp_path, "pav")
    report.main([str(run), "--out", str(tmp_path / "out")])
    assert "| PAV | 1 |" in (tmp_path / "out/table.md").read_text()
    assert "outcome" not in (tmp_path / "out/table.md").read_text()
    (run / "summary.json").unlink()
    report.main([str(run)])
    assert "is not finished: step 1 of 20" in capsys.readouterr().out
    elsewhere = tmp_path / "mine"
    run.rename(elsewhere)  # a run of any name: its settings tell the arm
    assert list(runs.load_arms(elsewhere)) == ["pav"]


def test_a_run_by_hand_is_known_by_its_settings(tmp_path):
    run = make_run(tmp_path, "constant")
    run = run.rename(tmp_path / "seed0/x")
    assert list(runs.load_arms(run)) == ["constant"]
    assert "--verifier=constant" in report.commands_of(run, runs.load_arms(run))["x"]


def test_a_typo_creates_nothing(tmp_path):
    for argv in (["typo"], ["typo", "--out", "out"]):
        with pytest.raises(UserError, match="no such folder"):
            report.main([str(tmp_path / argv[0]), *argv[1:2], *[str(tmp_path / x) for x in argv[2:]]])
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no RL run"):
        report.main([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="is a file"):
        (tmp_path / "file").write_text("")
        report.main([str(tmp_path / "file")])
    with pytest.raises(UserError, match="which run"):
        report.main([])
    make_run(tmp_path / "good")
    with pytest.raises(UserError, match="--out .* is a file"):
        report.main([str(tmp_path / "good"), "--out", str(tmp_path / "file")])


@pytest.mark.parametrize("name, content", [
    ("run_config.json", "{"), ("run_config.json", "[1]"), ("run_config.json", None),
    ("summary.json", "{"), ("metrics.jsonl", ""), ("metrics.jsonl", "{"), ("metrics.jsonl", None),
    ("metrics.jsonl", '{"step": 0}\n'), ("solutions_end.jsonl", "{"), ("solutions_end.jsonl", "[]\n"),
    ("solutions_end.jsonl", '{"prompt": "A", "steps": ["a"], "values": [], "reward": 1, '
                            '"finish_reason": "stop"}\n'),
    ("../verifier/summary.json", "no"), ("../verifier/step_000010/verifier.json", "no"),
    ("../../commands.json", "{"), ("../../commands.json", "[]")])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content):
    run = make_run(tmp_path)
    path = run / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=path.name.replace(".", r"\.")) as error:
        report.write(run, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_read_json(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json") == dict(a=1)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="x.json cannot be read"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="y.json cannot be read"):
        read_json(tmp_path / "y.json")


def test_runs_of_other_settings_are_not_averaged(tmp_path, capsys):
    """A real run and a smoke run in one folder: two arms, and the budget of each curve is told."""
    make_run(tmp_path, "pav", 0, [(0, 0.0, 0.1), (1000, 0.9, 0.9)], steps=200)
    make_run(tmp_path, "pav", 1, [(0, 0.0, 0.1), (1000, 0.1, 0.1)], steps=3)
    make_run(tmp_path, "pav", 2, [(0, 0.0, 0.1), (1000, 0.7, 0.7)], steps=200, verifier="elsewhere/verifier")
    report.write(tmp_path)
    out = capsys.readouterr().out
    assert "PAV: seed1 is not averaged with seed0, seed2: --steps 3 there, 200 here" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {k: r["seeds"] for k, r in results["arms"].items()} == {"pav": 2, "pav (steps=3)": 1}
    assert results["arms"]["pav"]["accuracy_budget"] == pytest.approx(0.8)
    assert set(results["settings"]["pav"]) == {"seed0", "seed2"}  # of every seed
    assert results["settings"]["pav (steps=3)"]["seed1"]["steps"] == 3
    assert arms.arm_of("pav (steps=3)").label == "PAV (steps=3)"
    assert arms.arm_of("pav (steps=3)").colour == arms.GREY


def test_arms_that_differ_in_more_than_their_reward_are_told(tmp_path, capsys):
    make_run(tmp_path, "pav")
    make_run(tmp_path, "outcome")
    make_run(tmp_path, "outcome-long", steps=100)
    report.write(tmp_path)
    assert "not a fair comparison" not in capsys.readouterr().out  # reward, and steps of the long arm
    make_run(tmp_path, "constant", learning_rate=0.1)
    make_run(tmp_path, "q", steps=7)
    report.write(tmp_path)
    out = capsys.readouterr().out
    assert "Q as reward differs from PAV in --steps too" in out and out.count("not a fair") == 1


def test_an_unknown_arm_is_drawn_under_its_own_name(tmp_path):
    make_run(tmp_path, "worst", reward="worst")
    make_run(tmp_path, "pav")
    report.write(tmp_path)
    assert list(json.loads((tmp_path / "results.json").read_text())["arms"]) == ["pav", "worst"]
    assert "worst" in (tmp_path / "report.html").read_text()


def test_the_table_of_arms_is_whole():
    for name, arm in arms.ARMS.items():
        assert arm.label and arm.reward and arm.colour.startswith("#"), name
    assert len({arm.label for arm in arms.ARMS.values()}) == len(arms.ARMS)  # one name an arm
    assert len({arm.colour for arm in arms.ARMS.values()}) == len(arms.ARMS)
    assert arms.REWARDS == ["pav", "q", "orm", "mrt", "outcome"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        arms.ARMS["pav"].label = "x"


def test_best_of_k_is_compared_as_a_single_sample(tmp_path):
    """train_rl.py logs V of one sample; the plot takes it as it is, and the page names the K."""
    make_run(tmp_path, points=[(0, 0.0, 0.0), (1000, 0.2, 0.2)], k=4)
    [run] = runs.load_arms(tmp_path)["pav"]
    assert run.prover_k == 4 and webpage.goodhart_points(run) == [(0.0, 0.0), (0.2, 0.2)]
    report.write(tmp_path)
    assert "best of 4" in (tmp_path / "report.html").read_text()


def test_the_budget_is_that_of_the_arms_compared(tmp_path):
    """A control that stops early counts with its end and shortens nobody else's curve."""
    make_run(tmp_path, "outcome", points=[(0, 0.0, 0), (400, 0.4, 0)])
    make_run(tmp_path, "pav", points=[(0, 0.0, 0), (800, 0.8, 0)])
    make_run(tmp_path, "constant", points=[(0, 0.1, 0), (100, 0.3, 0)])
    rows = report.summarise(runs.load_arms(tmp_path))
    assert [rows[a]["budget_tokens"] for a in rows] == [400] * 3
    assert rows["outcome"]["accuracy_budget"] == 0.4
    assert rows["pav"]["accuracy_budget"] == pytest.approx(0.4)
    assert rows["pav"]["accuracy_quarter"] == pytest.approx(0.1)
    assert rows["constant"]["accuracy_budget"] == 0.3
    assert [rows[a]["verifier_tokens"] for a in ("pav", "outcome", "constant")] == [500, 0, 0]


def test_the_axis_ends_before_an_arm_that_runs_longer(tmp_path):
    make_run(tmp_path, "pav", points=[(0, 0.0, 0), (100, 0.5, 0)])
    make_run(tmp_path, "outcome-long", points=[(0, 0.0, 0), (100, 0.2, 0), (900, 0.6, 0)])
    arms_read = runs.load_arms(tmp_path)
    end = webpage.shown_end(arms_read, lambda run: run.evaluations[-1]["num_tokens"])
    assert end == 100
    label = webpage.learning_label("outcome-long", arms_read["outcome-long"], end)
    assert label == "outcome only, more steps (n=1): 0.60 at 1k"


def test_reliability_of_seeds_is_pooled_by_bin():
    seeds = [dict(reliability=[(0.1, 0.0, 1), (0.95, 1.0, 2)]), dict(reliability=[(0.14, 0.4, 3)])]
    [low, high] = webpage.pooled_reliability(seeds)
    assert low == (pytest.approx(0.13), pytest.approx(0.3), 4) and high == (0.95, 1.0, 2)


def test_a_curve_against_steps_is_the_mean_over_seeds_and_short(tmp_path):
    make_run(tmp_path, "pav", 0, [(i, i / 300, 0) for i in range(301)])
    make_run(tmp_path, "pav", 1, [(i, 0.0, 0) for i in range(301)])
    curve = webpage.metric_curve(runs.load_arms(tmp_path)["pav"], "reward", 300)
    assert len(curve) <= webpage.POINTS and curve[0] == (2.0, pytest.approx(2 / 600))
    assert webpage.metric_curve(runs.load_arms(tmp_path)["pav"], "kl", 300) == []


def test_a_task_may_describe_itself(monkeypatch):
    class Told:
        ends_with_eos = True

        def describe(self):
            return "Add two numbers."

        def truth(self):
            return [("1+1", "2")]

    monkeypatch.setattr(report, "get_task", lambda config: Told())
    facts = report.task_facts(dict(task="told"))
    assert facts == dict(name="told", text="Add two numbers.", truth=[("1+1", "2")], ends_with_eos=True)
    assert "Add two numbers." in webpage.task_section(facts)


def test_a_task_that_cannot_be_made_costs_its_section_only(tmp_path, capsys):
    make_run(tmp_path, task="jsonl", data=["gone.jsonl"])
    report.write(tmp_path)
    assert "says nothing of the task" in capsys.readouterr().out
    assert "What the policy is not told" not in (tmp_path / "report.html").read_text()
